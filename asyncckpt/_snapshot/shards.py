"""Shards: what a rank writes of each tensor, as ranges of live storages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from asyncckpt._snapshot.ranges import Ranges


class Shards(NamedTuple):
    """What a rank writes of its tensors, by columns.

    Attributes:
        ranges: the bytes of each, without the rest of its storage; of a copy, if they do not lie together.
        pickles: `data.pkl` of each, of a file that holds it alone, with a storage that is the range.
        layouts: what the pickles were made of: dtype, shape and stride of each.
    """

    ranges: Ranges
    pickles: list[bytes]
    layouts: list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each range."""
        return self.ranges.sizes


def shards_of(tensors: Sequence[Any], names: Sequence[str], last: Shards | None = None) -> Shards:
    """Return the bytes that a rank writes of tensors, and the record that makes a tensor of them again.

    Of a DTensor it is the local tensor. The record is that of torch.save for the local tensor, detached: a
    plain tensor in host memory that needs no gradient. Nothing is copied, but for tensors with gaps or
    overlaps between their elements, which are cloned.

    Args:
        tensors: plain tensors, DTensors, or the tensors of ShardedTensors' local shards.
        names: what each is called in the state, for errors.
        last: of the same state before. `pickles`, `layouts` and `ranges.sizes` are the same objects as there
            if nothing of them has changed.

    Raises:
        SaveError: one is sparse, quantized, nested, of a class that has no storage, or on the meta device.
    """
    raise NotImplementedError
