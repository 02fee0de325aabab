"""Raw memory by the page: mapped, touched ahead of need, and given back when told to, also after a fork."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

from asyncckpt._snapshot.copy_threads import for_each_piece

PAGE = 4096
# Pages are touched in pieces of this size, so that several threads share the work.
_PIECE = 32 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module does not name it
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
# (one, other, bytes); 0 if they are equal.
memcmp = _libc.memcmp
memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)


@dataclass(slots=True, eq=False)
class Mapping:
    """Page-aligned memory of this process, outside Python's and torch's allocators.

    Python's own mmap keeps a second descriptor of the file and refuses to close while views exist, so a
    forked child could never let go of the memory.

    Attributes:
        address: of the first byte.
        nbytes: a multiple of the page size.
        fd: the memfd behind it, or -1.
        view: all of it, writable; not to be used after `close`.
    """

    address: int
    nbytes: int
    fd: int
    view: memoryview = field(init=False, repr=False)
    _unmap: weakref.finalize[..., Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        array = (ctypes.c_ubyte * self.nbytes).from_address(self.address)
        # Nobody may be left to close it, if an exception comes at the wrong moment.
        self._unmap = weakref.finalize(array, _unmap, self.address, self.nbytes, self.fd)
        self._unmap.atexit = False
        self.view = memoryview(array).cast("B")

    def populate(self) -> None:
        """Touch every page, from a few threads.

        The pages of a memfd are allocated in file order before: were they allocated by these threads, they
        would lie in memory interleaved, and direct writes of them would be a third slower.
        """
        if self.fd >= 0:
            os.posix_fallocate(self.fd, 0, self.nbytes)
        for_each_piece(self._populate, range(0, self.nbytes, _PIECE))

    def _populate(self, offset: int) -> None:
        length = min(_PIECE, self.nbytes - offset)
        if sys.platform != "linux" or _libc.madvise(self.address + offset, length, _MADV_POPULATE_WRITE):
            _libc.memset(self.address + offset, 0, length)

    def discard(self, start: int, stop: int) -> None:
        """Give the whole pages within [start, stop) back to the system; they read as zeros afterwards."""
        first, last = -(-start // PAGE) * PAGE, stop // PAGE * PAGE
        if first < last:
            _libc.madvise(self.address + first, last - first, mmap.MADV_DONTNEED)

    def abandon(self) -> None:
        """Let go of it in a forked child, which has inherited the descriptor but, on Linux, no mapping."""
        if self._unmap.detach() is not None and self.fd >= 0:
            os.close(self.fd)

    def close(self) -> None:
        """Unmap the memory."""
        self._unmap()


def _unmap(address: int, nbytes: int, fd: int) -> None:
    _libc.munmap(address, nbytes)
    if fd >= 0:
        os.close(fd)


def map_shared(nbytes: int) -> Mapping:
    """Map at least `nbytes` that another process could map as well, where the system has memfds."""
    size = _pages(nbytes)
    if not hasattr(os, "memfd_create"):
        return Mapping(_map(size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, -1), size, -1)
    fd = os.memfd_create("asyncckpt")
    try:
        os.ftruncate(fd, size)
        address = _map(size, mmap.MAP_SHARED, fd)
    except OSError:
        os.close(fd)
        raise
    _libc.madvise(address, size, mmap.MADV_DONTFORK)
    return Mapping(address, size, fd)


def map_private(nbytes: int) -> Mapping:
    """Map at least `nbytes` of this process alone, in huge pages where the system has them."""
    size = _pages(nbytes)
    address = _map(size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        _libc.madvise(address, size, mmap.MADV_HUGEPAGE)
    return Mapping(address, size, -1)


def _pages(nbytes: int) -> int:
    return max(-(-nbytes // PAGE), 1) * PAGE


def _map(size: int, flags: int, fd: int) -> int:
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if address is None or address == _FAILED:
        number = ctypes.get_errno()
        raise MemoryError(f"cannot map {size} bytes of host memory: {os.strerror(number)}")
    return int(address)
