"""Compare the values of tensors of two files that are mapped into memory, piece by piece."""

from __future__ import annotations

import math
import mmap
import re
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from asyncckpt._inspection.contents import Records, read_records
from asyncckpt._inspection.inert import dtype_name
from asyncckpt._threads import in_thread
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.stores.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from asyncckpt._inspection.inert import Tensor
    from asyncckpt.stores.base import OpenFile, Store

PIECE = 256 << 10  # elements; a dozen copies of a piece are made as float64
_CHUNK = 16 << 20
# Windows that overlap view an element as often as they are large. Who asks for more wants to waste our time.
_MAX_OVERLAP = 10_000
# Integers beyond this are not exact as a float64.
_EXACT = float(1 << 53)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WIDE = frozenset({torch.int64, torch.uint64})
# The dtypes that torch computes with. Of all others only the bytes are compared.
_NUMBERS = re.compile(r"bool|bfloat16|float(16|32|64)|float8_\w+|complex\d+|u?int(8|16|32|64)")


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One of two files that are compared, or an item of a folder, and its bytes."""

    records: Records
    data: mmap.mmap | memoryview


@dataclass(slots=True)
class ValueDifference:
    """How much two tensors differ.

    Attributes:
        numel: number of elements.
        differing: how many of them differ; NaN does not from NaN.
        nans: how many are NaN in both.
        largest: the largest absolute difference; NaN where a number meets NaN; None if the dtype has no
            numbers.
        squares: sum of the squared differences.
        squares_of_a: sum of the squares of A. Both are over what is finite in A and B.
    """

    numel: int
    differing: int = 0
    nans: int = 0
    largest: float | None = 0.0
    squares: float = 0.0
    squares_of_a: float = 0.0

    @property
    def relative(self) -> float | None:
        """The norm of the difference over that of A; infinite if A is zero, None without numbers."""
        if self.largest is None:
            return None
        if not self.squares:
            return 0.0
        return math.sqrt(self.squares / self.squares_of_a) if self.squares_of_a else math.inf

    def add(self, part: ValueDifference) -> None:
        """Add that of other elements."""
        self.differing += part.differing
        self.nans += part.nans
        self.squares += part.squares
        self.squares_of_a += part.squares_of_a
        if self.largest is not None and part.largest is not None:
            # Python's max depends on the order if one is NaN.
            self.largest = math.nan if math.isnan(self.largest) else max(part.largest, self.largest)


async def open_side(store: Store, name: str, progress: Callable[[int], None]) -> Side:
    """Read what a file holds and map it; one of a remote store is copied to a temporary file for that.

    Raises:
        CheckpointNotFoundError: it was replaced meanwhile.
        CorruptCheckpointError: it is damaged or another format.
        StoreError: it could not be read.
    """
    async with store.open(name) as file:
        return Side(await read_records(file), await map_file(store, file, progress))


async def map_file(store: Store, file: OpenFile, progress: Callable[[int], None]) -> mmap.mmap:
    """Map an open file, which is not empty; raises as `open_side` does."""
    if not isinstance(store, LocalStore):
        return await _mapped_copy(file, progress)
    name = file.file.name
    with open(store.path_of(name), "rb") as local:  # noqa: ASYNC230, PTH123 - a moment
        data = mmap.mmap(local.fileno(), 0, access=mmap.ACCESS_COPY)
    if (await store.stat(name)).version != file.file.version:
        raise CheckpointNotFoundError(f"{file.path} was replaced while it was read")
    return data


async def _mapped_copy(file: OpenFile, progress: Callable[[int], None]) -> mmap.mmap:
    with tempfile.TemporaryFile() as copy:
        for start in range(0, file.file.nbytes, _CHUNK):
            piece = bytearray(min(_CHUNK, file.file.nbytes - start))
            await file.read(start, memoryview(piece))
            await in_thread(copy.write, piece)
            progress(len(piece))
        copy.flush()
        return mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_COPY)


def dtype_of(name: str) -> torch.dtype | None:
    """Return the dtype of this name, None if this torch has none."""
    dtype = vars(torch).get(name)  # getattr would run the lazy imports of torch
    return dtype if isinstance(dtype, torch.dtype) else None


def nbytes_of(tensor: Tensor) -> int | None:
    """Return the bytes of the elements of a tensor, None if this torch does not have its dtype."""
    dtype = dtype_of(dtype_name(tensor))
    return None if dtype is None else tensor.numel * dtype.itemsize


def compare_values(a: Side, b: Side, in_a: Tensor, in_b: Tensor) -> ValueDifference | None:
    """Compare two tensors of one shape; returns None if they have two dtypes, and not both hold numbers.

    Raises:
        CorruptCheckpointError: a file does not hold the values that it should, or in another byte order.
    """
    for records in (a.records, b.records):
        if not records.is_native:
            raise CorruptCheckpointError(
                f"{records.path}: its values are {records.byteorder}-endian, unlike those of this machine;"
                " load it with torch.load and save it again"
            )
    opaque = not all(_NUMBERS.fullmatch(dtype_name(tensor)) for tensor in (in_a, in_b))
    same_dtype = dtype_name(in_a) == dtype_name(in_b)
    if opaque and not same_dtype:
        return None
    result = ValueDifference(in_a.numel, largest=None if opaque else 0.0)
    if not result.numel:
        return result
    rows = list(zip(in_a.shape, in_a.stride, in_b.stride, strict=True))
    kept = [row for row in rows if row[1] or row[2]]  # along the other dimensions both repeat their elements
    shape, *strides = zip(*kept, strict=True) if kept else ((), (), ())
    view_a, view_b = (
        _view(side, tensor._replace(shape=shape, stride=stride), opaque=opaque)
        for side, tensor, stride in zip((a, b), (in_a, in_b), strides, strict=True)
    )
    conj, neg = in_a.conj != in_b.conj, in_a.neg != in_b.neg
    may_be_same = same_dtype and not (conj or neg)
    for piece_a, piece_b in _pieces(view_a, view_b):
        if opaque:
            result.differing += int((piece_a != piece_b).any(-1).sum())
        else:
            same = may_be_same and torch.equal(_bits(piece_a), _bits(piece_b))
            result.add(difference(piece_a, piece_a if same else piece_b, conj=conj, neg=neg))
    times = math.prod(size for size, *steps in rows if not any(steps))
    result.differing *= times
    result.nans *= times
    return result


def _view(side: Side, tensor: Tensor, *, opaque: bool) -> torch.Tensor:
    """Return a tensor of the mapped file, or of its bytes, with those of each element in a last dimension."""
    path, dtype, reach = side.records.path, dtype_of(dtype_name(tensor)), tensor.reach
    if dtype is None:
        raise CorruptCheckpointError(
            f"{path}: it has a tensor of dtype {dtype_name(tensor)}, which this torch does not have; upgrade"
            " torch"
        )
    steps = zip(tensor.shape, tensor.stride, strict=True)
    if math.prod(size for size, step in steps if step) > _MAX_OVERLAP * reach:
        raise CorruptCheckpointError(
            f"{path}: a tensor of it views its storage {tensor.storage.key} more than {_MAX_OVERLAP:,} times"
            " over"
        )
    nbytes = dtype.itemsize
    first = side.records.place_of(tensor, nbytes)
    data = torch.frombuffer(side.data, dtype=torch.uint8, offset=first, count=reach * nbytes)
    if opaque:
        return data.as_strided((*tensor.shape, nbytes), (*(step * nbytes for step in tensor.stride), 1))
    return data.view(dtype).as_strided(tensor.shape, tensor.stride)


def _pieces(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut two tensors of one shape into parts of up to PIECE elements, front to back."""
    if a.numel() <= PIECE:
        yield a, b
        return
    dim = next(dim for dim, size in enumerate(a.shape) if size > 1)
    half = a.shape[dim] // 2
    for start, length in ((0, half), (half, a.shape[dim] - half)):
        yield from _pieces(a.narrow(dim, start, length), b.narrow(dim, start, length))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of numbers as integers, of which NaN is one like any other."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.view(_INTEGERS[real.itemsize])


def difference(a: torch.Tensor, b: torch.Tensor, *, conj: bool = False, neg: bool = False) -> ValueDifference:
    """Compare two tensors of one shape, which have elements, and numbers that torch computes with.

    Args:
        a: the one.
        b: the other; the very same one if they are known to be equal.
        conj: whether B is to be conjugated.
        neg: whether B is to be negated.
    """
    is_complex = a.is_complex() or b.is_complex()
    in_a = _numbers(a, is_complex=is_complex)
    squares_of_a = float(in_a.dot(in_a))
    if a is b and math.isfinite(squares_of_a):
        return ValueDifference(a.numel(), squares_of_a=squares_of_a)
    in_b = _numbers(b, is_complex=is_complex)
    if conj:
        in_b[1::2].neg_()
    if neg:
        in_b.neg_()
    gap = in_a - in_b
    unequal = gap != 0
    if a.dtype == b.dtype and a.dtype in _WIDE and not neg:
        # Where they are close, so are their bits.
        bits_a, bits_b = (side.contiguous().view(torch.int64).flatten() for side in (a, b))
        unequal = bits_a != bits_b
        gap = gap.where(gap.abs() >= _EXACT, (bits_a - bits_b).to(torch.float64))
    squares = float(gap.dot(gap))
    nans = 0
    if not math.isfinite(squares + squares_of_a):
        both_nan = in_a.isnan() & in_b.isnan()
        nans = _count(both_nan, is_complex=is_complex)
        unequal = (in_a != in_b) & ~both_nan
        gap = gap.where(unequal, 0.0)  # of equal infinities it is NaN
        finite = in_a.isfinite() & in_b.isfinite()
        squares = float(gap.where(finite, 0.0).square_().sum())
        squares_of_a = float(in_a.where(finite, 0.0).square_().sum())
    size = gap.view(-1, 2).norm(dim=-1) if is_complex else gap.abs_()
    differing = _count(unequal, is_complex=is_complex)
    return ValueDifference(a.numel(), differing, nans, float(size.max()), squares, squares_of_a)


def _numbers(tensor: torch.Tensor, *, is_complex: bool) -> torch.Tensor:
    """Return a copy of the values as float64 in a row; complex numbers as two each."""
    if is_complex:
        return torch.view_as_real(tensor.to(torch.complex128, copy=True).flatten()).flatten()
    return tensor.to(torch.float64, copy=True).flatten()


def _count(flags: torch.Tensor, *, is_complex: bool) -> int:
    """Return how many elements are flagged; of a complex one, either part."""
    return int((flags.view(-1, 2).any(-1) if is_complex else flags).count_nonzero())
