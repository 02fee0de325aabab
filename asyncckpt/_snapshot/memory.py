"""Map page-aligned memory, populate it, and give it back to the system."""

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
_libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)


@dataclass(slots=True, eq=False)
class Mapping:
    """Page-aligned memory of this process, outside Python's and torch's allocators.

    Unlike Python's own mmap it closes while views exist.

    Attributes:
        address: of the first byte.
        nbytes: a multiple of the page size.
        owner: the only process that has it mapped, or None if forked children have copies of it.
        view: all of it, writable; not to be used after `close`.
    """

    address: int
    nbytes: int
    owner: int | None
    view: memoryview = field(init=False, repr=False)
    _unmap: weakref.finalize[..., Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        array = (ctypes.c_ubyte * self.nbytes).from_address(self.address)
        # Nobody may be left to close it, if an exception comes at the wrong moment.
        self._unmap = weakref.finalize(array, _unmap, self.address, self.nbytes, self.owner)
        self._unmap.atexit = False
        self.view = memoryview(array).cast("B")

    def populate(self) -> None:
        """Touch every page, from a few threads."""
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

    def close(self) -> None:
        """Unmap the memory."""
        self._unmap()


def map_private(nbytes: int, *, inherited: bool = True) -> Mapping:
    """Map at least `nbytes` of this process alone, in huge pages where the system has them.

    Args:
        nbytes: how many.
        inherited: whether forked children get a copy.
    """
    size = max(-(-nbytes // PAGE), 1) * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address is None or address == _FAILED:
        raise MemoryError(f"cannot map {size} bytes of host memory: {os.strerror(ctypes.get_errno())}")
    if hasattr(mmap, "MADV_HUGEPAGE"):
        _libc.madvise(address, size, mmap.MADV_HUGEPAGE)
    kept = not inherited and hasattr(mmap, "MADV_DONTFORK")
    if kept:
        _libc.madvise(address, size, mmap.MADV_DONTFORK)
    return Mapping(int(address), size, os.getpid() if kept else None)


def _unmap(address: int, nbytes: int, owner: int | None) -> None:
    if owner in {None, os.getpid()}:  # a forked child may have something else at this address
        _libc.munmap(address, nbytes)
