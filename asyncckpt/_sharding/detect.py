"""Find tensors that are sharded over several ranks, without the import of torch.distributed."""

from __future__ import annotations

import sys
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._stateful import CONTAINERS

if TYPE_CHECKING:
    from collections.abc import Iterable

_OPENED = (*CONTAINERS, torch.nn.Module, torch.optim.Optimizer)


def is_dtensor(value: object) -> bool:
    """Whether `value` is a DTensor."""
    return _is_a(value, "torch.distributed.tensor", "DTensor")


def is_sharded_tensor(value: object) -> bool:
    """Whether `value` is a ShardedTensor."""
    return _is_a(value, "torch.distributed._shard.sharded_tensor", "ShardedTensor")


def shard_ranks(tensor: Any) -> int:
    """Return over how many ranks a tensor is distributed; 1 for one that is not."""
    if is_dtensor(tensor):
        return int(tensor.device_mesh.size())
    if is_sharded_tensor(tensor):
        return int(tensor._process_group.size())
    return 1


def is_plain_tensor(tensor: Any) -> bool:
    """Whether this rank has one item of a tensor at most: all of a plain one, its shard of a DTensor."""
    if is_dtensor(tensor):
        tensor = tensor._local_tensor
    return not (is_sharded_tensor(tensor) or hasattr(tensor, "__create_write_items__"))


def is_sharded(state: Any) -> bool:
    """Whether a state holds a DTensor or a ShardedTensor over more than one rank.

    It looks into dicts, lists, tuples, modules and optimizers, not into other objects.
    """
    if not _has_sharded_kinds():
        return False
    pending: list[Any] = [state]
    seen: set[int] = set()
    while pending:
        for item in _parts(pending.pop()):
            if isinstance(item, torch.Tensor):
                if shard_ranks(item) > 1:
                    return True
            elif isinstance(item, _OPENED) and id(item) not in seen:
                seen.add(id(item))
                pending.append(item)
    return False


def _parts(item: Any) -> Iterable[Any]:
    if isinstance(item, torch.nn.Module):
        return chain(item.parameters(), item.buffers())
    if isinstance(item, torch.optim.Optimizer):
        return chain.from_iterable(group["params"] for group in item.param_groups)
    if isinstance(item, CONTAINERS):
        return item.values() if isinstance(item, dict) else item
    return (item,)


def _has_sharded_kinds() -> bool:
    """Whether anything has imported the classes of sharded tensors."""
    return (
        "torch.distributed.tensor" in sys.modules or "torch.distributed._shard.sharded_tensor" in sys.modules
    )


def _is_a(value: object, module: str, name: str) -> bool:
    # There is no such tensor as long as nobody has imported its class, which takes a while.
    kind: Any = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)
