"""A local file that is read: opened once, so that all that is read is of one file."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from typing import TYPE_CHECKING

from asyncckpt._threads import in_thread
from asyncckpt.errors import StoreError
from asyncckpt.stores.base import OpenFile
from asyncckpt.stores.local_errors import translated
from asyncckpt.stores.local_io import (
    DIRECT_FROM,
    bulk_limiter,
    direct_range,
    open_direct,
    read_buffered,
    read_direct,
)
from asyncckpt.stores.local_temporary import close_quietly

if TYPE_CHECKING:
    from asyncckpt.stores.base import StoredFile
    from asyncckpt.stores.fileops import FileOps


class ReadFile:
    """The synchronous half of an open file; its methods run in worker threads, `read` in several at once."""

    def __init__(self, ops: FileOps, path: str) -> None:
        self._ops = ops
        self._path = path
        # Guards everything below. It is free while pieces are read.
        self._lock = threading.Lock()
        self._fds: list[int] = []
        self._direct_fd: int | None = None
        self._direct_tried = False
        self._reads_running = 0
        self._closed = False

    def open(self) -> os.stat_result:
        """Open the file; returns its status."""
        with self._lock:
            self._fds.append(self._ops.open(self._path, os.O_RDONLY))
            return self._ops.fstat(self._fds[0])

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on, past the page cache for large aligned ranges."""
        with self._lock:
            if self._closed:
                raise StoreError(errno.EBADF, f"{self._path} was closed while it was read", self._path)
            self._reads_running += 1
        try:
            self._read(offset, into)
        finally:
            with self._lock:
                self._reads_running -= 1
                self._release_if_done()

    def close(self) -> None:
        """Close the file; a read that a cancelled task has left behind closes it at its end."""
        with self._lock:
            self._closed = True
            self._release_if_done()

    def _read(self, offset: int, into: memoryview) -> None:
        done = 0
        if len(into) >= DIRECT_FROM and offset % mmap.PAGESIZE == 0:
            direct_fd = self._direct()
            if direct_fd is not None:
                done = read_direct(self._ops, direct_fd, into[slice(*direct_range(into, offset))], offset)
        if done == len(into):
            return
        done += read_buffered(self._ops, self._fds[0], into[done:], offset + done)
        if done < len(into):
            size = self._ops.fstat(self._fds[0]).st_size
            raise StoreError(
                errno.ENODATA,
                f"{self._path} ends at byte {size}, within the {len(into)} bytes to be read from byte"
                f" {offset}; it was cut short",
                self._path,
            )

    def _direct(self) -> int | None:
        """Return a descriptor of the same file past the page cache, if there can be one."""
        with self._lock:
            if not self._direct_tried:
                self._direct_tried = True
                self._direct_fd = self._open_direct()
            return self._direct_fd

    def _open_direct(self) -> int | None:
        try:
            fd = open_direct(self._ops, self._path, os.O_RDONLY)
        except FileNotFoundError:  # removed since it was opened
            return None
        if fd is None:
            return None
        self._fds.append(fd)
        # Another file may have taken the name since it was opened.
        return fd if os.path.samestat(*map(self._ops.fstat, (self._fds[0], fd))) else None

    def _release_if_done(self) -> None:
        while self._closed and not self._reads_running and self._fds:
            close_quietly(self._ops, self._fds.pop())


class LocalFile(OpenFile):
    """An open file of a local directory."""

    def __init__(self, file: StoredFile, path: str, reading: ReadFile) -> None:
        self.file, self.path = file, path
        self._reading = reading

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on, past the page cache for large aligned ranges."""
        with translated(f"reading {self.file.name}", self.path):
            await in_thread(self._reading.read, offset, into.cast("B"), limiter=bulk_limiter())
