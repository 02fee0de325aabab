"""A rank's data file: each of its items is a file of torch.save, and stock DCP reads them."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from asyncckpt._snapshot.freeze import Freezer
from asyncckpt._snapshot.shards import shards_of
from asyncckpt.layout.description import Description
from asyncckpt.layout.folder_mark import seal
from asyncckpt.layout.item_file import Blob, ItemFile
from asyncckpt.layout.zip_reader import read_directory
from item_files import Items, metadata_of, saved, written
from sameness import assert_same, raw
from states import DTYPES, filled
from support import torch_round_trip

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GIB = 1 << 30
# torch makes tensors of these, but copies and compares none.
COPIED = [dtype for dtype in DTYPES if dtype not in {torch.bits8, torch.complex32}]


def shaped() -> dict[str, Any]:
    """Return tensors of all dtypes, of all kinds of shapes and strides, and what is no tensor."""
    base = filled(4000, torch.float32, 1)
    state: dict[str, Any] = {str(dtype): filled(7, dtype, 3) for dtype in COPIED}
    state |= {
        "scalar": filled(1, torch.float32, 5)[0],
        "one element": filled(1, torch.bfloat16, 5),
        "no element": torch.empty(0, 3),
        "part of a storage": base[100:150].view(5, 10),
        "bytes at an odd address": raw(base.untyped_storage())[13:77],
        "transposed": base[:60].view(6, 10).t(),
        "channels last": filled(120, torch.float32, 7)
        .view(2, 5, 3, 4)
        .contiguous(memory_format=torch.channels_last),
        "with gaps": base[:60].view(6, 10)[:, 2:5],
        "expanded": base[:6].view(6, 1).expand(6, 4),
        "every second": base[1:100:2],
        "conjugate": filled(8, torch.complex64, 2).conj(),
        "negative": filled(8, torch.complex64, 2).conj().imag,
        "parameter": torch.nn.Parameter(filled(33, torch.float32, 9)),
        "large": filled(40_000, torch.float32, 11),
    }
    return state | {"object": {"step": 3}, "with tensors": [filled(5, torch.float32, 1)]}


def blobs_of(state: dict[str, Any]) -> list[Blob]:
    frozen, _ = Freezer().freeze(state["object"])
    return [Blob(frozen.data_pickle()), Blob(saved(state["with tensors"]), is_zip=True)]


def bytes_in_order(tensor: torch.Tensor) -> list[int]:
    """Return the bytes of all elements, by their indices."""
    copy = tensor.clone(memory_format=torch.contiguous_format)
    content: list[int] = raw(copy.untyped_storage()).tolist()
    return content


def tensors_of(state: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in state.values() if isinstance(value, torch.Tensor)]


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return shaped()


@pytest.fixture(scope="module")
def file(state: dict[str, Any]) -> tuple[bytes, list[tuple[int, int]]]:
    return written(tensors_of(state), blobs_of(state))


def items(file: tuple[bytes, list[tuple[int, int]]]) -> list[bytes]:
    content, extents = file
    return [content[offset : offset + length] for offset, length in extents]


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same values on a storage without other bytes; a dense one keeps its strides."""
    return tensor.detach().resolve_conj().resolve_neg().clone()


def test_each_item_is_a_file_of_torch_save(
    file: tuple[bytes, list[tuple[int, int]]], state: dict[str, Any]
) -> None:
    for (name, value), item in zip(state.items(), items(file), strict=True):
        expected = compact(value) if isinstance(value, torch.Tensor) else value
        assert_same(torch.load(io.BytesIO(item), weights_only=True), torch_round_trip(expected))
        with zipfile.ZipFile(io.BytesIO(item)) as archive:
            assert archive.testzip() is None, name
            with zipfile.ZipFile(io.BytesIO(saved(expected))) as theirs:
                assert set(archive.namelist()) == set(theirs.namelist())
                if not isinstance(value, list):
                    assert archive.read("archive/data.pkl") == theirs.read("archive/data.pkl"), name


def test_items_are_aligned_and_what_lies_between_them_is_zero(
    file: tuple[bytes, list[tuple[int, int]]],
) -> None:
    content, extents = file
    end = 0
    for offset, length in extents:
        assert offset % 64 == 0
        assert 0 <= offset - end < 64
        assert not any(content[end:offset])
        end = offset + length
    assert len(content) - end < 64
    assert not any(content[end:])


def test_a_flipped_bit_in_a_tensor_fails_the_zip_test(
    file: tuple[bytes, list[tuple[int, int]]], state: dict[str, Any]
) -> None:
    for value, item in zip(tensors_of(state), items(file), strict=False):
        for place in {0, value.nbytes - 1} if value.nbytes else ():
            damaged = bytearray(item)
            damaged[payload_start(item) + place] ^= 0x10
            with zipfile.ZipFile(io.BytesIO(damaged)) as archive:
                assert archive.testzip() == "archive/data/0"


def payload_start(item: bytes) -> int:
    reader: Any = torch._C.PyTorchFileReader(io.BytesIO(item))
    start: int = reader.get_record_offset("data/0")
    return start


@pytest.mark.filterwarnings("ignore:.*torch.distributed is.*:UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_stock_dcp_loads_it(
    file: tuple[bytes, list[tuple[int, int]]], state: dict[str, Any], tmp_path: Path
) -> None:
    content, extents = file
    (tmp_path / "__0_0.distcp").write_bytes(content)
    description = Description(1, 7, {}, 1.0, nbytes=len(content), ranks=1)
    (tmp_path / ".metadata").write_bytes(
        seal(pickle.dumps(metadata_of(state, extents)), description.encode())
    )
    target: dict[str, Any] = {
        name: torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else None
        for name, value in state.items()
    }
    load(target, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            expected = torch.zeros(value.shape, dtype=value.dtype).copy_(value.detach())
            assert_same(target[name], expected)
        else:
            assert_same(target[name], torch_round_trip(value))


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
def test_items_of_all_dtypes() -> None:
    tensors = [filled(7, dtype, 3) for dtype in DTYPES]
    for tensor, item in zip(tensors, items(written(tensors)), strict=True):
        found = torch.load(io.BytesIO(item), weights_only=tensor.dtype is not torch.bits8)
        assert found.dtype is tensor.dtype
        assert bytes(found.untyped_storage()) == bytes(tensor.untyped_storage())


@settings(max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=3), max_size=8),
    dtypes=st.lists(st.sampled_from(COPIED), min_size=8, max_size=8),
    order=st.randoms(),
    chunk=st.integers(20, 5000),
    blobs=st.integers(0, 3),
)
def test_items_of_any_shapes_and_strides(
    shapes: list[list[int]], dtypes: list[torch.dtype], order: Any, chunk: int, blobs: int
) -> None:
    tensors = []
    for seed, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False)):
        dims = list(range(len(shape)))
        order.shuffle(dims)
        tensor = filled(10 + int(torch.Size(shape).numel()), dtype, seed)[order.randrange(10) :]
        tensors.append(tensor[: torch.Size(shape).numel()].view(shape).permute(dims))
    expected: list[Any] = [*tensors, *range(blobs)]
    texts = [Blob(Freezer().freeze(number)[0].data_pickle()) for number in range(blobs)]
    for value, item in zip(expected, items(written(tensors, texts, chunk)), strict=True):
        found = torch.load(io.BytesIO(item), weights_only=True)
        with zipfile.ZipFile(io.BytesIO(item)) as archive:
            assert archive.testzip() is None
        if isinstance(value, torch.Tensor):
            assert (found.dtype, found.shape, found.stride()) == (value.dtype, value.shape, value.stride())
            assert found.untyped_storage().nbytes() == value.nbytes
            assert (
                raw(found.contiguous().untyped_storage()).tolist()
                == raw(value.clone(memory_format=torch.contiguous_format).untyped_storage()).tolist()
            )
        else:
            assert found == value


def test_a_rank_without_items_writes_nothing() -> None:
    assert written([]) == (b"", [])


def test_a_rank_with_objects_alone() -> None:
    content, extents = written([], [Blob(saved(3), is_zip=True), Blob(saved([4]), is_zip=True)])
    assert [torch.load(io.BytesIO(item)) for item in items((content, extents))] == [3, [4]]


def two_tensors() -> tuple[ItemFile, Items]:
    shards, _ = shards_of([torch.zeros(3), torch.zeros(5)], ["a", "b"])
    return ItemFile(), Items(shards.pickles, shards.sizes)


def test_the_same_tensors_are_laid_out_once() -> None:
    made, known = two_tensors()
    body = made.lay_out(known)
    assert made.lay_out(Items(list(known.pickles), list(known.sizes), [Blob(b"other")])) is body


def other_size(known: Items) -> Items:
    return Items(known.pickles, [12, 24])


def other_record(known: Items) -> Items:
    return Items([known.pickles[0], known.pickles[1].replace(b"K\x05", b"K\x06")], known.sizes)


def one_less(known: Items) -> Items:
    return Items(known.pickles[:1], known.sizes[:1])


@pytest.mark.parametrize("change", [other_size, other_record, one_less])
def test_other_tensors_are_laid_out_anew(change: Callable[[Items], Items]) -> None:
    made, known = two_tensors()
    before = made.plan(known, made.lay_out(known), b"")
    other = change(known)
    body = made.lay_out(other)
    fresh = ItemFile()
    expected = fresh.lay_out(other)
    assert body.literals == expected.literals
    assert body.literals != before.literals
    assert body.slots.tolist() == expected.slots.tolist()
    assert body.extents.tolist() == expected.extents.tolist()


def test_items_beyond_4_gib(tmp_path: Path) -> None:
    """Every offset in an item counts from its beginning, wherever in the file that is."""
    shards, _ = shards_of([torch.zeros(3), torch.zeros(5), torch.zeros(2)], ["a", "b", "c"])
    known = Items(shards.pickles, [12, 5 * GIB, 8])
    made = ItemFile()
    plan = made.plan(known, made.lay_out(known), b"")
    assert int(plan.extents[2, 0]) > 5 * GIB
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        for offset, literal in plan.literals:
            file.seek(offset)
            file.write(literal)
        file.truncate(plan.size)
    starts = plan.body.starts.tolist()
    for start, (offset, length), pickled, size in zip(
        starts, plan.extents.tolist(), known.pickles, known.sizes, strict=True
    ):
        records = records_of(path, offset, length)
        assert records["archive/data/0"] == (start - offset, start + size - offset)
        begin, end = records["archive/data.pkl"]
        with path.open("rb") as file:
            file.seek(offset + begin)
            assert file.read(end - begin) == pickled


def records_of(path: Path, offset: int, length: int) -> dict[str, tuple[int, int]]:
    """Return where the records of an item are in it, as the reading side finds them."""
    reading = read_directory(length)
    with path.open("rb") as file:
        try:
            at, nbytes = next(reading)
            while True:
                file.seek(offset + at)
                at, nbytes = reading.send(file.read(nbytes))
        except StopIteration as end:
            found = end.value
    ranges = zip(found.names, found.starts.tolist(), found.stops.tolist(), strict=True)
    return {name: (start, stop) for name, start, stop in ranges}
