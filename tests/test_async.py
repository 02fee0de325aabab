"""In async code nobody who waits blocks the event loop, and nobody who gives up waiting stops a save."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import torch

from asyncckpt import Checkpoint, Checkpointer, SaveError, SaveSkipped
from asyncckpt.testing import FaultyStore, Gate, SlowStore
from support import faulty_store, gated_store

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def faulty(tmp_path: Path) -> FaultyStore:
    """A store whose first commit fails."""
    store = faulty_store(tmp_path)
    store.fail("commit", OSError("the disk is gone"))
    return store


@pytest.fixture
def gated(faulty: FaultyStore, gate: Gate) -> SlowStore:
    """The same, with every commit held back until the gate is opened."""
    return SlowStore(faulty, gates={"commit": gate})


@pytest.fixture
def slow(tmp_path: Path, gate: Gate) -> SlowStore:
    """A store with every commit held back until the gate is opened."""
    return gated_store(tmp_path, gate)


def state_of(value: float) -> dict[str, Any]:
    return {"w": torch.full((5,), value)}


async def test_awaiting_a_save_gives_its_checkpoint(tmp_path: Path) -> None:
    async with Checkpointer(tmp_path) as ckpt:
        checkpoint = await ckpt.save(3, state_of(1))
        assert checkpoint == ckpt.latest()
        assert torch.load(checkpoint.path)["w"].tolist() == [1] * 5


async def test_a_save_can_be_awaited_again_and_by_several(gate: Gate, slow: SlowStore) -> None:
    async with Checkpointer(store=slow) as ckpt:
        save = ckpt.save(3, state_of(1))

        async def wait() -> Checkpoint:
            return await save

        waiting = [asyncio.create_task(wait()) for _ in range(3)]
        await gate.arrival()
        gate.open()
        first, *others = await asyncio.gather(*waiting)
        assert others == [first, first]
        assert await save == first


async def test_the_loop_runs_while_a_save_is_awaited(gate: Gate, slow: SlowStore) -> None:
    """Only the loop itself opens the gate, so a loop that were blocked would stay so."""
    async with Checkpointer(store=slow) as ckpt:
        save = ckpt.save(1, state_of(1))
        opener = asyncio.create_task(open_once_reached(gate))
        await save
        await opener


async def test_the_loop_runs_while_the_block_is_left(gate: Gate, slow: SlowStore) -> None:
    async with Checkpointer(store=slow) as ckpt:
        ckpt.save(1, state_of(1))
        opener = asyncio.create_task(open_once_reached(gate))
    await opener
    assert [checkpoint.step for checkpoint in ckpt.checkpoints()] == [1]


async def open_once_reached(gate: Gate) -> None:
    await gate.arrival()
    for _ in range(100):
        await asyncio.sleep(0)
    gate.open()


async def test_giving_up_waiting_does_not_stop_the_save(gate: Gate, slow: SlowStore) -> None:
    async with Checkpointer(store=slow) as ckpt:
        save = ckpt.save(1, state_of(1))
        await gate.arrival()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(save, 0.001)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(save.committed), 0.001)
        with anyio.move_on_after(0.001) as scope:
            await save
        assert scope.cancelled_caught
        task = asyncio.ensure_future(save)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not save.committed.cancelled()
        gate.open()
        assert (await save).step == 1


def test_the_futures_cannot_be_cancelled(gate: Gate, slow: SlowStore) -> None:
    with Checkpointer(store=slow) as ckpt:
        save = ckpt.save(1, state_of(1))
        assert not save.committed.cancel()
        assert not save.snapshotted.cancel()
        gate.open()
        assert save.committed.result(60).step == 1
        assert not save.committed.cancel()
        assert not save.committed.cancelled()


async def test_several_saves_are_awaited_together(tmp_path: Path, gate: Gate, slow: SlowStore) -> None:
    async with Checkpointer(store=slow, max_in_flight=3) as ckpt, Checkpointer(tmp_path / "b") as other:
        saves = [ckpt.save(step, state_of(step)) for step in (1, 2, 3)]
        opener = asyncio.create_task(open_once_reached(gate))
        checkpoints = await asyncio.gather(*saves, other.save(9, state_of(9)))
        await opener
        assert [checkpoint.step for checkpoint in checkpoints] == [1, 2, 3, 9]


async def test_a_failure_is_raised_by_await_and_then_by_nobody_else(faulty: FaultyStore) -> None:
    async with Checkpointer(store=faulty) as ckpt:
        with pytest.raises(SaveError, match="the disk is gone"):
            await ckpt.save(1, state_of(1))
        assert (await ckpt.save(2, state_of(2))).step == 2


async def test_a_failure_that_nobody_awaited_is_raised_by_leaving_the_block(faulty: FaultyStore) -> None:
    with pytest.raises(SaveError, match="the disk is gone"):
        async with Checkpointer(store=faulty) as ckpt:
            ckpt.save(1, state_of(1))


async def test_a_failure_after_waiting_was_given_up_is_still_reported(gate: Gate, gated: SlowStore) -> None:
    ckpt = Checkpointer(store=gated)
    save = ckpt.save(1, state_of(1))
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(save, 0.001)
    gate.open()
    with pytest.raises(SaveError, match="the disk is gone"):
        await asyncio.to_thread(ckpt.close)


async def test_the_exception_of_the_block_is_not_hidden(faulty: FaultyStore) -> None:
    with pytest.raises(ZeroDivisionError) as told:  # noqa: PT012 - leaving the block must not change it
        async with Checkpointer(store=faulty) as ckpt:
            ckpt.save(1, state_of(1))
            _ = 1 / 0
    assert "the disk is gone" in str(getattr(told.value, "__notes__", "the disk is gone"))


async def test_a_skipped_save_says_so_when_awaited(gate: Gate, slow: SlowStore) -> None:
    async with Checkpointer(store=slow, when_busy="skip") as ckpt:
        first = ckpt.save(1, state_of(1))
        skipped = ckpt.save(2, state_of(2))
        assert skipped.skipped
        with pytest.raises(SaveSkipped, match="still being written"):
            await skipped
        gate.open()
        await first


async def test_cancelling_the_block_still_finishes_its_saves(
    tmp_path: Path, gate: Gate, slow: SlowStore
) -> None:
    async def run() -> None:
        async with Checkpointer(store=slow) as ckpt:
            ckpt.save(1, state_of(1))
            await asyncio.sleep(3600)

    task = asyncio.create_task(run())
    await gate.arrival()
    task.cancel()
    await open_once_reached(gate)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert torch.load(tmp_path / "step-00000001.pt")["w"].tolist() == [1] * 5


async def test_a_failure_behind_a_cancelled_block_is_told_by_the_next_call(
    gate: Gate, gated: SlowStore
) -> None:
    ckpt = Checkpointer(store=gated)
    leaving = asyncio.Event()

    async def run() -> None:
        async with ckpt:
            ckpt.save(1, state_of(1))
            leaving.set()

    task = asyncio.create_task(run())
    await leaving.wait()
    await gate.arrival()
    await asyncio.sleep(0)  # it waits in the end of the block by now
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open()
    with pytest.raises(SaveError, match="the disk is gone"):
        await asyncio.to_thread(ckpt.wait)
    await asyncio.to_thread(ckpt.wait)


async def test_a_cancelled_scope_waits_for_the_end_of_the_block(gate: Gate, slow: SlowStore) -> None:
    with anyio.CancelScope() as scope:
        async with Checkpointer(store=slow) as ckpt:
            save = ckpt.save(1, state_of(1))
            scope.cancel()
            opening = asyncio.create_task(open_once_reached(gate))
    await opening
    assert save.committed.result(0).step == 1


def test_one_checkpointer_serves_several_event_loops(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, max_in_flight=4) as ckpt:

        async def train(step: int) -> None:
            assert (await ckpt.save(step, state_of(step))).step == step

        threads = [threading.Thread(target=asyncio.run, args=(train(step),)) for step in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert {checkpoint.step for checkpoint in ckpt.checkpoints()} == set(range(4))
