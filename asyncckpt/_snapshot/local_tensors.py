"""Tensors that are distributed over ranks, of which this process holds a part."""

from __future__ import annotations

import sys
from typing import Any

import torch

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local tensor of a DTensor; any other tensor as it is."""
    if type(tensor) in PLAIN or not is_dtensor(tensor):
        return tensor
    local: Any = tensor._local_tensor  # type: ignore[attr-defined]
    if _is_a(local, "torch.distributed._functional_collectives", "AsyncCollectiveTensor"):
        local = local.wait()
    found: torch.Tensor = local
    return found


def is_dtensor(value: object) -> bool:
    """Return whether `value` is a DTensor."""
    return _is_a(value, "torch.distributed.tensor", "DTensor")


def is_sharded_tensor(value: object) -> bool:
    """Return whether `value` is a ShardedTensor."""
    return _is_a(value, "torch.distributed._shard.sharded_tensor", "ShardedTensor")


def shard_ranks(tensor: Any) -> int:
    """Return over how many ranks a tensor is distributed; 1 for one that is not."""
    if is_dtensor(tensor):
        return int(tensor.device_mesh.size())
    if is_sharded_tensor(tensor):
        return int(tensor._process_group.size())
    return 1


def _is_a(value: object, module: str, name: str) -> bool:
    """Return whether `value` is an instance of a class in a module that this call does not import."""
    # There is no such object as long as nobody has imported its class, which takes a while.
    kind: Any = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)
