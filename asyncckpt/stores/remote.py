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
from functools import partial
from typing import TYPE_CHECKING, Any

from fsspec.spec import AbstractFileSystem

from asyncckpt._threads import in_thread
from asyncckpt.errors import AsyncCkptError, StoreError
from asyncckpt.stores.base import Draft, OpenFile, Store, StoredFile, checked_name, checked_source
from asyncckpt.stores.errors import remote_errors
from asyncckpt.stores.temporary import is_temporary, temporary_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

logger = logging.getLogger("asyncckpt")

# Temporary objects have no lock that shows whether their writer still runs: younger ones are not removed.
ABANDONED_AFTER = 24 * 60 * 60.0
# What tells one content of a name from the next, by what file systems call it.
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", *_TIMES)
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
                entries = await self._call("ls", self._root, detail=True)
            except FileNotFoundError:
                return []
        files = [_stored(entry) for entry in entries if entry["type"] == "file"]
        return [file for file in files if file.name and not is_temporary(file.name)]

    async def stat(self, name: str) -> StoredFile:
        path = self._path(name)
        with remote_errors(f"looking at {name}", self._given, absent_ok=True):
            self._fs.invalidate_cache()
            entry = await self._call("info", path)
        if entry["type"] != "file" or is_temporary(name):
            raise FileNotFoundError(errno.ENOENT, "not a committed file", self.path_of(name))
        return _stored(entry)

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
            data = await self._call("cat_file", path, start=offset, end=offset + len(target))
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
            entry = await self._call("info", path)
            if entry["type"] == "directory":
                await self._call("rm", path, recursive=True)
            else:
                await self._call("rm_file", path)
            self.changed()

    async def copy(self, source: str, target: str) -> None:
        """Make `target` a copy of `source`, in the store."""
        original, path = posixpath.normpath(f"{self._root}/{checked_source(source)}"), self._path(target)
        with remote_errors(f"copying {source} to {target}", self._given, absent_ok=True):
            if original == path:
                await self._call("info", path)
                return
            copied = path if self._whole else self._beside(target)
            await self._call("cp_file", original, copied)
            if copied != path:
                await in_thread(_rename, self._fs, copied, path)
            self.changed()

    def changed(self) -> None:
        """Let every instance of the file system in this process list anew: each keeps its listings."""
        for fs in (self._fs, *list(getattr(type(self._fs), "_cache", {}).values())):
            fs.invalidate_cache()

    async def _prepare(self) -> None:
        await self._call("makedirs", self._root, exist_ok=True)
        for entry in await self._call("ls", self._root, detail=True):
            name = posixpath.basename(entry["name"])
            written = _modified(entry)
            if is_temporary(name) and written and time.time() - written > ABANDONED_AFTER:
                logger.info("removing %s, which a crashed writer left", entry["name"])
                await self._call("rm_file", entry["name"])

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the file system: on its own event loop if it has one, else on a thread."""
        if self._fs.async_impl:
            coroutine = getattr(self._fs, f"_{method}")(*args, **kwargs)
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._fs.loop))
        return await in_thread(partial(getattr(self._fs, method), *args, **kwargs))

    def _path(self, name: str) -> str:
        return f"{self._root}/{checked_name(name)}"

    def _beside(self, name: str) -> str:
        return f"{self._root}/{temporary_name(name)}"


class RemoteFile(OpenFile):
    """An open file of a remote directory."""

    def __init__(self, store: RemoteStore, file: StoredFile) -> None:
        self.file = file
        self.path = store.path_of(file.name)
        self._store = store

    async def read(self, offset: int, into: memoryview) -> None:
        await self._store.read(self.file.name, offset, into)


class StreamDraft(Draft):
    """A stream into a file that becomes the target at the commit.

    Args:
        fs: the file system.
        path: what is written. It is the target itself where a file appears only when it is closed; anywhere
            else it is a temporary name, since leaving a file open by an error would publish a piece of it.
        target: what it is to become.
    """

    def __init__(self, fs: AbstractFileSystem, path: str, target: str) -> None:
        self._fs = fs
        self._path = path
        self._target = target
        self._file: Any = None
        self._written = 0
        self._committed = False

    def open(self) -> None:
        """Open the stream."""
        self._file = self._fs.open(self._path, "wb")

    async def write(self, offset: int, data: memoryview) -> None:
        if offset != self._written:
            raise StoreError(errno.ESPIPE, f"byte {offset} cannot be written before byte {self._written}")
        self._written += len(data)
        with remote_errors(f"writing from byte {offset}", self._target):
            await in_thread(self._write, data)

    async def commit(self) -> None:
        """Close the stream, see that all has arrived, and give it its name."""
        began = time.perf_counter()
        with remote_errors("committing it", self._target):
            await in_thread(self._commit)
        self.sync_seconds = time.perf_counter() - began

    def drop(self) -> None:
        """Leave nothing behind of what is not committed."""
        if self._committed or self._file is None:
            return
        file, self._file = self._file, None
        if self._path == self._target:
            file.discard()
            file.closed = True  # closing it, as its finalizer does, would publish it
            return
        with contextlib.suppress(Exception):
            file.close()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path)

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) or len(data) :]

    def _commit(self) -> None:
        self._file.close()
        self._fs.invalidate_cache()
        arrived = self._fs.info(self._path)["size"]
        if arrived != self._written:
            raise StoreError(
                errno.EIO, f"{arrived} of {self._written} bytes have arrived at {self._path}; save again"
            )
        if self._path != self._target:
            _rename(self._fs, self._path, self._target)
        self._committed = True


def _rename(fs: AbstractFileSystem, source: str, target: str) -> None:
    """Move a file over another: by the file system's own rename, or by a copy, which names no patterns."""
    if type(fs).mv is not AbstractFileSystem.mv:
        fs.mv(source, target)
        return
    fs.cp_file(source, target)
    fs.rm_file(source)


def _stored(entry: dict[str, Any]) -> StoredFile:
    marks = [str(_number(entry[key])) for key in _VERSIONS if entry.get(key) is not None]
    version = "-".join((f"{entry['size']:x}", *marks))
    return StoredFile(posixpath.basename(entry["name"]), entry["size"], version, _modified(entry))


def _modified(entry: dict[str, Any]) -> float:
    """Return when a file was written, in seconds since the epoch; 0.0 if its file system does not say."""
    times = (_number(entry.get(key)) for key in _TIMES)
    return next((float(time) for time in times if isinstance(time, (int, float))), 0.0)


def _number(mark: Any) -> Any:
    """Return times as numbers: backends return datetimes or floats."""
    return mark.timestamp() if hasattr(mark, "timestamp") else mark
