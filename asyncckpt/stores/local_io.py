"""Whole reads and writes of one piece, past the page cache where that works."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar

if TYPE_CHECKING:
    from asyncckpt.stores.fileops import FileOps

PAGE = 4096
"""What O_DIRECT wants address, offset and length to be multiples of."""

DIRECT_FROM = 1 << 20
"""Size in bytes below which the page cache is the faster way."""

BULK_THREADS = 4
"""How many pieces are under way at once: so many keep a fast device busy."""

_limiter: RunVar[CapacityLimiter] = RunVar("asyncckpt.stores.local")

_REFUSED = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


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
        if error.errno not in _REFUSED:
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


def write_buffered(ops: FileOps, fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` through the page cache."""
    done = 0
    while done < len(data):
        count = ops.pwrite(fd, data[done:], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the system takes no more bytes and names no error")
        done += count


def write_direct(ops: FileOps, fd: int, data: memoryview, offset: int) -> tuple[int, bool]:
    """Write what can be written past the page cache.

    Returns:
        How many bytes were taken, and whether the descriptor was refused: a file system may open
        with O_DIRECT and still not write so.
    """
    done = 0
    while done < len(data) and done % PAGE == 0:
        try:
            count = ops.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            return done, True
        if count == 0:
            break
        done += count
    return done, False


def read_buffered(ops: FileOps, fd: int, into: memoryview, offset: int) -> int:
    """Read through the page cache until `into` is full or the file ends; returns how many bytes came."""
    done = 0
    while done < len(into):
        count = ops.preadv(fd, into[done:], offset + done)
        if count == 0:
            break
        done += count
    return done


def read_direct(ops: FileOps, fd: int, into: memoryview, offset: int) -> int:
    """Read past the page cache; returns how many bytes came, fewer where it is refused or the file ends."""
    done = 0
    try:
        while done < len(into) and done % PAGE == 0:
            count = ops.preadv(fd, into[done:], offset + done)
            if count == 0:
                break
            done += count
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    return done


def _address(data: memoryview) -> int:
    address: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    return address
