"""The `.metadata` file of a folder: a pickle to stock DCP, and a description to asyncckpt."""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.layout.description import MAX_BYTES, Description
from asyncckpt.layout.folder_mark import read_mark, seal, unseal

if TYPE_CHECKING:
    from collections.abc import Sequence

DESCRIPTION = Description(3, 7, {"loss": 0.5}, 1.0, filename="step-{step}", nbytes=1 << 40, ranks=16)
PICKLED = pickle.dumps({"state": list(range(1000))})
SEALED = seal(PICKLED, DESCRIPTION.encode())


def read(content: bytes) -> tuple[Description | None, Sequence[tuple[int, int]]]:
    """Return the description in a file, and what was read for it."""
    reading, requests = read_mark(len(content)), []
    try:
        request = next(reading)
        while True:
            requests.append(request)
            offset, length = request
            assert 0 <= offset <= offset + length <= len(content)
            request = reading.send(content[offset : offset + length])
    except StopIteration as end:
        return end.value, requests


def test_unpickling_ends_where_the_pickle_does() -> None:
    assert pickle.loads(SEALED) == pickle.loads(PICKLED)
    assert pickle.load(io.BytesIO(SEALED)) == pickle.loads(PICKLED)
    assert pickle._Unpickler(io.BytesIO(SEALED)).load() == pickle.loads(PICKLED)


def test_the_description_is_read_back() -> None:
    found, _ = read(SEALED)
    assert found is not None
    assert (found.step, found.metrics, found.nbytes, found.ranks) == (7, {"loss": 0.5}, 1 << 40, 16)
    assert found.filename == "step-{step}"


def test_one_small_read_is_enough_for_the_largest_description() -> None:
    description = Description(3, 7, {"m" * MAX_BYTES: 0.5}, 1.0).encode()  # more than is allowed
    found, requests = read(seal(bytes(1 << 20) + b".", description))
    assert found is not None
    assert len(requests) == 1
    assert sum(length for _, length in requests) <= 64 << 10


def test_the_pickle_comes_back() -> None:
    assert unseal(SEALED) == PICKLED


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_stock_file_has_no_description(protocol: int) -> None:
    stock = pickle.dumps({"state": 3}, protocol)
    assert read(stock)[0] is None
    assert unseal(stock) == stock


@given(place=st.integers(0, len(SEALED) - 1), bit=st.integers(0, 7))
def test_every_flipped_bit_is_noticed(place: int, bit: int) -> None:
    content = bytearray(SEALED)
    content[place] ^= 1 << bit
    with pytest.raises(CorruptCheckpointError):
        unseal(bytes(content))
    if place >= len(PICKLED):  # the rest is not looked at for a listing
        with pytest.raises(CorruptCheckpointError):
            read(bytes(content))


@given(length=st.integers(0, len(SEALED) - 1))
def test_a_file_that_is_cut_off_is_damaged_or_no_whole_pickle(length: int) -> None:
    content = SEALED[:length]
    for reading in (read, unseal):
        try:
            reading(content)
        except CorruptCheckpointError:
            continue
        # It ends in the byte that ends pickles, by chance: unpickling it decides.
        assert content.endswith(b".")


def test_bytes_that_were_added_are_noticed() -> None:
    with pytest.raises(CorruptCheckpointError):
        unseal(b"x" + SEALED)
    with pytest.raises(CorruptCheckpointError):
        read(b"x" + SEALED)
