"""Reading while another process or thread replaces and evicts: the result is of one checkpoint."""

from __future__ import annotations

import mmap
import subprocess
import sys
import textwrap
import threading
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import asyncckpt
from asyncckpt import Checkpointer, CheckpointNotFoundError, LastN, StoreError
from asyncckpt._saving.engine import get_engine
from asyncckpt.stores import LocalStore, open_store
from asyncckpt.testing.doubles import WrapperStore
from support import faulty_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from asyncckpt.stores.base import OpenFile, Store

WRITER = textwrap.dedent("""
    import sys, torch
    from asyncckpt import Checkpointer, LastN

    directory, filename, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    ckpt = Checkpointer(directory, filename=filename, keep=LastN(1), overwrite=True)
    step = 0
    while True:
        step += 1
        ckpt.save(step, {"w": torch.full((size,), float(step)), "step": step})
        if step == 2:
            print("ready", flush=True)
    """)
SIZE = 3 << 18  # 3 MiB: read in direct and in buffered pieces


@pytest.fixture(params=["only.pt", "{step}.pt"])
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Let another process commit as fast as it can, under one name or keeping one file."""
    command = [sys.executable, "-c", WRITER, str(tmp_path), request.param, str(SIZE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield request.param
        process.kill()


def test_restore_returns_the_checkpoint_that_it_read_while_others_commit(tmp_path: Path, writer: str) -> None:
    ckpt = Checkpointer(tmp_path, filename=writer, create=False)
    seen = set()
    for _ in range(60):
        live: dict[str, Any] = {"w": torch.zeros(SIZE), "step": 0}
        found = ckpt.restore(live, missing_ok=True)
        assert found is not None, "there was a checkpoint at every moment"
        assert live["w"].unique().tolist() == [live["step"]] == [found.step]
        if writer != "only.pt":
            assert found.path.endswith(f"{found.step}.pt")
        assert ckpt.load()["step"] >= found.step
        seen.add(found.step)
    assert len(seen) > 1


@pytest.mark.parametrize("writer", ["only.pt"], indirect=True)
def test_a_file_that_is_replaced_again_and_again_is_read_whole(tmp_path: Path, writer: str) -> None:
    for _ in range(40):
        state = asyncckpt.load(tmp_path / "only.pt")
        assert state["w"].unique().tolist() == [state["step"]]
        Checkpointer(tmp_path, filename=writer, create=False).verify()


class Changing(WrapperStore):
    """Calls a function when a file has been opened."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.opened: list[str] = []
        self.change: Any = None

    async def before(self, operation: str, subject: str) -> None:
        pass

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[OpenFile]:
        if self.change is not None:
            change, self.change = self.change, None
            await asyncckpt._threads.in_thread(change, name)
        async with super().open(name) as file:
            self.opened.append(name)
            yield file


def state_of(value: float) -> dict[str, Any]:
    return {"w": torch.full((9,), float(value)), "step": int(value)}


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Changing:
    return Changing(open_store(tmp_path if request.param == "local" else f"memory://{tmp_path}"))


def test_the_directory_is_listed_again_if_a_file_is_evicted_before_it_is_opened(store: Changing) -> None:
    ckpt = Checkpointer(store=store, filename="{step}.pt")
    ckpt.save(1, state_of(1))
    ckpt.wait()
    ckpt.checkpoints()  # its description is known: the next open is that of the load

    def evict(name: str) -> None:
        get_engine().call(store.inner.remove, name)
        other = Checkpointer(ckpt.directory, filename="{step}.pt")
        other.save(2, state_of(2)).committed.result(30)

    store.change = evict
    live = state_of(0)
    found = ckpt.restore(live, missing_ok=True)
    assert found is not None
    assert (found.step, live["step"]) == (2, 2)


def test_missing_ok_requires_an_empty_listing(store: Changing) -> None:
    ckpt = Checkpointer(store=store, filename="{step}.pt")
    ckpt.save(1, state_of(1))
    ckpt.wait()
    ckpt.checkpoints()
    store.change = lambda name: get_engine().call(store.inner.remove, name)
    live = state_of(0)
    assert ckpt.restore(live, missing_ok=True) is None
    assert live["step"] == 0
    with pytest.raises(CheckpointNotFoundError):
        ckpt.load("1.pt")


def test_a_file_that_is_listed_and_can_never_be_opened_is_an_error(tmp_path: Path) -> None:
    store = faulty_store(tmp_path)
    ckpt = Checkpointer(store=store)
    ckpt.save(1, state_of(1))
    ckpt.wait()
    ckpt.checkpoints()  # its description is known: what is opened from now on is opened by the load
    store.fail("open", FileNotFoundError("gone"), times=None)
    with pytest.raises(StoreError, match="in each of 100 attempts"):
        ckpt.restore(state_of(0))


def test_a_step_that_is_replaced_by_another_is_not_found(tmp_path: Path) -> None:
    store = Changing(LocalStore(str(tmp_path)))
    ckpt = Checkpointer(store=store, filename="only.pt", overwrite=True)
    ckpt.save(1, state_of(1))
    ckpt.wait()
    ckpt.checkpoints()
    other = Checkpointer(tmp_path, filename="only.pt", overwrite=True)
    store.change = lambda _: other.save(2, state_of(2)).committed.result(30)
    with pytest.raises(CheckpointNotFoundError, match="no step 1"):
        ckpt.load(1)
    assert ckpt.load(2)["step"] == 2


def test_an_open_file_stays_the_same_file(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    ckpt = Checkpointer(tmp_path, filename="a.pt", overwrite=True, keep=LastN(1))
    large = {"w": torch.ones(3 << 20)}
    ckpt.save(1, large).committed.result(30)
    first = (tmp_path / "a.pt").read_bytes()
    replaced = threading.Event()

    async def read() -> bytes:
        async with store.open("a.pt") as file:
            await asyncckpt._threads.in_thread(replace)
            data = memoryview(bytearray(file.file.nbytes))
            await file.read(0, data[: 1 << 20])
            await file.read(1 << 20, data[1 << 20 :])
            return bytes(data)

    def replace() -> None:
        large["w"].zero_()
        ckpt.save(2, large).committed.result(30)
        replaced.set()

    assert get_engine().call(read) == first
    assert replaced.is_set()
    assert (tmp_path / "a.pt").read_bytes() != first


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_loaded_tensor_is_given_back_when_the_tensor_dies(tmp_path: Path) -> None:
    size = 64 << 20
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, {name: torch.full((size,), 7, dtype=torch.uint8) for name in "abc"})
        loaded = ckpt.load()
        assert all((tensor == 7).all() for tensor in loaded.values())
        before = resident()
        del loaded["a"]
        assert before - resident() > 0.9 * size
        del loaded["b"]
        assert before - resident() > 1.9 * size
        assert (loaded["c"] == 7).all()
        del loaded
        assert before - resident() > 2.9 * size


def test_a_remote_file_that_is_replaced_while_it_is_read_is_read_anew(tmp_path: Path) -> None:
    other = Checkpointer(f"memory://{tmp_path}", filename="a.pt", overwrite=True)
    other.save(1, state_of(1)).committed.result(30)

    class Replaced(WrapperStore):
        reads: int | None = None

        async def before(self, operation: str, _: str) -> None:
            if operation != "read" or self.reads is None:
                return
            self.reads += 1
            if self.reads == 2:  # the directory is read, the content not yet
                await asyncckpt._threads.in_thread(
                    lambda: other.save(2, state_of(2) | {"more": torch.ones(99)}).committed.result(30)
                )

    store = Replaced(open_store(f"memory://{tmp_path}"))
    ckpt = Checkpointer(store=store, filename="a.pt")
    store.reads = 0
    live = state_of(0) | {"more": torch.zeros(99)}
    found = ckpt.restore(live)
    assert found is not None
    assert (found.step, live["step"]) == (2, 2)
