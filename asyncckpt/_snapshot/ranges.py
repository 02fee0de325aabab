"""Ranges of live storages: the unit in which a snapshot copies, and a file is laid out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from torch.storage import UntypedStorage


class Ranges(NamedTuple):
    """Bytes of live storages that go into a file as they are, by columns: a state may have 100,000 of them.

    Where in the file they go is for its layout to decide.

    Attributes:
        sources: the storage of each range, on whichever device.
        offsets: of its first byte in the storage.
        sizes: in bytes.
        tensors: one that views the storage of the range, if one is at hand.
    """

    sources: list[UntypedStorage]
    offsets: list[int]
    sizes: list[int]
    tensors: list[torch.Tensor | None]

    def select(self, indices: Sequence[int]) -> Ranges:
        """Return some of the ranges."""
        return Ranges(
            [self.sources[index] for index in indices],
            [self.offsets[index] for index in indices],
            [self.sizes[index] for index in indices],
            [self.tensors[index] for index in indices],
        )


def ranges_of(tensors: Iterable[torch.Tensor]) -> Ranges:
    """Return the bytes of contiguous tensors, without the rest of their storages.

    Raises:
        ValueError: the elements of a tensor do not lie one after another.
    """
    ranges = Ranges([], [], [], [])
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)}, stride {tensor.stride()} is no range")
        ranges.sources.append(tensor.untyped_storage())
        ranges.offsets.append(int(tensor.storage_offset()) * tensor.itemsize)
        ranges.sizes.append(tensor.nbytes)
        ranges.tensors.append(tensor)
    return ranges


def is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Return whether elements of this shape and stride fill their memory, in any order, and share none."""
    if 0 in size:
        return True
    expected = 1
    for step, length in sorted(
        (step, length) for step, length in zip(stride, size, strict=True) if length > 1
    ):
        if step != expected:
            return False
        expected *= length
    return True
