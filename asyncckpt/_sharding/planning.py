"""Plan which rank writes what by DCP's planner, called directly: no collectives take part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
    from torch.distributed.checkpoint.planner import SavePlanner


@dataclass(slots=True)
class Kept:
    """What this rank writes of a state, in the order of the items in its file: tensors, then objects.

    Attributes:
        indices: of each item in the metadata: key, and offset in the tensor; without hints.
        tensor_count: how many of them are tensors.
    """

    indices: list[MetadataIndex]
    tensor_count: int

    def tensors(self, flat: dict[str, Any]) -> list[torch.Tensor]:
        """Return the tensors to write: plain ones, DTensors, and the local tensors of ShardedTensors."""
        raise NotImplementedError

    def objects(self, flat: dict[str, Any]) -> list[Any]:
        """Return the objects to write."""
        raise NotImplementedError


class LocalPlan:
    """A flattened state on this rank, and what this rank could write of it.

    Attributes:
        flat: key -> tensor or object.
        fingerprint: equal if an earlier plan, and what was made of it, still holds.

    Args:
        state: of `collect_sharded`.
        planner: DCP's, not used before; the default one if it is None.

    Raises:
        SaveError: two entries have the same key.
    """

    flat: dict[str, Any]
    fingerprint: list[tuple[Any, ...]]

    def __init__(self, state: dict[str, Any], planner: SavePlanner | None = None) -> None:
        raise NotImplementedError

    def encode(self) -> bytes:
        """Return the plan for rank 0.

        Raises:
            ShardedStateError: a shard is in an object that is pickled as a whole; the message has its path.
            SaveError: a tensor cannot be saved as it is; the message has its key.
        """
        raise NotImplementedError

    def keep(self, kept: bytes) -> Kept:
        """Return what this rank writes, of what rank 0 decided for it."""
        raise NotImplementedError


class GlobalPlan:
    """What all ranks write; on rank 0.

    Attributes:
        kept: for each rank, what it passes to `LocalPlan.keep`.
        metadata: of the checkpoint, without what is known after the writes.
    """

    kept: list[bytes]
    metadata: Metadata

    def write(
        self, names: Sequence[str], extents: Sequence[np.ndarray[Any, Any]], checkpoint_id: str | None = None
    ) -> bytes:
        """Return the content of `.metadata`.

        Args:
            names: of each rank's file, relative to the checkpoint.
            extents: for each rank, offset and length in bytes of every item, in the order of `Kept`.
            checkpoint_id: the path of the checkpoint.
        """
        raise NotImplementedError


def global_plan(payloads: Sequence[bytes], planner: SavePlanner | None = None) -> GlobalPlan:
    """Decide which rank writes what, from the encoded plans of all ranks.

    Raises:
        SaveError: the states of the ranks do not fit together; the message has keys and ranks.
    """
    raise NotImplementedError
