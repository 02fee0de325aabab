"""Data files of ranks, made as a save makes them, and metadata of DCP made by hand."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from asyncckpt._saving.transfer import Transfer
from asyncckpt._snapshot.arena import Arena
from asyncckpt._snapshot.copy import Watermark, copy_ranges
from asyncckpt._snapshot.shards import shards_of
from asyncckpt.layout.item_file import ItemFile
from asyncckpt.types import SaveStats
from memory_drafts import ThreadedDraft

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asyncckpt.layout.item_file import Blob


@dataclass
class Items:
    """What a rank saves."""

    pickles: Sequence[bytes]
    sizes: Sequence[int]
    blobs: Sequence[Blob] = field(default_factory=list)


def written(
    tensors: Sequence[torch.Tensor], blobs: Sequence[Blob] = (), chunk: int = 4096
) -> tuple[bytes, list[tuple[int, int]]]:
    """Return the data file of a rank, and offset and length of each item in it."""
    shards, ranges = shards_of(tensors, [f"tensor {index}" for index in range(len(tensors))])
    items, made = Items(shards.pickles, shards.sizes, blobs), ItemFile()
    body = made.lay_out(items)
    plan = made.plan(items, body, b"")
    lease, filled = Arena().lease(max(body.nbytes, 1)), Watermark()
    lease.view[:] = b"\xa5" * len(lease.view)  # what was there before must not matter
    copy_ranges(ranges, body.starts.tolist(), lease, filled)
    filled.advance(body.nbytes)
    draft = ThreadedDraft(chunk, 3)
    anyio.run(Transfer(plan, lease.view[: body.nbytes], filled, SaveStats()).into, draft)
    content = draft.content()
    assert len(content) == plan.size
    return content, [(offset, length) for offset, length in plan.extents.tolist()]


def metadata_of(
    state: Mapping[str, Any], extents: Sequence[tuple[int, int]], file: str = "__0_0.distcp"
) -> Metadata:
    """Return the metadata of a state whose items are in one file, tensors first."""
    described: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for (name, value), (offset, length) in zip(state.items(), extents, strict=True):
        index = MetadataIndex(name)
        described[name] = BytesStorageMetadata()
        if isinstance(value, torch.Tensor):
            zeros = torch.Size([0] * value.dim())
            chunk = ChunkStorageMetadata(zeros, value.size())
            properties = TensorProperties.create_from_tensor(value)
            described[name] = TensorStorageMetadata(properties, value.size(), [chunk])
            index = MetadataIndex(name, zeros)
        places[index] = _StorageInfo(file, offset, length)
    return Metadata(described, planner_data=None, storage_data=places)


def saved(value: object) -> bytes:
    """Return the file that torch.save makes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()
