"""Damaged and hostile folders: a clear error, nothing is executed, the live state stays as it is."""

from __future__ import annotations

import copy
import os
import pickle
import re
import resource
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

import asyncckpt
from asyncckpt import AsyncCkptError, Checkpointer, CorruptCheckpointError, UnsafeStateError
from folders import DATA, MARK, change_metadata, save_by_stock, save_described, some_state
from sameness import assert_same
from support import flip

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STRIDE = 331


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_by_stock(tmp_path / "saved", some_state())


def refused(path: Path, kind: type[Exception] = CorruptCheckpointError) -> str:
    """Return the message with which loading, restoring and verifying a folder fail, changing nothing."""
    live = some_state(2)
    expected = copy.deepcopy(live)
    with Checkpointer(path.parent, create=False) as checkpointer:
        with pytest.raises(kind) as restoring:
            checkpointer.restore(live, path)
        with pytest.raises(kind):
            checkpointer.load(path)
    assert_same(live, expected)
    assert str(path) in str(restoring.value)
    return str(restoring.value)


@pytest.mark.parametrize("bit", [0, 5])
def test_flipped_bit_in_a_data_file_is_found_or_changes_nothing(path: Path, bit: int) -> None:
    found = 0
    with Checkpointer(path.parent, create=False) as ckpt:
        state = ckpt.load(path)
        for offset in range(bit, (path / DATA).stat().st_size, STRIDE):
            flip(path / DATA, offset, bit)
            try:
                loaded = ckpt.load(path)
            except CorruptCheckpointError as error:
                found += str(path / DATA) in str(error)
            else:
                assert_same(loaded, state)
            flip(path / DATA, offset, bit)
    assert found > 40


def test_flipped_bit_of_each_item_is_found_by_verify(path: Path) -> None:
    metadata = pickle.loads((path / MARK).read_bytes())
    with Checkpointer(path.parent, create=False) as checkpointer:
        checkpointer.verify(path)
        for index, info in metadata.storage_data.items():
            # The first record's payload; an item of an empty tensor has one, too: its pickle.
            at = info.offset + (path / DATA).read_bytes()[info.offset :].index(b"\x80\x02")
            flip(path / DATA, at + 1)
            with pytest.raises(CorruptCheckpointError, match=index.fqn):
                checkpointer.verify(path)
            flip(path / DATA, at + 1)
        checkpointer.verify(path)


def test_flipped_bit_in_a_sealed_mark_is_found(tmp_path: Path) -> None:
    path = save_described(tmp_path, 1, some_state())
    with Checkpointer(tmp_path, create=False) as checkpointer:
        for offset in range(0, (path / MARK).stat().st_size, 61):
            flip(path / MARK, offset, offset % 8)
            with pytest.raises(AsyncCkptError, match=re.escape(str(path))):
                checkpointer.load(path)
            flip(path / MARK, offset, offset % 8)
        assert len(checkpointer.checkpoints()) == 1


def test_flipped_bit_in_a_stock_mark_leads_to_no_other_errors(path: Path) -> None:
    for offset in range(0, (path / MARK).stat().st_size, 61):
        flip(path / MARK, offset, offset % 8)
        with suppress(AsyncCkptError):
            asyncckpt.load(path)
        flip(path / MARK, offset, offset % 8)


def test_cut_off_files(path: Path) -> None:
    size = (path / DATA).stat().st_size
    os.truncate(path / DATA, size - 5000)
    assert "cut off" in refused(path)
    os.truncate(path / MARK, 100)
    refused(path)
    os.truncate(path / MARK, 0)
    refused(path)


def test_missing_data_file(path: Path) -> None:
    (path / DATA).unlink()
    assert f"{path / DATA} is missing" in refused(path)


def test_data_file_of_another_save(path: Path, tmp_path: Path) -> None:
    other = some_state()
    other["large"] = other["large"].half()
    other["model"]["bias"] = other["model"]["bias"].half()
    shutil.copy(save_by_stock(tmp_path / "other", other) / DATA, path / DATA)
    refused(path)


def test_item_of_another_dtype_than_the_metadata_says(path: Path) -> None:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata["model.bias"].properties.dtype = torch.float16

    change_metadata(path, change)
    assert "torch.bfloat16 [4] instead of torch.float16 [4]" in refused(path)


def moved(**fields: Any) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        index = MetadataIndex("model.weight", torch.Size([0, 0]))
        old = metadata.storage_data[index]
        metadata.storage_data[index] = _StorageInfo(
            **{"relative_path": old.relative_path, "offset": old.offset, "length": old.length} | fields
        )

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (moved(relative_path="../x"), "not one of a folder"),
        (moved(relative_path="/etc/passwd"), "not one of a folder"),
        (moved(relative_path="sub/x"), "not one of a folder"),
        (moved(relative_path=".."), "not one of a folder"),
        (moved(relative_path=".metadata"), "not one of a folder"),
        (moved(relative_path=""), "not one of a folder"),
        (moved(relative_path="other"), "is missing"),
        (moved(relative_path=7), "is damaged"),
        (moved(offset=-1), "negative"),
        (moved(offset=1 << 62), "cut off, or is of another checkpoint"),
        (moved(offset=1), "does not end as a zip"),
        (moved(length=1 << 62), "cut off, or is of another checkpoint"),
        (moved(length=-1), "negative"),
        (moved(length=0), "too few bytes"),
        (moved(length=64), "overlap|cut off|is damaged|does not end"),
        (moved(length="1"), "is damaged"),
        (moved(transform_descriptors=["zstd"]), "transformed by zstd"),
    ],
)
def test_item_that_is_not_where_the_metadata_says(
    path: Path, change: Callable[[Any], None], message: str
) -> None:
    change_metadata(path, change)
    text = refused(path)
    assert any(part in text for part in message.split("|")), text


def chunks(*boxes: tuple[list[int], list[int]], size: list[int] | None = None) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["model.weight"]
        entry.chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes]
        if size is not None:
            entry.size = torch.Size(size)
        info = metadata.storage_data.pop(MetadataIndex("model.weight", torch.Size([0, 0])))
        for offsets, _ in boxes:
            metadata.storage_data[MetadataIndex("model.weight", torch.Size(offsets))] = info

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (chunks(), "have 0 of its 12 elements"),
        (chunks(([0, 0], [2, 4])), "have 8 of its 12 elements"),
        (chunks(([0, 0], [2, 4]), ([1, 0], [1, 4])), "overlap"),
        (chunks(([0, 0], [2, 2]), ([0, 1], [2, 3]), ([2, 0], [1, 2])), "overlap"),
        (chunks(([0, 0], [3, 5])), "outside of its tensor"),
        (chunks(([1, 0], [3, 4])), "outside of its tensor"),
        (chunks(([0], [12])), "other dimensions"),
        (chunks(([0, 0], [1 << 40, 1 << 40]), size=[1 << 40, 1 << 40]), "too few bytes"),
        (chunks(([0, 0], [-3, -4]), size=[-3, -4]), "negative"),
        (chunks(([0, 0], [4, 3]), size=[4, 3]), "[3, 4] instead of"),
    ],
)
def test_chunks_that_are_not_the_tensor(path: Path, change: Callable[[Any], None], message: str) -> None:
    change_metadata(path, change)
    with pytest.raises(CorruptCheckpointError) as loading:
        asyncckpt.load(path)
    assert message in str(loading.value)


def with_path(key: str, *parts: object) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        metadata.planner_data[key] = parts

    return change


@pytest.mark.parametrize(
    "change",
    [
        with_path("step", "list", 1 << 40),
        with_path("step", "list", -1),
        with_path("step", "list", "x"),
        with_path("step", "model", "weight", "x"),
        with_path("step", "model", "weight"),
        with_path("step", "model"),
        with_path("step", *["x"] * 100_000),
        with_path("step"),
        with_path("step", 1.5),
    ],
)
def test_paths_that_make_no_state(path: Path, change: Callable[[Any], None]) -> None:
    change_metadata(path, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptCheckpointError, match=str(path)):
        asyncckpt.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (200 << 10)  # KiB


class Call:
    """Pickles to the call of a function."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["root", "planner_data", "storage_data", "key"])
def test_calls_in_the_metadata_are_not_made(path: Path, tmp_path: Path, where: str) -> None:
    call: Any = Call(tmp_path / "called")

    def change(metadata: Any) -> Any:
        if where == "root":
            return call
        if where == "key":
            metadata.state_dict_metadata[call] = metadata.state_dict_metadata["step"]
        else:
            setattr(metadata, where, call)
        return metadata

    change_metadata(path, change)
    refused(path, UnsafeStateError)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("key", ["model.weight", "step"])
def test_calls_in_items_are_not_made(path: Path, tmp_path: Path, key: str) -> None:
    torch.save(Call(tmp_path / "called"), path / "item.distcp")
    place = _StorageInfo("item.distcp", 0, (path / "item.distcp").stat().st_size)

    def change(metadata: Any) -> None:
        index = next(index for index in metadata.storage_data if index.fqn == key)
        metadata.storage_data[index] = place

    change_metadata(path, change)
    refused(path, UnsafeStateError)
    assert not (tmp_path / "called").exists()
