"""Find what no plan can be made of, on one rank and among the states of several, and say where it is."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._sharding.detect import is_plain_tensor
from asyncckpt._snapshot.culprit import find_culprit, subscript
from asyncckpt._snapshot.local_tensors import is_dtensor, shard_ranks
from asyncckpt._stateful import CONTAINERS
from asyncckpt.errors import SaveError, ShardedStateError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import SavePlan, WriteItem


def describe_duplicate(state: Mapping[Any, Any]) -> str | None:
    """Return which two entries have the same key once the state is flattened; None if there are none."""
    paths: dict[str, str] = {}
    for key, path in _leaves(state, ""):
        if paths.setdefault(key, path) != path:
            return (
                f"state{paths[key]} and state{path} have the same key {key!r} in a sharded checkpoint: rename"
                " one of them"
            )
    return None


def _leaves(value: Any, key: str, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the key and the path of each entry, as DCP's planner makes keys."""
    if isinstance(value, Mapping):
        parts = [(str(name), subscript(name), item) for name, item in value.items()]
    elif isinstance(value, list):
        parts = [(str(index), f"[{index}]", item) for index, item in enumerate(value)]
    else:
        yield key, path
        return
    for name, text, item in parts:
        yield from _leaves(item, f"{key}.{name}" if path else name, path + text)


def check_items(flat: Mapping[str, Any]) -> None:
    """Refuse entries that this rank cannot save.

    Raises:
        ShardedStateError: a shard is in an object that is pickled as a whole.
        SaveError: a DTensor holds partial sums.
    """
    for key, value in flat.items():
        if is_dtensor(value):
            if any(placement.is_partial() for placement in value.placements):
                raise SaveError(
                    f"{key}: a DTensor of partial sums, {value.placements}; redistribute it before the save"
                )
        elif isinstance(value, CONTAINERS) and _holds_shards(value):
            path = find_culprit(value, _probe).removeprefix("state")
            raise ShardedStateError(
                f"{key}{path}: a tensor that is sharded over several ranks, in a {type(value).__name__} that"
                " is pickled as a whole; put it into a dict or a list of tensors"
            )


def _holds_shards(value: object) -> bool:
    pending, seen = [value], {id(value)}
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            if shard_ranks(item) > 1:
                return True
        elif isinstance(item, CONTAINERS):
            parts = list(item.values() if isinstance(item, dict) else item)
            pending += [part for part in parts if id(part) not in seen]
            seen.update(map(id, parts))
    return False


def _probe(value: object) -> None:
    if _holds_shards(value):
        raise ShardedStateError


def check_shards(flat: Mapping[str, Any], plan: SavePlan) -> None:
    """Refuse DTensors whose local tensor is not what their placements say.

    Raises:
        SaveError: the message has the key.
    """
    for item in plan.items:
        value = flat[item.index.fqn]
        if item.tensor_data is None or not is_dtensor(value) or not is_plain_tensor(value):
            continue
        expected, local = tuple(item.tensor_data.chunk.sizes), tuple(value._local_tensor.shape)
        if expected != local:
            raise SaveError(
                f"{item.index.fqn}: the local tensor has shape {local}, but this rank's shard of"
                f" {tuple(value.shape)} by {value.placements} has {expected}"
            )


def check_plans(plans: Sequence[SavePlan]) -> None:
    """Refuse plans of ranks that differ in an entry, or that leave out a part of a tensor.

    Raises:
        SaveError: the message has keys and ranks.
    """
    first: dict[str, tuple[int, Any]] = {}
    volumes: dict[MetadataIndex, int] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            form = _form(item)
            other, expected = first.setdefault(item.index.fqn, (rank, form))
            if form != expected:
                raise SaveError(
                    f"{item.index.fqn} is {_form_text(expected)} on rank {other}, but {_form_text(form)} on"
                    f" rank {rank}"
                )
            if item.tensor_data is not None:
                volumes[item.index] = prod(item.tensor_data.chunk.sizes)
    found = dict.fromkeys(first, 0)
    for index, volume in volumes.items():
        found[index.fqn] += volume
    for key, (_, (_, *layout)) in first.items():
        if layout and found[key] != prod(layout[0]):
            absent = [rank for rank, plan in enumerate(plans) if all(i.index.fqn != key for i in plan.items)]
            raise SaveError(
                f"{key}: the ranks have {found[key]} of its {prod(layout[0])} elements; it is not in the"
                f" state of ranks {absent}"
            )


def _form(item: WriteItem) -> tuple[Any, ...]:
    data = item.tensor_data
    return (item.type,) if data is None else (item.type, data.size, data.properties.dtype)


def _form_text(form: tuple[Any, ...]) -> str:
    kind, *rest = form
    if not rest:
        return "an object"
    size, dtype = rest
    return f"a {'sharded ' * (kind.name == 'SHARD')}tensor of shape {tuple(size)} and {dtype}"
