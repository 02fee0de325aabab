"""Find the process group of this rank."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple


class ProcessGroup(NamedTuple):
    """The default process group.

    Attributes:
        store: its key-value store.
        rank: of this process.
        size: number of ranks, at least 2.
    """

    store: Any
    rank: int
    size: int


def process_group(group: Any = None) -> ProcessGroup | None:
    """Return the default process group, if there is one of several ranks; does not import it."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return ProcessGroup(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size())
