"""From the bytes of a storage to the values of a tensor, for outlines of tensors."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from asyncckpt._outline.nodes import TensorOutline
    from asyncckpt.stores.base import OpenFile

_NUMBERS = frozenset({"float32", "float64", "float16", "bfloat16", "int64", "int32"})

# Windows that overlap view an element as often as they are large. Who asks for more wants to waste our time.
_MAX_OVERLAP = 10_000


def dtype_of(name: str) -> torch.dtype | None:
    """Return the dtype of this name, None if this torch has none."""
    import torch  # noqa: PLC0415 - a listing does without it

    dtype = vars(torch).get(name)  # getattr would import what torch imports when it is asked for
    return dtype if isinstance(dtype, torch.dtype) else None


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return over how many elements of its storage a view extends."""
    if 0 in shape:
        return 0
    return sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1


def place_of(tensor: TensorOutline, payloads: Mapping[str, tuple[int, int]]) -> tuple[torch.dtype, int]:
    """Return the dtype of a tensor and where in the file its first element is.

    Raises:
        CorruptCheckpointError: not all of its elements are in the file, or this torch lacks the dtype.
    """
    dtype = dtype_of(tensor.dtype)
    if dtype is None:
        raise CorruptCheckpointError(
            f"it has a tensor of dtype {tensor.dtype}, which this torch does not have; upgrade torch"
        )
    if prod(size for size, step in zip(tensor.shape, tensor.stride, strict=True) if step) > (
        _MAX_OVERLAP * span(tensor.shape, tensor.stride)
    ):
        raise CorruptCheckpointError(
            f"a tensor of it views its storage {tensor.storage.key} more than {_MAX_OVERLAP:,} times over"
        )
    start, stop = payloads.get(tensor.storage.key, (0, 0))
    first = start + tensor.offset * dtype.itemsize
    if first + span(tensor.shape, tensor.stride) * dtype.itemsize > stop and tensor.numel:
        raise CorruptCheckpointError(
            f"a tensor of it views more than its storage {tensor.storage.key} of {stop - start} bytes holds"
        )
    return dtype, first


def view(data: bytearray, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """Return the view that begins at the first byte of `data`."""
    import torch  # noqa: PLC0415

    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).as_strided(shape, stride)


async def read_number(
    file: OpenFile, tensor: TensorOutline, payloads: Mapping[str, tuple[int, int]]
) -> float | None:
    """Return the value of a tensor of one element; None if its dtype is not one that numbers have."""
    dtype, first = place_of(tensor, payloads)
    if tensor.dtype not in _NUMBERS:
        return None
    data = bytearray(dtype.itemsize)
    await file.read(first, memoryview(data))
    return float(view(data, dtype, (), ()).item())


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of two tensors of one shape, as views that begin at the given elements.

    Attributes:
        shape: of both.
        a, b: offset of the first element from that of the whole, in elements.
    """

    shape: tuple[int, ...]
    a: int
    b: int


def pieces(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], tuple[int, ...]],
    itemsizes: tuple[int, int],
    max_numel: int,
    max_bytes: int,
) -> Iterator[Piece]:
    """Cut two tensors of one shape into parts, none of which has more elements or lies over more bytes.

    Args:
        shape: of both.
        strides: of each, in elements.
        itemsizes: bytes of an element of each.
        max_numel: of the elements of a part.
        max_bytes: between the first and the last of them, in either.
    """
    pending = [Piece(shape, 0, 0)]
    while pending:
        piece = pending.pop()
        over = [span(piece.shape, steps) * size for steps, size in zip(strides, itemsizes, strict=True)]
        if max(over) > max_bytes:
            steps = strides[over.index(max(over))]
        elif prod(piece.shape) > max_numel:
            steps = (1,) * len(shape)
        else:
            yield piece
            continue
        dim = max(range(len(shape)), key=lambda dim: (piece.shape[dim] - 1) * steps[dim])
        half = (piece.shape[dim] + 1) // 2
        first, second = (
            (*piece.shape[:dim], size, *piece.shape[dim + 1 :]) for size in (half, piece.shape[dim] - half)
        )
        # The first half comes next: files are read from front to back.
        pending.append(Piece(second, piece.a + half * strides[0][dim], piece.b + half * strides[1][dim]))
        pending.append(Piece(first, piece.a, piece.b))


def is_native(byteorder: str) -> bool:
    """Whether values of this byte order are those of this machine."""
    return byteorder == sys.byteorder
