"""Copy many small storages at once: one system call for hundreds of them.

A call for each would cost more than the bytes it copies.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

from asyncckpt._snapshot.copy_threads import memmove

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.storage import UntypedStorage

    from asyncckpt._snapshot.buffers import Lease

# The kernel takes this many ranges a call; half of them are what lies between storages.
_RANGES = 1024
_libc = ctypes.CDLL(None, use_errno=True)


def scatter(
    storages: Sequence[UntypedStorage], sizes: Sequence[int], starts: Sequence[int], lease: Lease
) -> None:
    """Copy storages on the host to their places in the leased buffer.

    The bytes between two of them are written over themselves, so nobody else may write there meanwhile.

    Args:
        storages: none of them empty.
        sizes: of each, in bytes.
        starts: where each goes, ascending.
        lease: the buffer.
    """
    if lease.fd < 0:
        _copy_each(storages, sizes, starts, lease)
        return
    n = len(storages)
    at = np.asarray(starts, dtype=np.uint64)
    lengths = np.asarray(sizes, dtype=np.uint64)
    ends = at + lengths
    ranges = np.empty((2 * n, 2), dtype=np.uint64)  # address and length of each, as struct iovec has them
    ranges[0::2, 0] = [storage.data_ptr() for storage in storages]
    ranges[0::2, 1] = lengths
    ranges[1::2, 0] = ends + np.uint64(lease.address)
    ranges[1:-1:2, 1] = at[1:] - ends[:-1]
    for first in range(0, n, _RANGES // 2):
        last = min(first + _RANGES // 2, n)
        count = 2 * (last - first) - 1
        offset, expected = int(at[first]), int(ends[last - 1] - at[first])
        address = ranges.ctypes.data + first * ranges.strides[0] * 2
        if _libc.pwritev(lease.fd, ctypes.c_void_p(address), count, ctypes.c_long(offset)) != expected:
            _copy_each(storages[first:last], sizes[first:last], starts[first:last], lease)


def _copy_each(
    storages: Sequence[UntypedStorage], sizes: Sequence[int], starts: Sequence[int], lease: Lease
) -> None:
    for storage, nbytes, start in zip(storages, sizes, starts, strict=True):
        memmove(lease.address + start, storage.data_ptr(), nbytes)
