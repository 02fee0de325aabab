"""Find the process group of this rank."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from asyncckpt.errors import SaveError


class ProcessGroup(NamedTuple):
    """A process group of several ranks.

    Attributes:
        store: its key-value store, which torch and others use, too.
        rank: of this process, in the group.
        size: number of ranks, at least 2.
    """

    store: Any
    rank: int
    size: int

    def connect(self) -> Any:
        """Return the store through a connection of its own, which no request of others holds up.

        That takes a TCPStore of torch 2.8 or newer; the shared store is returned otherwise.
        """
        store = self.store
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        tcp = getattr(sys.modules.get("torch.distributed"), "TCPStore", ())
        return self.store.clone() if isinstance(store, tcp) and hasattr(store, "clone") else self.store


def process_group(group: Any = None) -> ProcessGroup | None:
    """Return the process group of this rank, if there is one of several ranks; does not import it.

    Args:
        group: a `torch.distributed.ProcessGroup`; None for the default group.

    Raises:
        SaveError: this process is not a member of `group`.
    """
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return None
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise SaveError(
            f"rank {dist.get_rank()} is not in the process group given; make this call on its members only"
        )
    if size == 1:
        return None
    store = dist.distributed_c10d._get_process_group_store(group or dist.group.WORLD)
    return ProcessGroup(store, rank, size)
