"""Items that are larger or smaller than the pieces in which files are read, from stores of every kind."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import fsspec
import pytest
import torch

import asyncckpt
from asyncckpt import Checkpointer, CorruptCheckpointError
from asyncckpt.stores.local_file import LocalFile
from folders import DATA, MARK, save_by_stock, some_state
from sameness import assert_same
from support import flip

if TYPE_CHECKING:
    from pathlib import Path

STATE = some_state() | {"second": torch.arange(30_000), "third": torch.ones(5)}


@pytest.mark.parametrize("chunk", [4096, 16384, 1 << 20])
def test_every_item_is_checked_whatever_the_pieces_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(LocalFile, "chunk", chunk)
    monkeypatch.setattr(LocalFile, "readers", 2)
    path = save_by_stock(tmp_path / "saved", STATE)
    metadata = pickle.loads((path / MARK).read_bytes())
    with Checkpointer(tmp_path, create=False) as checkpointer:
        assert_same(checkpointer.load(path), asyncckpt.load(path))
        assert_same(checkpointer.load(path)["second"], STATE["second"])
        checkpointer.verify(path)
        content = (path / DATA).read_bytes()
        for index, info in metadata.storage_data.items():
            if index.fqn in {"large", "second", "third", "step"}:
                places = {content.index(b"\x80\x02", info.offset) + 1}  # in the pickle at the beginning
                places |= {info.offset + info.length // 2} if info.length > 4096 else set()
                for at in places:
                    flip(path / DATA, at)
                    for read in (checkpointer.verify, checkpointer.load):
                        with pytest.raises(CorruptCheckpointError, match=f"item {index.fqn}"):
                            read(path)
                    flip(path / DATA, at)
        checkpointer.verify(path)


def test_parts_of_a_file_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalFile, "chunk", 4096)
    path = save_by_stock(tmp_path / "saved", STATE)
    metadata = pickle.loads((path / MARK).read_bytes())
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == "second")
    flip(path / DATA, info.offset + info.length // 2)
    live = {"large": torch.zeros(300, 200), "third": torch.zeros(5)}
    with Checkpointer(tmp_path, create=False) as checkpointer:
        with pytest.warns(UserWarning, match="restored in part"):
            checkpointer.restore(live, path, strict=False)  # does not read the damaged item
        assert_same(live, {"large": STATE["large"], "third": STATE["third"]})
        with pytest.raises(CorruptCheckpointError, match="item second"):
            checkpointer.verify(path)


def test_folders_behind_a_url(tmp_path: Path) -> None:
    path = save_by_stock(tmp_path / "saved", STATE)
    remote = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}"
    for file in path.iterdir():
        remote.pipe_file(f"/{tmp_path.name}/saved/{file.name}", file.read_bytes())
    assert_same(asyncckpt.load(f"{url}/saved"), asyncckpt.load(path))
    with Checkpointer(url, create=False) as checkpointer:
        live = some_state(2) | {"second": torch.zeros(30_000, dtype=torch.int64), "third": torch.zeros(5)}
        checkpoint = checkpointer.restore(live, "saved")
        assert checkpoint is not None
        assert_same(live, STATE)
        checkpointer.verify("saved")
        content = bytearray(remote.cat_file(f"/{tmp_path.name}/saved/{DATA}"))
        content[len(content) // 2] ^= 1
        remote.pipe_file(f"/{tmp_path.name}/saved/{DATA}", bytes(content))
        with pytest.raises(CorruptCheckpointError, match="item "):
            checkpointer.verify("saved")
