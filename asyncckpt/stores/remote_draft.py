"""One file in the making in a remote directory: a stream that becomes a file when it is committed."""

# ruff: noqa: D102 - methods without a docstring do what `Draft` says

from __future__ import annotations

import contextlib
import errno
import time
from typing import Any

from fsspec.spec import AbstractFileSystem

from asyncckpt._threads import in_thread
from asyncckpt.errors import StoreError
from asyncckpt.stores.base import Draft
from asyncckpt.stores.errors import remote_errors


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
            rename(self._fs, self._path, self._target)
        self._committed = True


def rename(fs: AbstractFileSystem, source: str, target: str) -> None:
    """Move a file over another: by the file system's own rename, or by a copy, which names no patterns."""
    if type(fs).mv is not AbstractFileSystem.mv:
        fs.mv(source, target)
        return
    fs.cp_file(source, target)
    fs.rm_file(source)
