"""Ranges of live storages: the unit in which a snapshot copies, and a file is laid out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch.storage import UntypedStorage
    from typing_extensions import Self


class Range(NamedTuple):
    """Bytes of a live storage, on whichever device it is, that go into a file as they are.

    Where they go is decided by the file's layout.

    Attributes:
        source: the storage.
        offset: of the first byte in it.
        nbytes: how many bytes.
    """

    source: UntypedStorage
    offset: int
    nbytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """Return the bytes of a contiguous tensor, without the rest of its storage.

        Raises:
            ValueError: its elements do not lie one after another.
        """
        if not tensor.is_contiguous():
            raise ValueError(f"a tensor of strides {tensor.stride()} is no range of bytes")
        return cls(tensor.untyped_storage(), int(tensor.storage_offset()) * tensor.itemsize, tensor.nbytes)
