"""Which bytes of a storage belong to the tensors of optimizers alone."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt._snapshot.owners import Coverage

_ITEM = 4
views = st.tuples(
    st.lists(st.integers(1, 4), max_size=2),
    st.lists(st.integers(0, 5), min_size=2, max_size=2),
    st.integers(0, 9),
)


def storage_of(numel: int) -> torch.Tensor:
    return torch.zeros(numel, dtype=torch.float32)


@given(shapes=st.lists(views, max_size=5), start=st.integers(0, 29), length=st.integers(1, 30))
def test_a_range_is_included_if_dense_tensors_have_all_of_it(
    shapes: list[tuple[list[int], list[int], int]], start: int, length: int
) -> None:
    base = storage_of(60)
    owned, taken = list[torch.Tensor](), set[int]()
    for size, strides, offset in shapes:
        stride = strides[: len(size)]
        owned.append(base.as_strided(size, stride, offset))
        places = [offset + sum(map(np.multiply, index, stride)) for index in np.ndindex(*size)]
        dense = len(set(places)) == len(places) == max(places) - min(places) + 1
        taken.update(places if dense else ())
    storage = base.untyped_storage()
    found = Coverage({storage._cdata: owned}).includes(storage, start * _ITEM, length * _ITEM)
    assert found == taken.issuperset(range(start, start + length))


def test_a_storage_without_owners_is_not_included() -> None:
    base = storage_of(4)
    storage = base.untyped_storage()
    assert not Coverage({}).includes(storage, 0, 16)
    assert not Coverage({storage._cdata + 1: [base]}).includes(storage, 0, 16)


def test_a_permuted_tensor_has_its_whole_storage() -> None:
    base = storage_of(12).view(3, 4).t()
    storage = base.untyped_storage()
    assert Coverage({storage._cdata: [base]}).includes(storage, 0, 48)
