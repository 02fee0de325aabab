"""Positional reads and writes of local files, past the page cache where that works."""

from __future__ import annotations

import errno
import os
import stat as modes
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from anyio import CapacityLimiter
from anyio.lowlevel import RunVar

from asyncckpt._threads import in_thread
from asyncckpt.errors import StoreError
from asyncckpt.stores.base import OpenFile, StoredFile
from asyncckpt.stores.errors import local_errors
from asyncckpt.stores.temporary import close_quietly, is_temporary

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt.stores.fileops import FileOps

PAGE = 4096
"""What O_DIRECT wants address, offset and length to be multiples of."""

DIRECT_FROM = 1 << 20
"""Size in bytes below which the page cache is the faster way."""

BULK_THREADS = 4
"""How many pieces are under way at once: so many keep a fast device busy."""

REFUSED = frozenset({errno.EINVAL, errno.EOPNOTSUPP})
"""How file systems refuse O_DIRECT, when a file is opened or when it is first written to."""

_limiter: RunVar[CapacityLimiter] = RunVar("asyncckpt.stores.local")


def bulk_limiter() -> CapacityLimiter:
    """Return the limiter of bulk reads and writes, one for all stores of an event loop."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = CapacityLimiter(BULK_THREADS)
        _limiter.set(limiter)
        return limiter


def open_direct(ops: FileOps, path: str, flags: int) -> int | None:
    """Open a file past the page cache, or return None where that is refused."""
    try:
        return ops.open_direct(path, flags)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return None


def direct_range(data: memoryview, offset: int) -> tuple[int, int]:
    """Return the part of a piece that can go past the page cache, as (start, stop) within it.

    These are the whole pages of the file in it, if they are whole pages of memory too; otherwise
    the range is empty.
    """
    start = -offset % PAGE
    length = (len(data) - start) // PAGE * PAGE
    if length <= 0 or (_address(data) + start) % PAGE:
        return 0, 0
    return start, start + length


def write_at(ops: FileOps, fd: int, data: memoryview, offset: int, unit: int = 1) -> int:
    """Write `data`, or as much of it until that ends within a unit; returns how many bytes were taken."""
    done = 0
    while done < len(data) and done % unit == 0:
        count = ops.pwrite(fd, data[done:], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the system takes no more bytes and names no error")
        done += count
    return done


def read_at(ops: FileOps, fd: int, into: memoryview, offset: int, unit: int = 1) -> int:
    """Fill `into` until the file ends, or what was read ends within a unit; returns how many bytes came."""
    done = 0
    while done < len(into) and done % unit == 0:
        count = ops.preadv(fd, into[done:], offset + done)
        if count == 0:
            break
        done += count
    return done


def committed_file(name: str, path: str, status: os.stat_result) -> StoredFile:
    """Return what a listing shows of a file; raises FileNotFoundError if it is not a committed one."""
    if is_temporary(name) or not modes.S_ISREG(status.st_mode):
        raise FileNotFoundError(errno.ENOENT, "not a committed file", path)
    version = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
    return StoredFile(name, status.st_size, version, status.st_mtime)


class LocalFile(OpenFile):
    """A file of a local directory, opened once, so that all that is read is of one file.

    Args:
        ops: the file operations.
        name: of the file.
        path: where it is.
        shown: its path as the user gave it.
    """

    # With as many larger pieces as a device takes at once, these end together, and it pauses until the next
    # ones are asked for.
    chunk = 8 << 20

    def __init__(self, ops: FileOps, name: str, path: str, shown: str) -> None:
        self.path = shown
        self._ops = ops
        self._name = name
        self._path = path
        # Guards everything below. It is free while pieces are read.
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._reads_running = 0
        self._closed = False

    def open(self) -> None:
        """Open the file; blocks."""
        with self._lock:
            if self._closed:  # its task was cancelled meanwhile
                raise StoreError(errno.EBADF, f"{self._path} was closed while it was opened", self._path)
            self._fd = self._ops.open(self._path, os.O_RDONLY)
            self.file = committed_file(self._name, self._path, self._ops.fstat(self._fd))

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on, past the page cache for large aligned ranges."""
        await in_thread(self._read, offset, into.cast("B"), limiter=bulk_limiter())

    def blocking_reader(self) -> Callable[[int, memoryview], None]:
        """Return what reads a range on the thread that calls it."""
        return self._read

    def close(self) -> None:
        """Close the file; a read that a cancelled task has left behind closes it at its end."""
        with self._lock:
            self._closed = True
            self._close_if_done()

    def _read(self, offset: int, into: memoryview) -> None:
        with self._lock:
            if self._closed or self._fd is None:
                raise StoreError(errno.EBADF, f"{self._path} was closed while it was read", self._path)
            fd = self._fd
            self._reads_running += 1
        try:
            with local_errors(f"reading {self._name}", self._path):
                done = self._read_direct(fd, offset, into)
                done += read_at(self._ops, fd, into[done:], offset + done)
            if done < len(into):
                raise StoreError(
                    errno.ENODATA,
                    f"{self._path} ends at byte {self._ops.fstat(fd).st_size}, within the {len(into)} bytes"
                    f" to be read from byte {offset}; it was cut short",
                    self._path,
                )
        finally:
            with self._lock:
                self._reads_running -= 1
                self._close_if_done()

    def _read_direct(self, fd: int, offset: int, into: memoryview) -> int:
        """Read whole pages past the page cache; returns how many bytes came, 0 where that is refused."""
        large = len(into) >= DIRECT_FROM and offset % PAGE == 0
        _, stop = direct_range(into, offset) if large else (0, 0)
        if not stop:
            return 0
        # Through the descriptor: another file may have taken the name since it was opened.
        with suppress(FileNotFoundError):  # where /proc is not mounted
            direct = open_direct(self._ops, f"/proc/self/fd/{fd}", os.O_RDONLY)
            if direct is not None:
                try:
                    return read_at(self._ops, direct, into[:stop], offset, PAGE)
                except OSError as error:
                    if error.errno not in REFUSED:
                        raise
                finally:
                    close_quietly(self._ops, direct)
        return 0

    def _close_if_done(self) -> None:
        if self._closed and not self._reads_running and self._fd is not None:
            fd, self._fd = self._fd, None
            close_quietly(self._ops, fd)


def _address(data: memoryview) -> int:
    import numpy as np  # noqa: PLC0415 - a listing does without it

    address: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    return address
