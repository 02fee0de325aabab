"""A directory of any file system that fsspec knows: in its native async interface if it has one."""

from __future__ import annotations

import asyncio
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
from asyncckpt.stores.base import OpenFile, Store, StoredFile
from asyncckpt.stores.local_temporary import is_temporary, temporary_name
from asyncckpt.stores.remote_draft import StreamDraft
from asyncckpt.stores.remote_errors import told

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from asyncckpt.stores.base import Draft

logger = logging.getLogger("asyncckpt")

# A temporary object of another process has no lock to tell whether that lives: it is left alone this long.
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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._given!r})"

    def path_of(self, name: str) -> str:
        """Return the URL of `name`."""
        return f"{self._given}/{name}"

    async def prepare(self) -> None:
        """Make the directory, and remove what dead writers left; the second time nothing is asked."""
        if not self._prepared:
            with told("opening it", self._given):
                await self._prepare()
            self._prepared = True

    @asynccontextmanager
    async def draft(self, name: str, size: int) -> AsyncIterator[Draft]:
        """Open a draft of `size` bytes that will replace `name`; leaving drops what is not committed."""
        del size
        target = self._full(name)
        whole = not _WHOLE.isdisjoint(_protocols(self._fs))
        draft = StreamDraft(self._fs, target if whole else self._beside(name), target, rename)
        try:
            with told(f"writing {name}", self._given):
                await in_thread(draft.open)
            yield draft
        finally:
            await asyncio.shield(in_thread(draft.drop))
            self.changed()

    async def list(self) -> Sequence[StoredFile]:
        """Return the files of the directory that are not temporary."""
        with told("listing it", self._given):
            self._fs.invalidate_cache()
            try:
                entries = await self._call("ls", self._root, detail=True)
            except FileNotFoundError:
                return []
        files = [_stored(entry) for entry in entries if entry["type"] == "file"]
        return [file for file in files if file.name and not is_temporary(file.name)]

    async def stat(self, name: str) -> StoredFile:
        """Return one file, or raise FileNotFoundError."""
        path = self._full(name)
        with told(f"looking at {name}", self._given, absent_ok=True):
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
            yield RemoteFile(file, self.path_of(name), partial(self.read_range, name))
        except (AsyncCkptError, FileNotFoundError) as error:
            if (await self.stat(name)).version == file.version:
                raise
            replaced = "replaced while it was read"
            raise FileNotFoundError(errno.ENOENT, replaced, self.path_of(name)) from error

    async def read_range(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on of what has the name now."""
        target = into.cast("B")
        path = self._full(name)
        if not target:
            return
        with told(f"reading {name}", self._given, absent_ok=True):
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
        path = self._full(name)
        with told(f"removing {name}", self._given):
            try:
                entry = await self._call("info", path)
                if entry["type"] == "directory":
                    await self._call("rm", path, recursive=True)
                else:
                    await self._call("rm_file", path)
            except FileNotFoundError:
                return
            self.changed()

    async def copy(self, source: str, target: str) -> None:
        """Make `target` a copy of `source`, in the store."""
        paths = self._near(source), self._full(target)
        with told(f"copying {source} to {target}", self._given, absent_ok=True):
            if paths[0] == paths[1]:
                await self._call("info", paths[0])
            else:
                await self._copy(*paths)
                self.changed()

    async def link(self, source: str, target: str) -> None:
        """Make `target` a copy of `source`: object stores have no links."""
        await self.copy(source, target)

    def changed(self) -> None:
        """Have everybody in this process ask the store anew: listings are kept by each instance."""
        for fs in (self._fs, *list(getattr(type(self._fs), "_cache", {}).values())):
            fs.invalidate_cache()

    async def _prepare(self) -> None:
        await self._call("makedirs", self._root, exist_ok=True)
        for entry in await self._call("ls", self._root, detail=True):
            name = posixpath.basename(entry["name"])
            written = _modified(entry)
            if is_temporary(name) and written and time.time() - written > ABANDONED_AFTER:
                logger.info("removing %s, which a dead writer left", entry["name"])
                await self._call("rm_file", entry["name"])

    async def _copy(self, source: str, target: str) -> None:
        if not _WHOLE.isdisjoint(_protocols(self._fs)):
            await self._call("cp_file", source, target)
            return
        temporary = self._beside(posixpath.basename(target))
        await self._call("cp_file", source, temporary)
        await in_thread(rename, self._fs, temporary, target)

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the file system: on its own event loop if it has one, else on a thread."""
        if self._fs.async_impl:
            coroutine = getattr(self._fs, f"_{method}")(*args, **kwargs)
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._fs.loop))
        return await in_thread(partial(getattr(self._fs, method), *args, **kwargs))

    def _full(self, name: str) -> str:
        if name in {"", ".", ".."} or "/" in name or "\0" in name:
            raise StoreError(
                errno.EINVAL, f"{name!r} cannot be the name of a file; use one without slashes", self._given
            )
        return f"{self._root}/{name}"

    def _near(self, source: str) -> str:
        """Return the path of a file of this directory, or of one relative to it."""
        self._full(posixpath.basename(source) if not source.startswith("/") else source)
        return posixpath.normpath(f"{self._root}/{source}")

    def _beside(self, name: str) -> str:
        return f"{self._root}/{temporary_name(name)}"


class RemoteFile(OpenFile):
    """An open file of a remote directory."""

    def __init__(
        self, file: StoredFile, path: str, read: Callable[[int, memoryview], Awaitable[None]]
    ) -> None:
        self.file, self.path = file, path
        self._read = read

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on."""
        await self._read(offset, into)


def rename(fs: AbstractFileSystem, source: str, target: str) -> None:
    """Move a file over another: by the file system's own rename, or by a copy, which names no patterns."""
    if type(fs).mv is not AbstractFileSystem.mv:
        fs.mv(source, target)
        return
    fs.cp_file(source, target)
    fs.rm_file(source)


def _protocols(fs: AbstractFileSystem) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _stored(entry: dict[str, Any]) -> StoredFile:
    marks = [_text(entry[key]) for key in _VERSIONS if entry.get(key) is not None]
    return StoredFile(
        posixpath.basename(entry["name"]),
        entry["size"],
        "-".join((f"{entry['size']:x}", *marks)),
        _modified(entry),
    )


def _text(mark: Any) -> str:
    """Return the same text for a time as a date and as a number: file systems are of two minds."""
    return str(mark.timestamp() if hasattr(mark, "timestamp") else mark)


def _modified(entry: dict[str, Any]) -> float:
    """Return when a file was written, in seconds since the epoch; 0.0 if its file system does not tell."""
    for key in _TIMES:
        when: Any = entry.get(key)
        if isinstance(when, (int, float)):
            return when
        if hasattr(when, "timestamp"):
            return float(when.timestamp())
    return 0.0
