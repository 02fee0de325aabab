"""Ranges of live storages: the unit in which a snapshot copies, and a file is laid out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.storage import UntypedStorage

if TYPE_CHECKING:
    import torch

# (storage, offset in it, nbytes): bytes on whichever device, which go into a file as they are. Where to is
# for the file's layout to decide. A plain tuple, since a state may have 100,000 of them.
Range = tuple[UntypedStorage, int, int]


def range_of(tensor: torch.Tensor) -> Range:
    """Return the bytes of a contiguous tensor, without the rest of its storage.

    Raises:
        ValueError: its elements do not lie one after another.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is no range")
    return tensor.untyped_storage(), int(tensor.storage_offset()) * tensor.itemsize, tensor.nbytes
