"""How much the numbers in two tensors differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Integers beyond this are not exact as a float64.
_EXACT = float(1 << 53)


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

    def add(self, part: ValueDifference, times: int) -> None:
        """Add that of a part of the elements, which is repeated so many times."""
        self.differing += part.differing * times
        self.nans += part.nans * times
        self.squares += part.squares * times
        self.squares_of_a += part.squares_of_a * times
        if self.largest is not None and part.largest is not None:
            # Python's max depends on the order if one is NaN.
            self.largest = math.nan if math.isnan(self.largest) else max(part.largest, self.largest)


def difference(a: torch.Tensor, b: torch.Tensor, *, conj: bool = False, neg: bool = False) -> ValueDifference:
    """Compare two tensors of one shape, which have elements, and numbers that torch computes with.

    Args:
        a: the one.
        b: the other; the very same one if they are known to be equal.
        conj: whether B is to be conjugated.
        neg: whether B is to be negated.
    """
    import torch  # noqa: PLC0415

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
    if a.dtype == b.dtype and a.dtype in {torch.int64, torch.uint64} and not neg:
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
    import torch  # noqa: PLC0415

    if is_complex:
        return torch.view_as_real(tensor.to(torch.complex128, copy=True).flatten()).flatten()
    return tensor.to(torch.float64, copy=True).flatten()


def _count(flags: torch.Tensor, *, is_complex: bool) -> int:
    """Return how many elements are flagged; of a complex one, either part."""
    return int((flags.view(-1, 2).any(-1) if is_complex else flags).count_nonzero())
