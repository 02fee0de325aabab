"""Tell whether a flattened state still has the layout of an earlier one, at a microsecond a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._sharding.detect import is_dtensor, is_sharded_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Describe = Callable[[Any], tuple[Any, ...]]

    Fingerprint = list[tuple[Any, ...]]


def fingerprint(flat: Mapping[str, Any], paths: Mapping[str, Any]) -> Fingerprint:
    """Return what a plan depends on: of each entry its path and kind, of a tensor its layout over the ranks.

    It is equal on one rank while the plan holds. Whether gradients are required does not count: no
    checkpoint says it.

    Args:
        flat: key -> tensor or object.
        paths: key -> path in the state.
    """
    kinds: dict[type, Describe | None] = {}
    found: Fingerprint = []
    add = found.append
    for key, value in flat.items():
        kind = type(value)
        try:
            describe = kinds[kind]
        except KeyError:
            describe = kinds[kind] = _describe(value)
        path = paths.get(key, key)
        add((path,) if describe is None else (path, *describe(value)))
    return found


def _describe(value: object) -> Describe | None:
    """Return the function for values of this class; None for objects."""
    if is_dtensor(value):
        return _dtensor
    if is_sharded_tensor(value):
        return _sharded_tensor
    if hasattr(value, "__create_write_items__"):
        return _planned
    return _tensor if isinstance(value, torch.Tensor) else None


def _tensor(tensor: Any) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype


def _dtensor(tensor: Any) -> tuple[Any, ...]:
    local = tensor._local_tensor
    if hasattr(local, "__create_write_items__"):
        return tensor.shape, tensor.dtype, tensor.device_mesh, tensor.placements, *_planned(tensor)
    return tensor.shape, tensor.dtype, tensor.device_mesh, tensor.placements, local.shape


def _sharded_tensor(tensor: Any) -> tuple[Any, ...]:
    shards = [(*shard.metadata.shard_offsets, *shard.metadata.shard_sizes) for shard in tensor.local_shards()]
    return tensor.metadata().size, tensor.metadata().tensor_properties.dtype, shards


def _planned(tensor: Any) -> tuple[Any, ...]:
    """Describe a tensor of a class that says itself which items it consists of."""
    return tuple((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.__create_chunk_list__())
