"""The store on a local path: one directory of files, each of them whole or not there."""

# ruff: noqa: PTH100, PTH118, PTH119 - paths stay the str that the user gave
# ruff: noqa: D102 - methods without a docstring do what `Store`, `Draft` and `OpenFile` say

from __future__ import annotations

import errno
import os
import stat as modes
import sys
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from aiofiles.os import wrap
from anyio import CancelScope

from asyncckpt._threads import in_thread
from asyncckpt.errors import StoreError
from asyncckpt.stores.abandoned import remove_abandoned
from asyncckpt.stores.base import FOLDER_MARK, Store, checked_name, checked_source, copy_into
from asyncckpt.stores.errors import local_errors
from asyncckpt.stores.fileops import FileOps
from asyncckpt.stores.local_directory import (
    is_directory,
    list_files,
    list_folders,
    make_directory,
)
from asyncckpt.stores.local_draft import LocalDraft
from asyncckpt.stores.local_file import LocalFile, committed_file
from asyncckpt.stores.local_folder import JoinedFolder, LocalFolderDraft, link_files, look_for_draft
from asyncckpt.stores.local_names import (
    ATTEMPTS,
    move_away,
    put_in_place,
    remove_quietly,
    removed_error,
    sync_directory,
)
from asyncckpt.stores.temporary import temporary_name, unlink_quietly

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Sequence

    from asyncckpt.stores.base import Draft, FolderDraft, OpenFile, StoredFile

T = TypeVar("T")

_NAME_MAX = 255
_NO_LINK = frozenset({errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES})
# None: what is raised in Python, such as by a wrapper of os.symlink, has no number.
_NO_SYMLINK = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, None})


class LocalStore(Store):
    """A directory of a mounted file system.

    Args:
        directory: its path; a relative one is meant from the working directory of this moment.
        ops: the file operations to use; for tests.

    Raises:
        StoreError: on Windows, where files in use cannot be replaced.
    """

    overlaps = True

    def __init__(self, directory: str, ops: FileOps | None = None) -> None:
        if sys.platform == "win32":
            raise StoreError(
                errno.ENOSYS, "asyncckpt does not support Windows; use Linux, WSL 2 or macOS", directory
            )
        self._given = directory
        self._directory = os.path.abspath(directory)
        self._ops = FileOps() if ops is None else ops

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._given!r})"

    def path_of(self, name: str) -> str:
        """Return the path of `name`, relative if that of the directory is."""
        return os.path.join(self._given, name)

    async def prepare(self) -> None:
        """Make the directory and its parents, durably, and remove the drafts of crashed writers."""
        with local_errors("making the directory", os.path.join(self._directory, "")):
            await in_thread(self._prepare)

    @asynccontextmanager
    async def draft(self, name: str, size: int) -> AsyncIterator[Draft]:
        self._path(name)
        draft = LocalDraft(self._ops, self._directory, name, size)
        try:
            await in_thread(draft.open)
            yield draft
        finally:
            await _to_the_end(draft.drop)

    async def list(self) -> Sequence[StoredFile]:
        """Return the regular files of the directory that are not drafts; links are not followed."""
        with local_errors("listing it", os.path.join(self._directory, "")):
            return await _looked_up(partial(list_files, self._ops, self._directory))

    async def stat(self, name: str) -> StoredFile:
        """Return the file that `name` leads to, or raise FileNotFoundError."""
        path = self._path(name)
        with local_errors(f"looking at {name}", path, absent_ok=True):
            return await _looked_up(lambda: committed_file(name, path, self._ops.stat(path)))

    async def exists(self) -> bool:
        with local_errors("looking for it", os.path.join(self._directory, "")):
            return await _looked_up(partial(is_directory, self._ops, self._directory))

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[OpenFile]:
        """Open the file that `name` leads to, or raise FileNotFoundError."""
        path = self._path(name)
        file = LocalFile(self._ops, name, path, self.path_of(name))
        try:
            with local_errors(f"reading {name}", path, absent_ok=True):
                await _looked_up(file.open)
            yield file
        finally:
            file.close()

    async def remove(self, name: str) -> None:
        """Remove a file, a link, or a directory with all that is in it, at once and durably; or nothing."""
        path = self._path(name)
        with local_errors(f"removing {name}", path):
            await in_thread(self._remove, path)

    async def copy(self, source: str, target: str) -> None:
        """Make `target` a hard link to the file that `source` leads to, or a copy where that is refused.

        A folder is copied so file by file, but for its mark.
        """
        paths = self._source(source), self._path(target)
        with local_errors(f"copying {source} to {target}", paths[1], absent_ok=True):
            await self._copy(*paths)

    async def link(self, source: str, target: str) -> None:
        """Make `target` a relative symbolic link to `source`, or a copy where links are refused."""
        paths = self._source(source), self._path(target)
        with local_errors(f"linking {target} to {source}", paths[1], absent_ok=True):
            if not await in_thread(self._link, *paths):
                await self._copy(*paths)

    async def list_folders(self) -> Sequence[StoredFile]:
        """Return the folders of the directory that are not drafts; links are not followed."""
        with local_errors("listing it", os.path.join(self._directory, "")):
            return await _looked_up(partial(list_folders, self._ops, self._directory))

    def folder(self, name: str) -> LocalStore:
        folder = LocalStore(self.path_of(checked_name(name, longest=_NAME_MAX)), self._ops)
        folder._directory = os.path.join(self._directory, name)
        return folder

    @asynccontextmanager
    async def folder_draft(self, name: str) -> AsyncIterator[FolderDraft]:
        self._path(name)
        draft = LocalFolderDraft(self._ops, self._directory, name)
        try:
            await in_thread(draft.open)
            draft.store = self.folder(draft.attempt)
            yield draft
        finally:
            await _to_the_end(draft.drop)

    @asynccontextmanager
    async def join_folder(self, name: str, attempt: str) -> AsyncIterator[FolderDraft]:
        path = self._path(name)
        with local_errors(f"joining the draft of {name}", path):
            try:
                await _looked_up(partial(look_for_draft, self._ops, self._directory, attempt))
            except FileNotFoundError as error:
                raise StoreError(
                    errno.ENOENT,
                    f"the draft of {name} that another process has made is not in {self._directory} here: it"
                    " was removed, or the directory is not shared by the hosts; use one that is, or a URL",
                    path,
                ) from error
        yield JoinedFolder(attempt, self.folder(attempt), path)

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, checked_name(name, longest=_NAME_MAX))

    def _source(self, source: str) -> str:
        return os.path.join(self._directory, checked_source(source, longest=_NAME_MAX))

    def _prepare(self) -> None:
        make_directory(self._ops, self._directory)
        remove_abandoned(self._ops, self._directory)

    def _remove(self, path: str) -> None:
        try:
            self._ops.unlink(path)
        except FileNotFoundError:
            return
        except OSError:
            if not modes.S_ISDIR(self._ops.lstat(path).st_mode):
                raise
            away = move_away(self._ops, path)
            sync_directory(self._ops, self._directory)
            self._ops.rmtree(away)
        else:
            sync_directory(self._ops, self._directory)

    async def _copy(self, source: str, target: str) -> None:
        # Two names of a link would be one file, so it is the file itself that gets the second name.
        source = await in_thread(os.path.realpath, source)
        if await in_thread(os.path.isdir, source):
            await self._copy_folder(source, target)
            return
        if await in_thread(self._place, partial(self._ops.link, source), target, _NO_LINK):
            return
        directory, name = os.path.split(source)
        beside = LocalStore(directory, self._ops)
        async with beside.open(name) as file, self.draft(os.path.basename(target), file.file.nbytes) as draft:
            await copy_into(draft, file)
            await draft.commit()

    async def _copy_folder(self, source: str, target: str) -> None:
        origin, name = LocalStore(source, self._ops), os.path.basename(target)
        async with origin.open(FOLDER_MARK) as file:
            mark = bytearray(file.file.nbytes)
            await file.read(0, memoryview(mark))
        if os.path.join(await in_thread(os.path.realpath, self._directory), name) == source:
            return
        async with self.folder_draft(name) as folder:
            place = os.path.join(self._directory, folder.attempt)
            for member in await in_thread(link_files, self._ops, source, place, _NO_LINK):
                async with (
                    origin.open(member) as member_file,
                    folder.store.draft(member, member_file.file.nbytes) as draft,
                ):
                    await copy_into(draft, member_file)
                    await draft.commit()
            if (await origin.stat(FOLDER_MARK)).version != file.file.version:
                raise FileNotFoundError(errno.ENOENT, "replaced while it was copied", source)
            await folder.commit(bytes(mark))

    def _link(self, source: str, target: str) -> bool:
        """Make `target` a symbolic link; False where that is refused."""
        found, directory = os.path.realpath(source), os.path.realpath(self._directory)
        self._ops.stat(found)
        if found == os.path.join(directory, os.path.basename(target)):
            return True
        text = os.path.relpath(found, directory)
        return self._place(partial(self._ops.symlink, text), target, _NO_SYMLINK)

    def _place(self, make: Callable[[str], None], target: str, refusals: Collection[int | None]) -> bool:
        """Make something under a temporary name, move it to `target`, and sync the directory.

        Returns:
            False if making it was refused by one of these error numbers.
        """
        for _ in range(ATTEMPTS):
            temporary = os.path.join(self._directory, temporary_name(os.path.basename(target)))
            try:
                make(temporary)
            except OSError as error:
                if error.errno in refusals:
                    return False
                raise
            former = ""
            try:
                former = put_in_place(self._ops, temporary, target)
            except FileNotFoundError:
                # A starting writer removed it: there is no lock on it.
                continue
            finally:
                # Replacing one name of a file by another name of it leaves both.
                if former != temporary:
                    unlink_quietly(self._ops, temporary)
            sync_directory(self._ops, self._directory)
            if former:
                remove_quietly(self._ops, former)
            return True
        raise removed_error(target)


async def _looked_up(look: Callable[[], T]) -> T:
    try:
        return await wrap(look)()
    except RuntimeError:
        # The executor may refuse while the interpreter shuts down. Looking twice does no harm.
        return look()


async def _to_the_end(clean_up: Callable[[], None]) -> None:
    try:
        with CancelScope(shield=True):
            await in_thread(clean_up)
    except BaseException:
        # A task that asyncio itself cancels is not shielded. What cleans up waits for itself, and does
        # nothing when it is called again.
        clean_up()
        raise
