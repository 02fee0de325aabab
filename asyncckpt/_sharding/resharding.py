"""Which parts of saved chunks make up the local part of a live tensor, by DCP's rules of resharding."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from asyncckpt._snapshot.local_tensors import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    Region = tuple[slice, ...]


class LocalPart(NamedTuple):
    """A part of a live tensor, and the part of a saved chunk that belongs there.

    Attributes:
        target: a view of the memory on this rank.
        chunk: the offsets of the saved chunk in the whole tensor.
        region: which part of the chunk.
    """

    target: torch.Tensor
    chunk: tuple[int, ...]
    region: Region


@torch.no_grad()
def local_parts(key: str, live: torch.Tensor, saved: TensorStorageMetadata) -> list[LocalPart]:
    """Return what this rank needs of a saved tensor of the same global shape; nothing outside of its mesh.

    Args:
        key: of the entry in the metadata.
        live: a plain tensor, DTensor or ShardedTensor.
        saved: its metadata.
    """
    from torch.distributed.checkpoint.planner_helpers import (  # noqa: PLC0415 - takes a second
        _create_chunk_list,
        create_read_items_for_chunk_list,
    )
    from torch.distributed.checkpoint.utils import find_tensor_shard  # noqa: PLC0415

    if is_dtensor(live) and live.device_mesh.get_coordinate() is None:  # type: ignore[attr-defined]
        return []
    parts = []
    for item in create_read_items_for_chunk_list(key, saved, _create_chunk_list(live)):
        chunk = tuple(item.storage_index.offset or ())
        local = find_tensor_shard(live, item.dest_index).detach()
        target = local[_region(item.dest_offsets, item.lengths)]
        parts.append(LocalPart(target, chunk, _region(item.storage_offsets, item.lengths)))
    return parts


def _region(offsets: torch.Size, lengths: torch.Size) -> Region:
    return tuple(slice(o, o + length) for o, length in zip(offsets, lengths, strict=True))
