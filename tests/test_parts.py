"""Tensors in different parts are compared element by element, each element once."""

from __future__ import annotations

from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt._inspection.inert import Storage, Tensor
from asyncckpt._inspection.parts import Part, _meetings

if TYPE_CHECKING:
    from collections.abc import Sequence

Grid = list[list[int]]  # where each dimension is cut, its ends included


def part(begins: Sequence[int], ends: Sequence[int]) -> Part:
    shape = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
    stride = tuple(int(np.prod(shape[dim + 1 :])) for dim in range(len(shape)))
    side: Any = None
    return Part(tuple(begins), Tensor(Storage("0", "FloatStorage", "cpu", 0), None, 0, shape, stride), side)


def parts(grid: Grid) -> list[Part]:
    cells = product(*(list(pairwise(cuts)) for cuts in grid))
    return [part([begin for begin, _ in cell], [end for _, end in cell]) for cell in cells]


@st.composite
def two_grids(draw: st.DrawFn) -> tuple[Grid, Grid, list[int]]:
    shape = draw(st.lists(st.integers(1, 7), max_size=3))
    grids = [[sorted({0, size, *draw(st.sets(st.integers(0, size)))}) for size in shape] for _ in range(2)]
    return grids[0], grids[1], shape


@given(two_grids(), st.randoms())
def test_every_element_is_met_once(grids: tuple[Grid, Grid, list[int]], random: Any) -> None:
    one, other, shape = grids
    a, b = parts(one), parts(other)
    random.shuffle(a)
    random.shuffle(b)
    met = np.zeros(shape, dtype=int)
    for part_a, part_b, begins, ends in _meetings(a, b):
        met[tuple(map(slice, begins, ends))] += 1
        for here in (part_a, part_b):
            cut = here.cut(begins, ends)
            assert cut.shape == tuple(end - begin for begin, end in zip(begins, ends, strict=True))
            places = np.arange(here.tensor.numel).reshape(here.tensor.shape)
            first = places[tuple(begin - offset for begin, offset in zip(begins, here.offsets, strict=True))]
            assert cut.offset == first
    assert (met == 1).all()
