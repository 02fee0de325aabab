"""Tell whether a flattened state still has the layout of an earlier one, at a microsecond a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._sharding.detect import is_plain_tensor
from asyncckpt._snapshot.local_tensors import is_dtensor, is_sharded_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Describe = Callable[[Any, Any], tuple[Any, ...]]

    Fingerprint = list[tuple[Any, ...]]


def fingerprint(flat: Mapping[str, Any], paths: Mapping[str, Any]) -> Fingerprint:
    """Return what a plan depends on: of each entry its path and kind, of a tensor its layout over the ranks.

    It is equal on one rank while the plan holds. Whether gradients are required does not count: no
    checkpoint says it.

    Args:
        flat: key -> tensor or object.
        paths: key -> path in the state.
    """
    kinds: dict[type, Describe] = {}
    found: Fingerprint = []
    for key, value in flat.items():
        describe = kinds.get(type(value))
        if describe is None:
            describe = kinds[type(value)] = _describe(value)
        found.append(describe(paths.get(key, key), value))
    return found


def _describe(value: object) -> Describe:
    """Return the function for values of this class."""
    if is_dtensor(value):
        return _dtensor
    if is_sharded_tensor(value):
        return _sharded_tensor
    if hasattr(value, "__create_write_items__"):
        return _planned
    return _tensor if isinstance(value, torch.Tensor) else _object


def _object(path: Any, _value: Any) -> tuple[Any, ...]:
    return (path,)


def _tensor(path: Any, tensor: Any) -> tuple[Any, ...]:
    return path, tensor.shape, tensor.dtype


def _dtensor(path: Any, tensor: Any) -> tuple[Any, ...]:
    local, spec = tensor._local_tensor, tensor._spec
    shape = local.shape if is_plain_tensor(local) else _planned(path, tensor)
    return path, tensor.shape, tensor.dtype, spec.mesh, spec.placements, shape


def _sharded_tensor(path: Any, tensor: Any) -> tuple[Any, ...]:
    shards = [(*shard.metadata.shard_offsets, *shard.metadata.shard_sizes) for shard in tensor.local_shards()]
    return path, tensor.metadata().size, tensor.metadata().tensor_properties.dtype, shards


def _planned(path: Any, tensor: Any) -> tuple[Any, ...]:
    """Describe a tensor of a class that says itself which items it consists of."""
    return path, [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.__create_chunk_list__()]
