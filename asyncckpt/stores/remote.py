"""A directory of any file system that fsspec knows: in its native async interface if it has one."""

# ruff: noqa: D102 - methods without a docstring do what `Store`, `Draft` and `OpenFile` say

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import posixpath
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio import CancelScope

from asyncckpt._threads import for_each, in_thread
from asyncckpt.errors import AsyncCkptError, StoreError
from asyncckpt.stores.base import (
    FOLDER_MARK,
    OpenFile,
    Store,
    StoredFile,
    checked_name,
    checked_source,
)
from asyncckpt.stores.errors import remote_errors
from asyncckpt.stores.remote_draft import StreamDraft, rename
from asyncckpt.stores.remote_file import RemoteFile, modified, stored_file
from asyncckpt.stores.remote_folder import (
    REQUESTS,
    JoinedRemoteFolder,
    RemoteFolderDraft,
    copy_folder,
    remove_folder,
    undo,
)
from asyncckpt.stores.temporary import is_temporary, parse_temporary, temporary_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from fsspec.spec import AbstractFileSystem

    from asyncckpt.stores.base import Draft, FolderDraft

logger = logging.getLogger("asyncckpt")

# Temporary objects have no lock that shows whether their writer still runs: younger ones are not removed.
ABANDONED_AFTER = 24 * 60 * 60.0
# Object stores, where a file appears whole when it is closed, or not at all if it is discarded.
_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}


class RemoteStore(Store):
    """A directory of an fsspec file system.

    What no such store can promise: a link is a copy, made in the store. Where the file system has no rename
    of its own, a commit is a copy to the name, which is as atomic as that is.

    Args:
        fs: the file system.
        directory: its URL, as the user gave it.
        root: its path within `fs`.
    """

    def __init__(self, fs: AbstractFileSystem, directory: str, root: str) -> None:
        self._fs = fs
        self._given = directory.rstrip("/")
        self._root = root.rstrip("/")
        self._prepared = False
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self._whole = not _WHOLE.isdisjoint(protocols)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._given!r})"

    def path_of(self, name: str) -> str:
        return f"{self._given}/{name}"

    async def prepare(self) -> None:
        """Make the directory, and remove what crashed writers left; only the first call makes requests."""
        if not self._prepared:
            with remote_errors("opening it", self._given):
                await self._prepare()
            self._prepared = True

    @asynccontextmanager
    async def draft(self, name: str, size: int) -> AsyncIterator[Draft]:
        del size
        target = self._path(name)
        draft = StreamDraft(self._fs, target if self._whole else self._beside(name), target)
        try:
            with remote_errors(f"writing {name}", self._given):
                await in_thread(draft.open)
            yield draft
        finally:
            await asyncio.shield(in_thread(draft.drop))
            self.changed()

    async def list(self) -> Sequence[StoredFile]:
        """Return the files of the directory that are not temporary."""
        with remote_errors("listing it", self._given):
            self._fs.invalidate_cache()
            try:
                entries = await self.call_fs("ls", self._root, detail=True)
            except FileNotFoundError:
                return []
        files = [stored_file(entry) for entry in entries if entry["type"] == "file"]
        return [file for file in files if file.name and not is_temporary(file.name)]

    async def stat(self, name: str) -> StoredFile:
        path = self._path(name)
        with remote_errors(f"looking at {name}", self._given, absent_ok=True):
            self._fs.invalidate_cache()
            entry = await self.call_fs("info", path)
        if entry["type"] != "file" or is_temporary(name):
            raise FileNotFoundError(errno.ENOENT, "not a committed file", self.path_of(name))
        return stored_file(entry)

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[OpenFile]:
        """Open a file, or raise FileNotFoundError; also if it turns out to have been replaced.

        There is nothing to hold it by. What is read is checked against checksums that were read before, so a
        mixture of two files is an error, and then the store is asked what is there.
        """
        file = await self.stat(name)
        try:
            yield RemoteFile(self, file)
        except (AsyncCkptError, FileNotFoundError) as error:
            if (await self.stat(name)).version == file.version:
                raise
            replaced = "replaced while it was read"
            raise FileNotFoundError(errno.ENOENT, replaced, self.path_of(name)) from error

    async def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on of what has the name now."""
        target = into.cast("B")
        path = self._path(name)
        if not target:
            return
        with remote_errors(f"reading {name}", self._given, absent_ok=True):
            data = await self.call_fs("cat_file", path, start=offset, end=offset + len(target))
        if len(data) != len(target):
            raise StoreError(
                errno.ENODATA,
                f"{self.path_of(name)} ends within the {len(target)} bytes to be read from byte {offset}; it"
                " was cut short or replaced",
            )
        target[:] = data

    async def remove(self, name: str) -> None:
        """Remove a file, or a directory with all that is in it; or nothing."""
        path = self._path(name)
        with remote_errors(f"removing {name}", self._given), contextlib.suppress(FileNotFoundError):
            entry = await self.call_fs("info", path)
            if entry["type"] == "directory":
                await remove_folder(self, name)
            else:
                await self.call_fs("rm_file", path)
            self.changed()

    async def copy(self, source: str, target: str) -> None:
        """Make `target` a copy of `source`, in the store."""
        original, path = posixpath.normpath(f"{self._root}/{checked_source(source)}"), self._path(target)
        with remote_errors(f"copying {source} to {target}", self._given, absent_ok=True):
            if (await self.call_fs("info", original))["type"] == "directory":
                await copy_folder(type(self)(self._fs, self.path_of(source), original), self, target)
                return
            if original == path:
                return
            copied = path if self._whole else self._beside(target)
            await self.call_fs("cp_file", original, copied)
            if copied != path:
                await in_thread(rename, self._fs, copied, path)
            self.changed()

    async def list_folders(self) -> Sequence[StoredFile]:
        """Return the directories that have a mark; there is a request for each directory."""
        with remote_errors("listing it", self._given):
            self._fs.invalidate_cache()
            try:
                entries = await self.call_fs("ls", self._root, detail=True)
            except FileNotFoundError:
                return []
            paths = [entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory"]
            found: list[StoredFile] = []

            async def look(name: str) -> None:
                with contextlib.suppress(FileNotFoundError):
                    found.append(replace(await self.folder(name).stat(FOLDER_MARK), name=name))

            await for_each(look, map(posixpath.basename, paths), REQUESTS)
        return found

    def folder(self, name: str) -> RemoteStore:
        return type(self)(self._fs, self.path_of(checked_name(name)), self._path(name))

    @asynccontextmanager
    async def folder_draft(self, name: str) -> AsyncIterator[FolderDraft]:
        draft = RemoteFolderDraft(self, name)
        try:
            with remote_errors(f"making the folder {name}", self._given):
                await draft.open()
            yield draft
        finally:
            with CancelScope(shield=True):
                await draft.drop()

    @asynccontextmanager
    async def join_folder(self, name: str, attempt: str) -> AsyncIterator[FolderDraft]:
        joined = JoinedRemoteFolder(self, name, attempt)
        with remote_errors(f"joining the draft of {name}", self._given):
            await joined.look()
        try:
            yield joined
        finally:
            with CancelScope(shield=True):
                await joined.leave()

    async def make_folder(self, name: str) -> None:
        """Make the directory of a folder, where directories have to be made."""
        if not self._whole:
            await self.call_fs("makedirs", self._path(name), exist_ok=True)

    async def remove_empty(self, name: str) -> None:
        """Remove the directory of a folder if it is empty, where directories have to be made."""
        if not self._whole:
            with contextlib.suppress(OSError):
                await self.call_fs("rmdir", self._path(name))

    async def remove_files(self, names: Iterable[str]) -> None:
        """Remove files, many at once; those that do not exist are no error."""

        async def remove(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                await self.call_fs("rm_file", self._path(name))

        await for_each(remove, names, REQUESTS)
        self.changed()

    async def remove_directory(self, name: str) -> None:
        """Remove a directory with all that is in it."""
        await self.call_fs("rm", self._path(name), recursive=True)

    async def remove_file_beside(self, folder: str) -> None:
        """Remove the file that has the name of a folder, where both can be."""
        if self._whole:
            await self.remove_files([folder])

    async def read_all(self, name: str) -> bytes:
        """Return what a file holds; nothing if there is none."""
        with remote_errors(f"reading {name}", self._given):
            try:
                # With a start: without, s3fs asks for the size first, and lists the name if there is none.
                data: bytes = await self.call_fs("cat_file", self._path(name), start=0)
            except FileNotFoundError:
                return b""
        return data

    async def copy_to(self, other: RemoteStore, name: str) -> None:
        """Copy a file to another directory of the file system, not atomically."""
        await self.call_fs("cp_file", self._path(name), other._path(name))

    def changed(self) -> None:
        """Let every instance of the file system in this process list anew: each keeps its listings."""
        for fs in (self._fs, *list(getattr(type(self._fs), "_cache", {}).values())):
            fs.invalidate_cache()

    async def _prepare(self) -> None:
        await self.call_fs("makedirs", self._root, exist_ok=True)
        await self._remove_abandoned()

    async def _remove_abandoned(self) -> None:
        """Remove the temporary files of crashed writers, and the files of folders that these tell of."""
        try:
            entries = await self.call_fs("ls", self._root, detail=True)
        except FileNotFoundError:
            return
        for entry in entries:
            name, written = posixpath.basename(entry["name"]), modified(entry)
            temporary = parse_temporary(name)
            if temporary is None or not written or time.time() - written <= ABANDONED_AFTER:
                continue
            logger.info("removing %s, which a crashed writer left", entry["name"])
            try:
                with remote_errors(f"removing {name}", self._given):
                    await (undo(self, name) if temporary.kind == "folder" else self.remove_files([name]))
            except StoreError as error:
                logger.warning("what a crashed writer left is still there: %s", error)

    async def call_fs(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the file system: on its own event loop if it has one, else on a thread."""
        if self._fs.async_impl:
            coroutine = getattr(self._fs, f"_{method}")(*args, **kwargs)
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._fs.loop))
        return await in_thread(partial(getattr(self._fs, method), *args, **kwargs))

    def _path(self, name: str) -> str:
        return f"{self._root}/{checked_name(name)}"

    def _beside(self, name: str) -> str:
        return f"{self._root}/{temporary_name(name)}"
