"""Whole reads and writes of one piece, past the page cache where that works."""

# ruff: noqa: PTH120 - paths stay the str that the user gave

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar

from asyncckpt.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def read_direct(ops: FileOps, path: str, into: memoryview, offset: int) -> int:
    """Read past the page cache; returns how many bytes came, fewer where it is refused or the file ends."""
    fd = open_direct(ops, path, os.O_RDONLY)
    if fd is None:
        return 0
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
    finally:
        ops.close(fd)
    return done


@contextmanager
def translated(doing: str, path: str, *, absent_ok: bool = False) -> Iterator[None]:
    """Turn an OSError into a StoreError that says what was done, where, and what to do about it.

    Args:
        doing: what the operation does, to be read after "while".
        path: the file it does it to.
        absent_ok: let FileNotFoundError pass as it is: the file is one that the caller named.
    """
    try:
        yield
    except StoreError:
        raise
    except FileNotFoundError as error:
        if absent_ok:
            raise
        raise _store_error(error, doing, path) from error
    except OSError as error:
        raise _store_error(error, doing, path) from error


def size_text(nbytes: int) -> str:
    """Return a size for people: 1.5 GB."""
    for limit, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= limit:
            return f"{nbytes / limit:.1f} {unit}"
    return f"{nbytes} bytes"


_CAUSES: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("no space left on the disk that holds {}", "free space or choose another directory"),
    errno.EDQUOT: ("the disk quota for {} is used up", "free space or choose another directory"),
    errno.EFBIG: (
        "the file is larger than {} may hold",
        "raise the limit (ulimit -f) or use a file system for large files",
    ),
    errno.EACCES: ("no permission in {}", "check its owner and mode, or choose another directory"),
    errno.EPERM: ("no permission in {}", "check its owner and mode, or choose another directory"),
    errno.EROFS: ("{} is on a read-only file system", "mount it for writing or choose another directory"),
    errno.EMFILE: ("too many open files in this process", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many open files on this machine", "raise the limit (sysctl fs.file-max)"),
    errno.ENAMETOOLONG: ("the name is too long for {}", "use a shorter one"),
    errno.ENOENT: ("something in {} was removed meanwhile", "keep other programs out of it"),
    errno.EISDIR: ("a directory stands in the way in {}", "remove it or use another name"),
    errno.ENOTDIR: ("a part of {} is a file, not a directory", "choose another directory"),
    errno.EIO: ("the device that holds {} failed", "check it (dmesg), or choose another directory"),
}


def _store_error(error: OSError, doing: str, path: str) -> StoreError:
    code = error.errno or errno.EIO
    unknown = (f"{error.strerror or error} in {{}}", "check the disk and its mount")
    cause, advice = _CAUSES.get(code, unknown)
    return StoreError(code, f"{cause.format(os.path.dirname(path))} while {doing}; {advice}", path)


def _address(data: memoryview) -> int:
    address: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    return address
