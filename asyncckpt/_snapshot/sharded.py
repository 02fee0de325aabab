"""Recognize tensors of which a process holds a part only."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def ranks_of(tensor: torch.Tensor) -> int:
    """Return over how many ranks a tensor is spread: those of its mesh, or 1 for a tensor of one process."""
    if _is_a(tensor, "torch.distributed.tensor", "DTensor"):
        return int(tensor.device_mesh.size())  # type: ignore[attr-defined]
    if _is_a(tensor, "torch.distributed._shard.sharded_tensor", "ShardedTensor"):
        return int(tensor._process_group.size())  # type: ignore[attr-defined]
    return 1


def _is_a(tensor: torch.Tensor, module: str, name: str) -> bool:
    # There is no such tensor as long as nobody has imported its class, which takes a while.
    kind: Any = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(tensor, kind)
