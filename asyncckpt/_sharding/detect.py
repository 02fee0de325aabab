"""Find tensors that are sharded over several ranks, without the import of torch.distributed."""

from __future__ import annotations

import sys
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._snapshot.local_tensors import is_dtensor, is_sharded_tensor, shard_ranks
from asyncckpt._stateful import CONTAINERS

if TYPE_CHECKING:
    from collections.abc import Iterable

_OPENED = (*CONTAINERS, torch.nn.Module, torch.optim.Optimizer)


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
