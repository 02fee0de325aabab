"""Compare live storages with a copy that was made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncckpt._snapshot.copy_threads import all_of
from asyncckpt._snapshot.memory import memcmp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.storage import UntypedStorage

    from asyncckpt._snapshot.buffers import Lease

_STRIDE = 16 << 20


def holds(
    lease: Lease, storages: Sequence[UntypedStorage], sizes: Sequence[int], starts: Sequence[int]
) -> bool:
    """Return whether a buffer holds exactly these storages, by comparing every byte.

    That takes about as long as copying them. Version counters would be quicker to ask, but writes through
    `.data` or numpy pass them by. Storages on other devices than the host are not compared: they would have
    to be copied first.
    """
    if any(storage.device.type != "cpu" for storage in storages):
        return False
    pieces = [
        (lease.address + start + offset, storage.data_ptr() + offset, min(_STRIDE, nbytes - offset))
        for storage, nbytes, start in zip(storages, sizes, starts, strict=True)
        for offset in range(0, nbytes, _STRIDE)
    ]
    return all_of(lambda piece: memcmp(*piece) == 0, pieces)
