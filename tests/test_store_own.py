"""A store of the user's own, written from the docstrings of `asyncckpt.stores`, serves a Checkpointer."""

from __future__ import annotations

import itertools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncckpt import BestK, Checkpointer, CheckpointNotFoundError, CorruptCheckpointError, LastN, StoreError
from asyncckpt.stores import Draft, LocalStore, OpenFile, Store, StoredFile
from asyncckpt.testing.store_contract import StoreContract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

versions = itertools.count()


class DictStore(Store):
    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, str]] = {}

    def path_of(self, name: str) -> str:
        return f"dict://run/{name}"

    async def prepare(self) -> None:
        pass

    @asynccontextmanager
    async def draft(self, name: str, size: int) -> AsyncIterator[Draft]:
        yield DictDraft(self, name, size)

    async def list(self) -> Sequence[StoredFile]:
        return [StoredFile(name, len(data), version) for name, (data, version) in self.files.items()]

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[OpenFile]:
        yield DictFile(await self.stat(name), self.path_of(name), self.files[name][0])

    async def remove(self, name: str) -> None:
        self.files.pop(name, None)


class DictDraft(Draft):
    def __init__(self, store: DictStore, name: str, size: int) -> None:
        self._store, self._name, self._data = store, name, bytearray(size)

    async def write(self, offset: int, data: memoryview) -> None:
        self._data[offset : offset + len(data)] = data

    async def commit(self) -> None:
        self._store.files[self._name] = bytes(self._data), str(next(versions))


class DictFile(OpenFile):
    def __init__(self, file: StoredFile, path: str, data: bytes) -> None:
        self.file, self.path, self._data = file, path, data

    async def read(self, offset: int, into: memoryview) -> None:
        if offset + len(into) > len(self._data):
            raise StoreError(f"{self.path} ends before byte {offset + len(into)}")
        into[:] = self._data[offset : offset + len(into)]


class TestDictStore(StoreContract):
    def make_store(self) -> Store:
        return DictStore()


def state_of(value: float) -> dict[str, Any]:
    return {"w": torch.full((1 << 20,), float(value)), "n": value}


def test_a_run_is_saved_evicted_and_resumed() -> None:
    store = DictStore()
    with Checkpointer(store=store, keep=BestK(1, "loss") | LastN(1)) as ckpt:
        for step, loss in enumerate([2.0, 1.0, 3.0]):
            ckpt.save(step, state_of(step), metrics={"loss": loss})
        ckpt.wait()
        assert [checkpoint.step for checkpoint in ckpt.checkpoints()] == [1, 2]
        assert sorted(store.files) == ["step-00000001.pt", "step-00000002.pt"]
        assert repr(ckpt).startswith("<Checkpointer 'dict://run' ")
    again = Checkpointer(store=store, keep=BestK(1, "loss"))
    state = state_of(0)
    found = again.restore(state)
    assert found is not None
    assert (found.step, state["n"], state["w"][-1].item()) == (2, 2, 2.0)
    best = again.best()
    assert best is not None
    assert best.path == "dict://run/step-00000001.pt"
    assert again.load(best.path)["n"] == 1
    again.verify(best.path)
    assert again.save(3, state_of(3), metrics={"loss": 0.5}).committed.result(60).sequence == 4


def test_damage_in_it_is_found() -> None:
    store = DictStore()
    with Checkpointer(store=store) as ckpt:
        ckpt.save(1, state_of(1)).committed.result(60)
        data, _ = store.files["step-00000001.pt"]
        store.files["step-00000001.pt"] = data[:5000] + bytes([data[5000] ^ 1]) + data[5001:], "flipped"
        with pytest.raises(CorruptCheckpointError, match="dict://run/step-00000001"):
            ckpt.verify()


def test_a_reader_of_an_empty_one_is_refused() -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no directory dict://run"):
        Checkpointer(store=DictStore(), create=False)


def test_a_local_store_is_the_same_directory(tmp_path: Path) -> None:
    with Checkpointer(store=LocalStore(str(tmp_path / "run"))) as ckpt:
        ckpt.save(1, state_of(1))
    with Checkpointer(tmp_path / "run") as again:
        assert again.directory == ckpt.directory == str(tmp_path / "run")
        assert again.load(1)["n"] == 1


def test_a_directory_or_a_store_is_needed_and_not_both(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a directory or a store: both"):
        Checkpointer(tmp_path, store=DictStore())
    with pytest.raises(TypeError, match="a directory or a store: neither"):
        Checkpointer()
    with pytest.raises(TypeError, match=r"must be an asyncckpt\.stores\.Store, not 'runs'"):
        Checkpointer(store="runs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"storage_options .* not with a store; .*'key'"):
        Checkpointer(store=DictStore(), storage_options={"key": "k"})
    assert list(tmp_path.iterdir()) == []
