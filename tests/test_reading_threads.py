"""Several threads share the pieces of a file that is read; an error or a cancellation stops them all."""

from __future__ import annotations

import itertools
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

import anyio
import pytest
import torch

from asyncckpt import Checkpointer, CorruptCheckpointError, StoreError
from asyncckpt._loading.reader import read_image, verify_file
from asyncckpt._threads import for_each_in_threads, in_thread
from asyncckpt.stores import LocalStore
from asyncckpt.stores.local_file import LocalFile
from file_operations import FaultyOps
from support import flip, payload_offset

if TYPE_CHECKING:
    from pathlib import Path


async def test_each_item_is_taken_once_by_one_of_several_threads() -> None:
    taken: SimpleQueue[int] = SimpleQueue()
    together = threading.Barrier(3)

    def take(item: int) -> None:
        if item < 3:
            together.wait(30)
        taken.put(item)

    await for_each_in_threads(take, range(100), 3)
    assert sorted(taken.get() for _ in range(100)) == list(range(100))
    assert taken.empty()


async def test_the_error_of_one_thread_is_raised_and_stops_the_others() -> None:
    failed = threading.Event()

    def fail_first(item: int) -> None:
        if item == 0:
            failed.set()
            raise OSError("no such sector")
        assert failed.wait(30)

    with pytest.raises(OSError, match="no such sector"):
        await for_each_in_threads(fail_first, itertools.count(), 2)


async def test_a_cancelled_caller_waits_for_the_running_calls_and_begins_no_others() -> None:
    begun: SimpleQueue[int] = SimpleQueue()
    done: list[int] = []
    may_go_on = threading.Event()

    def work(item: int) -> None:
        begun.put(item)
        assert may_go_on.wait(30)
        done.append(item)

    async with anyio.create_task_group() as group:
        group.start_soon(for_each_in_threads, work, range(100), 2)
        first = {await in_thread(begun.get) for _ in range(2)}
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.wait_all_tasks_blocked()  # all of them are told by now
            assert not done
            may_go_on.set()
    assert set(done) == first == {0, 1}
    assert begun.empty()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path) as checkpointer:
        saved = checkpointer.save(1, {"weight": torch.arange(50_000), "more": torch.arange(3000)})
        saved.committed.result(30)
    return tmp_path / "step-00000001.pt"


@pytest.mark.parametrize("chunk", [4096, 64 << 10, 1 << 20])
async def test_damage_in_any_piece_is_found(path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalFile, "chunk", chunk)
    store = LocalStore(str(path.parent))
    await verify_file(store, path.name)
    for offset in (0, 4095, 4096, 65_535, 65_536, 399_999):
        flip(path, payload_offset(path, "data/0") + offset)
        for read in (read_image, verify_file):
            with pytest.raises(CorruptCheckpointError, match="data/0"):
                await read(store, path.name)
        flip(path, payload_offset(path, "data/0") + offset)
    await verify_file(store, path.name)


async def test_a_failing_read_names_the_file(path: Path) -> None:
    ops = FaultyOps()
    store = LocalStore(str(path.parent), ops)
    ops.fail("preadv", OSError(5, "Input/output error"), at=2)
    with pytest.raises(StoreError, match=r"reading step-00000001\.pt"):
        await read_image(store, path.name)
