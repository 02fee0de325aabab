"""Compare the values of tensors of two files, piece by piece, in a fixed amount of memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from anyio import CapacityLimiter, Lock

from asyncckpt._inspection.tensor_values import is_native, pieces, place_of, span, view
from asyncckpt._inspection.value_differences import ValueDifference, difference
from asyncckpt._threads import for_each, in_thread
from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from asyncckpt._inspection.comparing import TensorPair
    from asyncckpt._inspection.contents import Contents
    from asyncckpt._inspection.tensor_values import Piece
    from asyncckpt._outline.nodes import TensorOutline
    from asyncckpt.stores.base import OpenFile

# Together these keep within 64 MiB: each task holds a piece of either file, and one of them computes.
TASKS = 4
MAX_BYTES = 1 << 20
MAX_NUMEL = 256 << 10
# Pieces of up to this many bytes are read together with their neighbours.
SMALL = 64 << 10

# The dtypes that torch computes with. Of all others only the bytes are compared.
_NUMBERS = re.compile(r"bool|bfloat16|float(16|32|64)|float8_\w+|complex\d+|u?int(8|16|32|64)")


@dataclass(frozen=True, slots=True)
class Side:
    """One of two files that are compared."""

    file: OpenFile
    contents: Contents


class _Reader:
    """Reads a file from front to back; what is small is read together with what lies behind it."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._lock = Lock()
        self._start = 0
        self._window = bytearray()

    async def read(self, start: int, nbytes: int) -> bytearray:
        """Return the bytes from offset `start` on."""
        if nbytes > SMALL:
            return await self._read(start, nbytes)
        async with self._lock:
            if not self._start <= start <= start + nbytes <= self._start + len(self._window):
                self._start = start
                self._window = await self._read(start, min(MAX_BYTES, self._side.file.file.nbytes - start))
            return self._window[start - self._start : start - self._start + nbytes]

    async def _read(self, start: int, nbytes: int) -> bytearray:
        data = bytearray(nbytes)
        await self._side.file.read(start, memoryview(data))
        return data


async def compare_values(
    a: Side, b: Side, pairs: Sequence[TensorPair], advance: Callable[[int], None]
) -> list[ValueDifference | None]:
    """Compare the tensors of each pair.

    Args:
        a: the one file.
        b: the other.
        pairs: what to compare.
        advance: is told, each time, how many more bytes of A have been compared.

    Returns:
        For each pair how much it differs; None if it has two dtypes, one of them without numbers.

    Raises:
        CorruptCheckpointError: a file does not hold the values that it should, or in another byte order.
        StoreError: a file could not be read.
    """
    for contents in (a.contents, b.contents):
        if pairs and not is_native(contents.byteorder):
            raise CorruptCheckpointError(
                f"{contents.summary.checkpoint.path}: its values are {contents.byteorder}-endian, unlike"
                " those of this machine; load it with torch.load and save it again"
            )
    readers = _Reader(a), _Reader(b)
    works = [_prepared(pair, a, b) for pair in pairs]
    jobs = ((work, piece) for work in works if work for piece in work.pieces())
    computing = CapacityLimiter(1)

    async def compare(job: tuple[_Work, Piece]) -> None:
        work, piece = job
        in_a = await readers[0].read(*work.a.place_of(piece.shape, piece.a))
        in_b = await readers[1].read(*work.b.place_of(piece.shape, piece.b))
        if len(in_a) + len(in_b) > 2 * SMALL:
            await in_thread(work.add, piece.shape, in_a, in_b, limiter=computing)
        else:  # the way to a thread and back would take longer
            work.add(piece.shape, in_a, in_b)
        advance(prod(piece.shape) * work.a.dtype.itemsize * work.weight)

    await for_each(compare, jobs, TASKS)
    return [work.result if work else None for work in works]


@dataclass(frozen=True, slots=True, eq=False)
class _Operand:
    """The tensor of one side.

    Attributes:
        dtype, stride: of the tensor.
        first: offset of its first element in the file.
    """

    dtype: torch.dtype
    stride: tuple[int, ...]
    first: int

    @classmethod
    def of(cls, side: Side, tensor: TensorOutline, stride: tuple[int, ...]) -> _Operand:
        try:
            dtype, first = place_of(tensor, side.contents.payloads)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{side.contents.summary.checkpoint.path}: {error}") from error
        return cls(dtype, stride, first)

    def place_of(self, shape: tuple[int, ...], at: int) -> tuple[int, int]:
        """Return the offset and the length of what a part of this shape lies over, from element `at` on."""
        return self.first + at * self.dtype.itemsize, span(shape, self.stride) * self.dtype.itemsize

    def view(self, data: bytearray, shape: tuple[int, ...]) -> torch.Tensor:
        return view(data, self.dtype, shape, self.stride)

    def elements(self, data: bytearray, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the bytes of each element in a last dimension."""
        import torch  # noqa: PLC0415

        size = self.dtype.itemsize
        return view(data, torch.uint8, (*shape, size), (*(step * size for step in self.stride), 1))


def _prepared(pair: TensorPair, a: Side, b: Side) -> _Work | None:
    """Return what is to be done; None if these two cannot be compared."""
    opaque = not all(_NUMBERS.fullmatch(tensor.dtype) for tensor in (pair.a, pair.b))
    if opaque and pair.a.dtype != pair.b.dtype:
        return None
    rows = list(zip(pair.a.shape, pair.a.stride, pair.b.stride, strict=True))
    kept = [row for row in rows if row[1] or row[2]]
    return _Work(
        tuple(size for size, _, _ in kept),
        _Operand.of(a, pair.a, tuple(stride for _, stride, _ in kept)),
        _Operand.of(b, pair.b, tuple(stride for _, _, stride in kept)),
        prod(size for size, *strides in rows if not any(strides)),
        conj=pair.a.conj != pair.b.conj,
        neg=pair.a.neg != pair.b.neg,
        opaque=opaque,
        result=ValueDifference(pair.a.numel, largest=None if opaque else 0.0),
    )


@dataclass(slots=True, eq=False)
class _Work:
    """The comparison of two tensors.

    Attributes:
        shape: of both, without the dimensions along which both repeat their elements.
        a, b: the tensors.
        weight: how often each element is repeated.
        conj, neg: whether the values of one are to be conjugated or negated.
        opaque: whether only bytes can be compared.
        result: so far.
    """

    shape: tuple[int, ...]
    a: _Operand
    b: _Operand
    weight: int
    conj: bool
    neg: bool
    opaque: bool
    result: ValueDifference

    def pieces(self) -> Iterator[Piece]:
        if self.result.numel:
            itemsizes = self.a.dtype.itemsize, self.b.dtype.itemsize
            yield from pieces(self.shape, (self.a.stride, self.b.stride), itemsizes, MAX_NUMEL, MAX_BYTES)

    def add(self, shape: tuple[int, ...], data_a: bytearray, data_b: bytearray) -> None:
        """Compare one piece, given what either file has from its first element to its last."""
        if self.opaque:
            unequal = self.a.elements(data_a, shape) != self.b.elements(data_b, shape)
            self.result.differing += int(unequal.any(-1).sum()) * self.weight
            return
        same_layout = self.a.dtype == self.b.dtype and self.a.stride == self.b.stride
        in_a = self.a.view(data_a, shape)
        known_equal = same_layout and not (self.conj or self.neg) and data_a == data_b
        in_b = in_a if known_equal else self.b.view(data_b, shape)
        self.result.add(difference(in_a, in_b, conj=self.conj, neg=self.neg), self.weight)
