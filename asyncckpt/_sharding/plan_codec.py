"""Encode the plans of ranks for rank 0: what is alike on all ranks apart from where their shards lie.

It imports `torch.distributed.checkpoint`, which takes a second: import it where it is needed.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorProperties

_TYPES = tuple(WriteItemType)


def encode_plan(plan: SavePlan) -> bytes:
    """Return a plan as bytes."""
    layouts: dict[tuple[Any, ...], tuple[int, TensorProperties, tuple[int, ...]]] = {}
    rows: list[tuple[str, int, int | None]] = []
    chunks: list[int] = []
    for item in plan.items:
        layout = None
        if (data := item.tensor_data) is not None:
            chunks += data.chunk.offsets
            chunks += data.chunk.sizes
            known = (*vars(data.properties).values(), *data.size)
            layout = layouts.setdefault(known, (len(layouts), data.properties, tuple(data.size)))[0]
        rows.append((item.index.fqn, _TYPES.index(item.type), layout))
    tensors = [(properties, size) for _, properties, size in layouts.values()]
    common = pickle.dumps((rows, tensors, plan.planner_data), pickle.HIGHEST_PROTOCOL)
    return pickle.dumps((common, np.array(chunks, np.int64).tobytes()), pickle.HIGHEST_PROTOCOL)


class PlanDecoder:
    """Decodes the plans of ranks, and what they have in common once."""

    def __init__(self) -> None:
        self._common: bytes | None = None
        self._rows: list[tuple[str, int, int | None]] = []
        self._tensors: list[tuple[TensorProperties, torch.Size]] = []
        self._planner_data: Any = None

    def decode(self, payload: bytes) -> SavePlan:
        """Return a plan that `encode_plan` has made on another rank of this group."""
        common, chunk_bytes = pickle.loads(payload)  # noqa: S301 - from a rank of this job, as DCP's own are
        if common != self._common:
            self._rows, tensors, self._planner_data = pickle.loads(common)  # noqa: S301 - the same
            self._tensors = [(properties, torch.Size(size)) for properties, size in tensors]
            self._common = common
        chunks, at = np.frombuffer(chunk_bytes, np.int64).tolist(), 0
        items = []
        for key, kind, layout in self._rows:
            if layout is None:
                items.append(WriteItem(MetadataIndex(key), _TYPES[kind]))
                continue
            properties, size = self._tensors[layout]
            middle, end = at + len(size), at + 2 * len(size)
            offsets, sizes = torch.Size(chunks[at:middle]), torch.Size(chunks[middle:end])
            data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, size)
            items.append(WriteItem(MetadataIndex(key, offsets), _TYPES[kind], tensor_data=data))
            at = end
        return SavePlan(items, planner_data=self._planner_data)
