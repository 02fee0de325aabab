"""The seam between the local store and the operating system.

Every file operation that durability depends on goes through a `FileOps`. A test subclasses it to
record the order of the calls, or to make one of them fail. The methods are thin: what to do about
short results and errors is decided by their callers.
"""

# ruff: noqa: PTH102, PTH105, PTH106, PTH108, PTH116, PTH211 - this is the place where `os` is called
# ruff: noqa: D102 - methods without a docstring do what that of `os` or `shutil` does

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
    from collections.abc import Sequence

_O_DIRECT: int = getattr(os, "O_DIRECT", 0)
_STATFS_BYTES = 512  # more than the struct has on any platform
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_REMOVALS = 100  # how often the removal of a directory begins again that others also remove


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
            raise _error(errno.EINVAL)
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
        # BSDs put other members first, and big-endian machines the bits that matter last.
        if sys.platform != "linux" or sys.byteorder != "little":
            raise _error(errno.ENOSYS)
        buffer = ctypes.create_string_buffer(_STATFS_BYTES)
        if _libc().fstatfs(fd, buffer) != 0:
            raise _error(ctypes.get_errno())
        # The first member: an int or a long, of which every type uses 32 bits.
        return int.from_bytes(buffer.raw[:4], "little")

    def fallocate(self, fd: int, size: int) -> None:
        """Reserve the space of a file and set its size; EOPNOTSUPP or ENOSYS where that is unknown.

        This is fallocate(2) itself: glibc's posix_fallocate writes zeros where the system call fails.
        """
        # The name with 64-bit offsets everywhere; C libraries without it have them in the plain one.
        call = getattr(_libc(), "fallocate64", None) or getattr(_libc(), "fallocate", None)
        if call is None:
            raise _error(errno.ENOSYS)
        while call(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
            if ctypes.get_errno() != errno.EINTR:
                raise _error(ctypes.get_errno())

    def ftruncate(self, fd: int, size: int) -> None:
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
        return os.stat(path)

    def lstat(self, path: str) -> os.stat_result:
        return os.lstat(path)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def scandir(self, path: str) -> Sequence[os.DirEntry[str]]:
        with os.scandir(path) as entries:
            return list(entries)

    def mkdir(self, path: str) -> None:
        os.mkdir(path)

    def link(self, source: str, target: str) -> None:
        os.link(source, target)

    def symlink(self, text: str, target: str) -> None:
        os.symlink(text, target)

    def replace(self, source: str, target: str) -> None:
        os.replace(source, target)

    def exchange(self, source: str, target: str) -> None:
        """Exchange two names atomically; EINVAL or ENOSYS where the file system or the system cannot."""
        call = getattr(_libc(), "renameat2", None) if sys.platform == "linux" else None
        if call is None:
            raise _error(errno.ENOSYS)
        paths = os.fsencode(source), os.fsencode(target)
        if call(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) != 0:
            raise _error(ctypes.get_errno())

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def rmtree(self, path: str) -> None:
        """Remove a directory with all that is in it; what others remove meanwhile is no error."""
        for _ in range(_REMOVALS):
            try:
                shutil.rmtree(path)
            except FileNotFoundError:
                if not os.path.lexists(path):
                    return
            else:
                return
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
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
