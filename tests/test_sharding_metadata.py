"""Metadata of checkpoints: those of stock DCP are read as they are, and nothing of a hostile one is run."""

from __future__ import annotations

import gc
import os
import pickle
import resource
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save

from asyncckpt._sharding.metadata import dump_metadata, load_metadata
from asyncckpt._sharding.planning import LocalPlan, global_plan
from asyncckpt.errors import CorruptCheckpointError, UnsafeStateError

pytestmark = [  # of stock DCP
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

STATE = {
    "model": {"weight": torch.ones(3, 4, dtype=torch.bfloat16), "count": torch.tensor(1)},
    "list": [torch.ones(2), {"x": torch.ones(0, 2, dtype=torch.float8_e4m3fn)}],
    "step": 3,
}


@pytest.fixture
def stock(tmp_path: Path) -> bytes:
    save(STATE, checkpoint_id=tmp_path / "stock", no_dist=True)
    return (tmp_path / "stock" / ".metadata").read_bytes()


def same(ours: Metadata, theirs: Metadata) -> bool:
    theirs.storage_meta = ours.storage_meta
    places = [
        [(index, index.index, place) for index, place in m.storage_data.items()] for m in (ours, theirs)
    ]
    return ours == theirs and places[0] == places[1]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_of_stock_dcp_are_read(stock: bytes, protocol: int) -> None:
    expected = pickle.loads(stock)
    again = pickle.dumps(expected, protocol)
    assert same(load_metadata(again, "here"), expected)
    assert same(load_metadata(again + b"and what follows", "here"), expected)


def test_our_metadata_are_read_by_pickle_and_by_us(stock: bytes) -> None:
    plan = LocalPlan(STATE)
    final = global_plan([plan.encode()])
    kept = plan.keep(final.kept[0])
    assert [tuple(tensor.shape) for tensor in kept.tensors(plan.flat)] == [(3, 4), (), (2,), (0, 2)]
    assert kept.objects(plan.flat) == [3]
    extents = np.array([[64 * position, 50 + position] for position in range(5)])
    data = final.write("a.", ["__0_0.distcp"], [extents])
    ours, theirs = pickle.loads(data), pickle.loads(stock)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert getattr(ours, "version", None) == getattr(theirs, "version", None)
    assert {index.fqn: place.length for index, place in ours.storage_data.items()} == {
        "model.weight": 50, "model.count": 51, "list.0": 52, "list.1.x": 53, "step": 54,
    }  # fmt: skip
    assert {place.relative_path for place in ours.storage_data.values()} == {"a.__0_0.distcp"}
    assert same(load_metadata(data, "here"), ours)


@pytest.mark.parametrize("prefix", ["b.", "longer."])
def test_metadata_that_are_written_again_have_the_new_names_and_places(prefix: str) -> None:
    plan = LocalPlan(STATE)
    final = global_plan([plan.encode(), plan.encode()])
    files = ["__0_0.distcp", "__1_0.distcp"]
    extents = [np.array([[64 * n, 50] for n in range(len(kept) // 4)]) for kept in final.kept]
    first = final.write("a.", files, extents)
    again = final.write(prefix, files, extents)
    assert again == first.replace(b"a.__", b"b.__") or prefix != "b."
    moved = final.write(prefix, files, [extents[0] + 64, extents[1]])
    for data, by in ((first, 0), (again, 0), (moved, 64)):
        places = pickle.loads(data).storage_data.values()
        names = {place.relative_path for place in places}
        assert names == {("a." if data is first else prefix) + file for file in files}
        assert min(place.offset for place in places if "__0_" in place.relative_path) == by


def whole(**changes: Any) -> Metadata:
    """Metadata of one tensor and one object, with changes."""
    size = torch.Size([2, 3])
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), size)
    values: dict[str, Any] = {
        "state_dict_metadata": {
            "a": TensorStorageMetadata(TensorProperties(), size, [chunk]),
            "b": BytesStorageMetadata(),
        },
        "planner_data": {"a": ("a",), "b": ("b",)},
        "storage_data": {
            MetadataIndex("a", [0, 0], 0): _StorageInfo("__0_0.distcp", 0, 10),
            MetadataIndex("b"): _StorageInfo("__0_0.distcp", 10, 10),
        },
    }
    return Metadata(**{**values, **changes})


def tensor(**changes: Any) -> dict[str, Any]:
    size = torch.Size([2, 3])
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), size)
    values = {"properties": TensorProperties(), "size": size, "chunks": [chunk], **changes}
    return {"state_dict_metadata": {"a": TensorStorageMetadata(**values), "b": BytesStorageMetadata()}}


def place(**changes: Any) -> dict[str, Any]:
    values = {"relative_path": "x", "offset": 0, "length": 1, **changes}
    return {"storage_data": {MetadataIndex("a", [0, 0]): _StorageInfo(**values)}}


def test_what_the_damaged_ones_are_changed_from_is_read() -> None:
    for metadata in (whole(), whole(**tensor()), whole(**place())):
        assert same(load_metadata(dump_metadata(metadata), "here"), metadata)


@pytest.mark.parametrize(
    "changes",
    [
        {"state_dict_metadata": None},
        {"state_dict_metadata": {1: BytesStorageMetadata()}},
        {"state_dict_metadata": {"a": "tensor"}},
        {"state_dict_metadata": {"a": MetadataIndex("a")}},
        {"planner_data": {"a": "a"}},
        {"planner_data": {"a": ()}},
        {"planner_data": {"a": (("a",),)}},
        {"planner_data": [1]},
        {"storage_data": None},
        {"storage_data": {"a": "there"}},
        {"version": 3},
        tensor(size=(2, 3)),
        tensor(size=torch.Size([2])),
        tensor(size=torch.Size([-1, 3])),
        tensor(size=torch.Size([2, 2])),
        tensor(chunks=None),
        tensor(chunks=[1]),
        tensor(chunks=[ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([2, 3]))]),
        tensor(chunks=[ChunkStorageMetadata(torch.Size([0, -1]), torch.Size([2, 3]))]),
        tensor(properties=None),
        tensor(properties=TensorProperties(layout=torch.sparse_coo)),
        place(relative_path=None),
        place(relative_path=b"x"),
        place(offset=-1),
        place(offset=1.0),
        place(offset=True),
        place(length=1 << 64),
        place(transform_descriptors=[1]),
        place(transform_descriptors="zstd"),
    ],
    ids=repr,
)
def test_damaged_metadata_are_refused(changes: dict[str, Any]) -> None:
    if "version" in changes and not hasattr(whole(), "version"):
        pytest.skip("this torch has no version in it")
    with pytest.raises(CorruptCheckpointError, match=r"^here: its \.metadata is damaged: "):
        load_metadata(dump_metadata(whole(**changes)), "here")


@pytest.mark.parametrize("state", [None, 1, [], OrderedDict(), MetadataIndex("a"), torch.Size([1])])
def test_other_pickles_are_refused(state: Any) -> None:
    with pytest.raises(CorruptCheckpointError):
        load_metadata(pickle.dumps(state), "here")


def test_every_truncation_and_many_bit_flips_end_in_our_errors(stock: bytes) -> None:
    for end in range(0, len(stock), 7):
        with pytest.raises((CorruptCheckpointError, UnsafeStateError)):
            load_metadata(stock[:end], "here")
    generator = np.random.default_rng(0)
    for _ in range(2000):
        flipped = bytearray(stock)
        flipped[generator.integers(len(stock))] ^= 1 << generator.integers(8)
        try:
            load_metadata(bytes(flipped), "here")
        except (CorruptCheckpointError, UnsafeStateError):
            continue


class Runs:
    """An object whose pickle calls something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_of_a_hostile_pickle_is_run(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "run"
    for hostile in (
        Runs(os.mkdir, str(mark)),
        Runs(eval, f"__import__('os').mkdir({str(mark)!r})"),
        Runs(Path.touch, mark),
        Runs(torch.load, str(mark)),
    ):
        for data in (hostile, whole(planner_data=hostile), whole(**tensor(size=hostile))):
            with pytest.raises(UnsafeStateError, match="was not loaded"):
                load_metadata(pickle.dumps(data, protocol), "here")
    assert not mark.exists()


def test_getattr_is_never_called() -> None:
    # Python 3.11 has pickled members of an Enum by it.
    with pytest.raises(CorruptCheckpointError):
        load_metadata(pickle.dumps(whole(planner_data=Runs(getattr, "", "join"))), "here")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04r\xff\xff\xff\x7f.",
        b"\x80\x04p2000000000\n.",
        b"\x80\x04]r\x00\x00\x00\x01.",
        b"\x80\x04\x8d\xff\xff\xff\xff\x00\x00\x00\x00.",
        b"\x80\x04X\xff\xff\xff\x7f.",
        b"\x80\x04\x96\xff\xff\xff\xff\x00\x00\x00\x00.",
        b"\x80\x04\x95\xff\xff\xff\xff\x00\x00\x00\x00N.",
        b"\x80\x04L" + b"9" * 100_000 + b"\n.",
        b"\x82\x01.",
        b"(" * 100_000 + b".",
        b"",
    ],
    ids=lambda data: repr(data[:12]),
)
def test_memory_is_bounded_by_the_size_of_the_file(data: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptCheckpointError):
        load_metadata(data, "here")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_the_collector_of_garbage_is_as_it_was(stock: bytes) -> None:
    assert gc.isenabled()
    load_metadata(stock, "here")
    with pytest.raises(CorruptCheckpointError):
        load_metadata(b"\x80\x04.", "here")
    assert gc.isenabled()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("hidden", [b"", b"Nb", b"(e", b"(u"], ids=["plain", "built", "extended", "updated"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_key_whose_hash_would_take_for_ever_is_refused(protocol: int, hidden: bytes) -> None:
    """Each tuple of the tower holds the one before twice."""
    data = b"\x80\x02}(K\x01\x85" if protocol == 2 else b"\x80\x04}(K\x01\x85"
    for place in range(101):
        note = bytes([ord("q"), place]) if protocol == 2 else b"\x94"
        data += hidden + note + bytes([ord("h"), place, ord("h"), place, 0x86])
    with pytest.raises(CorruptCheckpointError, match="tuple twice"):
        load_metadata(data + b"u.", "here")
