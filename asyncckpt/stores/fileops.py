"""The seam between the local store and the operating system.

Every file operation that durability depends on goes through a `FileOps`. A test subclasses it to
record the order of the calls, or to make one of them fail. The methods are thin: what to do about
short results and errors is decided by their callers.
"""

# ruff: noqa: PTH102, PTH105, PTH108, PTH116, PTH211 - this is the place where `os` is called

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from functools import cache
from typing import TYPE_CHECKING

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_O_DIRECT: int = getattr(os, "O_DIRECT", 0)
_STATFS_BYTES = 512  # more than the struct has on any platform


class FileOps:
    """The operations of the operating system, one method each.

    Every method raises OSError as `os` does. Descriptors are never inherited by other programs,
    and new files get their mode from the umask alone.
    """

    def open(self, path: str, flags: int) -> int:
        """Open a file through the page cache."""
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def open_direct(self, path: str, flags: int) -> int:
        """Open a file past the page cache; EINVAL where the system or the file system cannot."""
        if not _O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return os.open(path, flags | _O_DIRECT | os.O_CLOEXEC, 0o666)

    def open_directory(self, path: str) -> int:
        """Open a directory in order to sync it."""
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        """Close a descriptor; it is gone even if this raises."""
        os.close(fd)

    def flock(self, fd: int) -> None:
        """Lock a file for this open descriptor alone; BlockingIOError if another one holds it."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def lockf(self, fd: int) -> None:
        """Take the POSIX lock of a file for this process; BlockingIOError if another one holds it."""
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def fstatfs(self, fd: int) -> int:
        """Return the type of the file system of an open file, `f_type` of statfs(2); ENOSYS off Linux."""
        buffer = ctypes.create_string_buffer(_STATFS_BYTES)
        if _fstatfs_call()(fd, buffer) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        # The first member: an int or a long, of which every type uses 32 bits.
        return int.from_bytes(buffer.raw[:4], "little")

    def fallocate(self, fd: int, size: int) -> None:
        """Reserve the space of a file and set its size; EOPNOTSUPP or ENOSYS where that is unknown."""
        call = _fallocate_call()
        while call(fd, 0, 0, size) != 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))

    def ftruncate(self, fd: int, size: int) -> None:
        """Set the size of a file without reserving space."""
        os.ftruncate(fd, size)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """Write at an offset; returns how many bytes were taken, which may be fewer."""
        return os.pwrite(fd, data, offset)

    def preadv(self, fd: int, into: memoryview, offset: int) -> int:
        """Read from an offset; returns how many bytes came, which may be fewer, and 0 at the end."""
        return os.preadv(fd, [into], offset)

    def fsync(self, fd: int) -> None:
        """Make the bytes of a file durable, through the cache of the device."""
        _sync(fd)

    def fsync_directory(self, fd: int) -> None:
        """Make the entries of a directory durable."""
        _sync(fd)

    def stat(self, path: str) -> os.stat_result:
        """Return what a path leads to, through symbolic links."""
        return os.stat(path)

    def lstat(self, path: str) -> os.stat_result:
        """Return what stands at a path, a symbolic link as itself."""
        return os.lstat(path)

    def fstat(self, fd: int) -> os.stat_result:
        """Return what a descriptor has open."""
        return os.fstat(fd)

    def scandir(self, path: str) -> Sequence[os.DirEntry[str]]:
        """Return all entries of a directory."""
        with os.scandir(path) as entries:
            return list(entries)

    def mkdir(self, path: str) -> None:
        """Make one directory."""
        os.mkdir(path)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name."""
        os.link(source, target)

    def symlink(self, text: str, target: str) -> None:
        """Make a symbolic link at `target` that says `text`."""
        os.symlink(text, target)

    def replace(self, source: str, target: str) -> None:
        """Move a file to another name, atomically replacing what stands there."""
        os.replace(source, target)

    def unlink(self, path: str) -> None:
        """Remove one name of a file."""
        os.unlink(path)

    def rmtree(self, path: str) -> None:
        """Remove a directory with all that is in it."""
        shutil.rmtree(path)


def _sync(fd: int) -> None:
    if sys.platform == "darwin":
        # fsync leaves the bytes in the cache of the drive there.
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in {errno.ENOTSUP, errno.EINVAL, errno.ENOTTY}:
                raise
        else:
            return
    os.fsync(fd)


@cache
def _fallocate_call() -> Callable[[int, int, int, int], int]:
    """Return fallocate(2) itself: glibc's posix_fallocate writes zeros where the system call fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    # The name with 64-bit offsets everywhere; C libraries without it have them in the plain one.
    call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if call is None:
        return _not_there
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    call.restype = ctypes.c_int
    found: Callable[[int, int, int, int], int] = call
    return found


@cache
def _fstatfs_call() -> Callable[[int, ctypes.Array[ctypes.c_char]], int]:
    # BSDs put other members first, and big-endian machines the bits that matter last.
    if sys.platform != "linux" or sys.byteorder != "little":
        return _not_there
    call = ctypes.CDLL(None, use_errno=True).fstatfs
    call.argtypes = (ctypes.c_int, ctypes.c_char_p)
    call.restype = ctypes.c_int
    found: Callable[[int, ctypes.Array[ctypes.c_char]], int] = call
    return found


def _not_there(*_: object) -> int:
    ctypes.set_errno(errno.ENOSYS)
    return -1
