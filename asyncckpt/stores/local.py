"""The store on a local path: one directory of files, each of them whole or not there."""

# ruff: noqa: PTH100, PTH118, PTH119, PTH120 - paths stay the str that the user gave

from __future__ import annotations

import errno
import mmap
import os
import stat as modes
import sys
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from aiofiles.os import wrap
from anyio import CancelScope

from asyncckpt._threads import in_thread
from asyncckpt.errors import StoreError
from asyncckpt.stores.base import Store, StoredFile
from asyncckpt.stores.fileops import FileOps
from asyncckpt.stores.local_draft import DraftFile, LocalDraft, sync_directory
from asyncckpt.stores.local_errors import translated
from asyncckpt.stores.local_io import read_buffered
from asyncckpt.stores.local_reading import LocalFile, ReadFile
from asyncckpt.stores.local_temporary import is_temporary, remove_abandoned, temporary_name, unlink_quietly

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from asyncckpt.stores.base import Draft, OpenFile

T = TypeVar("T")

_ATTEMPTS = 16
_LISTINGS = 100
_NAME_MAX = 255
_NO_LINK = frozenset({errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES})
_NO_SYMLINK = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES})


class _VanishedError(Exception):
    """A file was removed while the directory was listed."""


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
        """Make the directory and its parents, durably, and remove the drafts of dead writers."""
        await in_thread(self._prepare)

    @asynccontextmanager
    async def draft(self, name: str, size: int) -> AsyncIterator[Draft]:
        """Open a draft of `size` bytes that will replace `name`; leaving drops what is not committed."""
        self._full(name)
        file = DraftFile(self._ops, self._directory, name, size)
        try:
            await in_thread(file.open)
            yield LocalDraft(file)
        finally:
            await _to_the_end(file.drop)

    async def list(self) -> Sequence[StoredFile]:
        """Return the regular files of the directory that are not drafts; links are not followed."""
        with translated("listing it", os.path.join(self._directory, "")):
            return await _looked_up(self._list)

    async def stat(self, name: str) -> StoredFile:
        """Return the file that `name` leads to, or raise FileNotFoundError."""
        path = self._full(name)
        with translated(f"looking at {name}", path, absent_ok=True):
            return await _looked_up(self._stat, name, path)

    async def exists(self) -> bool:
        """Return whether the directory exists."""
        with translated("looking for it", os.path.join(self._directory, "")):
            return await _looked_up(partial(_is_directory, self._ops), self._directory)

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[OpenFile]:
        """Open the file that `name` leads to, or raise FileNotFoundError."""
        path = self._full(name)
        reading = ReadFile(self._ops, path)
        try:
            with translated(f"reading {name}", path, absent_ok=True):
                status = await _looked_up(reading.open)
                if is_temporary(name) or not modes.S_ISREG(status.st_mode):
                    raise FileNotFoundError(errno.ENOENT, "not a committed file", path)
            yield LocalFile(_stored(name, status), self.path_of(name), reading)
        finally:
            reading.close()

    async def remove(self, name: str) -> None:
        """Remove a file, a link, or a directory with all that is in it, durably; or nothing."""
        path = self._full(name)
        with translated(f"removing {name}", path):
            await in_thread(self._remove, path)

    async def copy(self, source: str, target: str) -> None:
        """Make `target` a second name for the bytes of `source`: a hard link, or a copy if need be."""
        paths = self._near(source), self._full(target)
        with translated(f"copying {source} to {target}", paths[1], absent_ok=True):
            await in_thread(self._copy, *paths)

    async def link(self, source: str, target: str) -> None:
        """Make `target` a relative symbolic link to `source`, or a copy where links are refused."""
        paths = self._near(source), self._full(target)
        with translated(f"linking {target} to {source}", paths[1], absent_ok=True):
            await in_thread(self._link, *paths)

    def _full(self, name: str) -> str:
        if name in {"", ".", ".."} or "/" in name or "\0" in name or len(os.fsencode(name)) > _NAME_MAX:
            raise StoreError(
                errno.EINVAL,
                f"{name!r} cannot be the name of a file; use one of 1 to {_NAME_MAX} bytes without slashes",
            )
        return os.path.join(self._directory, name)

    def _near(self, source: str) -> str:
        """Return the path of a file of this directory, or of one relative to it."""
        directory, _, name = source.rpartition("/")
        self._full(source if source.startswith("/") else name)
        return os.path.join(self._directory, directory, name)

    def _prepare(self) -> None:
        with translated("making the directory", os.path.join(self._directory, "")):
            self._make_directory(self._directory)
            remove_abandoned(self._ops, self._directory)

    def _make_directory(self, path: str) -> None:
        if _is_directory(self._ops, path):
            return
        parent = os.path.dirname(path)
        self._make_directory(parent)
        try:
            self._ops.mkdir(path)
        except FileExistsError:
            # Made meanwhile by another process, which may die before it syncs the parent.
            if not _is_directory(self._ops, path):
                raise
        sync_directory(self._ops, parent)

    def _list(self) -> Sequence[StoredFile]:
        for _ in range(_LISTINGS):
            with suppress(_VanishedError):
                return self._list_once()
        raise StoreError(
            errno.EAGAIN,
            f"files of {self._directory} were removed during each of {_LISTINGS} attempts to list it",
            self._directory,
        )

    def _list_once(self) -> Sequence[StoredFile]:
        try:
            entries = self._ops.scandir(self._directory)
        except FileNotFoundError:
            return []
        found = []
        for entry in entries:
            if is_temporary(entry.name):
                continue
            try:
                status = self._ops.lstat(entry.path)
            except FileNotFoundError:
                # What took its place may have come too late to be seen.
                raise _VanishedError from None
            if modes.S_ISREG(status.st_mode):
                found.append(_stored(entry.name, status))
        return found

    def _stat(self, name: str, path: str) -> StoredFile:
        status = self._ops.stat(path)
        if is_temporary(name) or not modes.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a committed file", path)
        return _stored(name, status)

    def _remove(self, path: str) -> None:
        try:
            self._ops.unlink(path)
        except FileNotFoundError:
            return
        except OSError:
            if not modes.S_ISDIR(self._ops.lstat(path).st_mode):
                raise
            self._ops.rmtree(path)
        sync_directory(self._ops, self._directory)

    def _copy(self, source: str, target: str) -> None:
        # Two names of a link would be one file, so it is the file itself that gets the second name.
        source = os.path.realpath(source)
        try:
            self._place(lambda temporary: self._ops.link(source, temporary), target)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            self._copy_bytes(source, target)

    def _copy_bytes(self, source: str, target: str) -> None:
        fd = self._ops.open(source, os.O_RDONLY)
        try:
            size = self._ops.fstat(fd).st_size
            file = DraftFile(self._ops, self._directory, os.path.basename(target), size)
            try:
                file.open()
                if not file.clone(fd):
                    self._copy_pieces(fd, file, size)
                file.commit()
            finally:
                file.drop()
        finally:
            self._ops.close(fd)

    def _copy_pieces(self, source: int, file: DraftFile, size: int) -> None:
        # Anonymous memory begins on a page, so that the pieces can go past the page cache.
        memory = memoryview(mmap.mmap(-1, LocalDraft.chunk))
        for offset in range(0, size, LocalDraft.chunk):
            piece = memory[: min(LocalDraft.chunk, size - offset)]
            count = read_buffered(self._ops, source, piece, offset)
            file.write(offset, piece[:count])

    def _link(self, source: str, target: str) -> None:
        found = os.path.realpath(source)
        self._ops.stat(found)
        if found == os.path.join(os.path.realpath(self._directory), os.path.basename(target)):
            return
        text = os.path.relpath(found, os.path.realpath(self._directory))
        try:
            self._place(lambda temporary: self._ops.symlink(text, temporary), target)
        except OSError as error:
            if error.errno not in _NO_SYMLINK:
                raise
            self._copy(source, target)

    def _place(self, make: Callable[[str], None], target: str) -> None:
        """Make something under a temporary name, move it to `target`, and sync the directory."""
        for _ in range(_ATTEMPTS):
            temporary = os.path.join(self._directory, temporary_name(os.path.basename(target)))
            make(temporary)
            try:
                self._replace(temporary, target)
            except FileNotFoundError:
                # A cleaner took it: there is no lock on it.
                continue
            finally:
                # Replacing one name of a file by another name of it leaves both.
                unlink_quietly(self._ops, temporary)
            sync_directory(self._ops, self._directory)
            return
        raise StoreError(
            errno.EAGAIN,
            f"every temporary file made in {self._directory} was removed at once by another program; "
            "keep other programs out of it",
            target,
        )

    def _replace(self, temporary: str, target: str) -> None:
        try:
            self._ops.replace(temporary, target)
        except IsADirectoryError:
            self._ops.rmtree(target)
            self._ops.replace(temporary, target)


async def _looked_up(look: Callable[..., T], *args: str) -> T:
    try:
        return await wrap(look)(*args)
    except RuntimeError:
        # The executor may refuse while the interpreter shuts down. Looking twice does no harm.
        return look(*args)


async def _to_the_end(clean_up: Callable[[], None]) -> None:
    try:
        with CancelScope(shield=True):
            await in_thread(clean_up)
    except BaseException:
        # A task that asyncio itself cancels is not shielded. What cleans up waits for itself, and does
        # nothing when it is called again.
        clean_up()
        raise


def _is_directory(ops: FileOps, path: str) -> bool:
    try:
        status = ops.stat(path)
    except FileNotFoundError:
        return False
    if not modes.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    return True


def _stored(name: str, status: os.stat_result) -> StoredFile:
    version = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
    return StoredFile(name, status.st_size, version, status.st_mtime)
