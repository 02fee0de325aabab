"""How saves queue up: back-pressure, bounded memory, order, and several at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch

import asyncckpt
from asyncckpt import BusyError, Checkpointer, SaveError, SaveSkipped
from asyncckpt._saving.engine import get_engine
from asyncckpt.testing import Gate
from support import assert_waits, gated_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def gate() -> Gate:
    return Gate()


def state_of(value: float, size: int = 5) -> dict[str, torch.Tensor]:
    return {"w": torch.full((size,), float(value))}


def steps(ckpt: Checkpointer) -> list[int | None]:
    return [checkpoint.step for checkpoint in ckpt.checkpoints()]


@pytest.fixture
def limit() -> Iterator[Any]:
    """Give the function that sets the memory limit, and put the limit back afterwards."""
    arena = get_engine().arena
    before = arena.limit
    arena.release()
    yield asyncckpt.set_memory_limit
    arena.set_limit(before)


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_a_save_waits_for_one_of_the_places_in_flight(tmp_path: Path, gate: Gate, max_in_flight: int) -> None:
    store = gated_store(tmp_path, gate)
    with Checkpointer(store=store, max_in_flight=max_in_flight) as ckpt, ThreadPoolExecutor(1) as pool:
        live = state_of(0)
        for step in range(max_in_flight):
            live["w"].fill_(step)
            assert ckpt.save(step, live).stats.queue_depth == step
        live["w"].fill_(max_in_flight)
        waiting = pool.submit(ckpt.save, max_in_flight, live)
        assert_waits(waiting.done)
        assert get_engine().arena.statistics().leases == max_in_flight
        gate.open()
        assert waiting.result(60).stats.wait > 0
        ckpt.wait()
        assert steps(ckpt) == list(range(max_in_flight + 1))
        for step in range(max_in_flight + 1):
            assert ckpt.load(step)["w"].tolist() == [step] * 5


def test_skip_gives_way_while_the_writer_is_busy(tmp_path: Path, gate: Gate) -> None:
    with Checkpointer(store=gated_store(tmp_path, gate), max_in_flight=2, when_busy="skip") as ckpt:
        saves = [ckpt.save(step, state_of(step)) for step in range(5)]
        assert [save.skipped for save in saves] == [False, False, True, True, True]
        assert all(save.snapshotted.done() for save in saves)
        for save in saves[2:]:
            with pytest.raises(SaveSkipped, match="2 earlier saves are still being written"):
                save.committed.result(0)
        assert get_engine().arena.statistics().leases == 2
        gate.open()
        ckpt.wait()
        assert not ckpt.save(9, state_of(9)).skipped
    assert steps(ckpt) == [0, 1, 9]


def test_replace_takes_the_place_of_the_queued_save(tmp_path: Path, gate: Gate) -> None:
    store = gated_store(tmp_path, gate, "draft")
    with Checkpointer(store=store, max_in_flight=2, when_busy="replace") as ckpt:
        saves = [ckpt.save(0, state_of(0))]
        gate.wait_for_arrival()
        saves += [ckpt.save(step, state_of(step)) for step in range(1, 6)]
        assert [save.skipped for save in saves] == [False, True, True, True, True, False]
        with pytest.raises(SaveSkipped, match="replaced in the queue by a newer save"):
            saves[2].committed.result(0)
        assert get_engine().arena.statistics().leases == 2
        gate.open()
    assert steps(ckpt) == [0, 5]
    assert ckpt.load(5)["w"].tolist() == [5] * 5


def test_memory_is_bounded_by_what_is_in_flight(tmp_path: Path) -> None:
    arena = get_engine().arena
    arena.release()
    state = state_of(1, 4 * MIB)
    with Checkpointer(tmp_path, max_in_flight=2) as ckpt:
        for step in range(8):
            state["w"].fill_(step)
            ckpt.save(step, state)
            statistics = arena.statistics()
            assert statistics.leases <= 2
            assert statistics.mapped <= 2 * 16 * MIB + 64 * MIB
        ckpt.wait()
        assert arena.statistics().leases == 0
        assert [ckpt.load(step)["w"].unique().tolist() for step in range(8)] == [[step] for step in range(8)]


def test_a_buffer_is_not_used_again_before_its_bytes_are_committed(tmp_path: Path) -> None:
    live = state_of(1, MIB)
    gate = Gate(opened=True)
    with Checkpointer(store=gated_store(tmp_path, gate, "write"), max_in_flight=2) as ckpt:
        ckpt.save(0, live)  # so that there is a free buffer to be used again
        ckpt.wait()
        gate.close()
        arrived = gate.arrived
        saves = [ckpt.save(1, live)]
        gate.wait_for_arrival(arrived + 1)
        live["w"].fill_(2)
        saves.append(ckpt.save(2, live))
        live["w"].fill_(3)
        gate.open()
        for save in saves:
            save.committed.result(60)
        assert ckpt.load(1)["w"].unique().tolist() == [1]
        assert ckpt.load(2)["w"].unique().tolist() == [2]


def test_a_snapshot_whose_save_was_replaced_frees_its_buffer(tmp_path: Path, gate: Gate) -> None:
    arena = get_engine().arena
    store = gated_store(tmp_path, gate, "draft")
    with Checkpointer(store=store, max_in_flight=2, when_busy="replace") as ckpt:
        ckpt.save(0, state_of(0, MIB))
        gate.wait_for_arrival()
        for step in range(1, 10):
            ckpt.save(step, state_of(step, MIB))
            assert arena.statistics().leases == 2
        gate.open()
    assert arena.statistics().leases == 0
    assert ckpt.load()["w"].unique().tolist() == [9]


def test_two_checkpointers_share_one_memory_limit(tmp_path: Path, gate: Gate, limit: Any) -> None:
    with (
        Checkpointer(store=gated_store(tmp_path / "a", gate), max_in_flight=4) as one,
        Checkpointer(tmp_path / "b", max_in_flight=4, when_busy="skip") as two,
        ThreadPoolExecutor(1) as pool,
    ):
        limit(20 * MIB)
        live = state_of(1, 2 * MIB)
        one.save(1, live)
        one.save(2, live)
        skipped = two.save(1, live)
        assert skipped.skipped
        with pytest.raises(SaveSkipped, match=r"no room for .* bytes of host memory"):
            skipped.committed.result(0)
        waiting = pool.submit(one.save, 3, live)
        assert_waits(waiting.done)
        assert get_engine().arena.statistics().mapped <= 20 * MIB
        gate.open()
        assert waiting.result(60).stats.wait > 0
        one.wait()
        assert not two.save(2, live).skipped
    assert get_engine().arena.statistics().mapped <= 20 * MIB
    assert (steps(one), steps(two)) == ([1, 2, 3], [2])


def test_a_state_above_the_memory_limit_is_refused_and_smaller_ones_go_on(tmp_path: Path, limit: Any) -> None:
    with Checkpointer(tmp_path) as ckpt:
        limit(MIB)
        with pytest.raises(SaveError, match=r"exceeds the limit of 1048576 .*set_memory_limit"):
            ckpt.save(1, state_of(1, MIB))
        ckpt.save(2, state_of(2))
        ckpt.wait()
        limit(None)
        ckpt.save(3, state_of(3, MIB))
    assert steps(ckpt) == [2, 3]
    for nonsense in (0, -1):
        with pytest.raises(ValueError, match="must be positive"):
            limit(nonsense)


def test_waiting_can_be_bounded_and_the_saves_go_on(tmp_path: Path, gate: Gate) -> None:
    ckpt = Checkpointer(store=gated_store(tmp_path, gate))
    save = ckpt.save(1, state_of(1))
    for give_up in (ckpt.wait, ckpt.close):
        with pytest.raises(BusyError, match=r"1 saves? .* pending after 0\.01 s; they continue") as told:
            give_up(timeout=0.01)
        assert isinstance(told.value, TimeoutError)
    with pytest.raises(SaveError, match="closed"):
        ckpt.save(2, state_of(2))
    gate.open()
    ckpt.close(timeout=60)
    assert save.committed.result(0).step == 1


def test_the_functions_save_load_and_wait(tmp_path: Path) -> None:
    live = state_of(1)
    saves = []
    for value in range(5):
        live["w"].fill_(value)
        saves.append(asyncckpt.save(live, tmp_path / "deep" / f"{value}.pt"))
    live["w"].fill_(9)
    asyncckpt.wait()
    assert all(save.committed.done() for save in saves)
    assert saves[3].committed.result(0).path == str(tmp_path / "deep" / "3.pt")
    assert saves[3].step is None
    for value in range(5):
        assert torch.load(tmp_path / "deep" / f"{value}.pt")["w"].tolist() == [value] * 5
        assert asyncckpt.load(tmp_path / "deep" / f"{value}.pt")["w"].tolist() == [value] * 5
    asyncckpt.save(live, tmp_path / "deep" / "3.pt")
    assert asyncckpt.load(str(tmp_path / "deep" / "3.pt"))["w"].tolist() == [9] * 5


def test_a_path_without_a_directory_is_one_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asyncckpt.save(state_of(3), "model.pt")
    monkeypatch.chdir("/")
    asyncckpt.wait()
    assert torch.load(tmp_path / "model.pt")["w"].tolist() == [3] * 5


@pytest.mark.parametrize("path", ["", "/"])
def test_a_path_that_names_no_file_is_refused(path: str) -> None:
    for call in (
        lambda: asyncckpt.save({}, path),
        lambda: asyncckpt.save({}, "directory/"),
        lambda: asyncckpt.load(path),
    ):
        with pytest.raises(ValueError, match="does not name a file"):
            call()


def test_several_threads_save_at_once(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def train(worker: int) -> None:
        live = state_of(worker, 10_000)
        together.wait()
        for step in range(worker * 10, worker * 10 + 5):
            live["w"].fill_(step)
            ckpt.save(step, live)
            asyncckpt.save(live, tmp_path / f"{step}.pt")

    with Checkpointer(tmp_path / "run", max_in_flight=2) as ckpt, ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(train, worker) for worker in range(4)]:
            done.result(60)
        ckpt.wait()
        asyncckpt.wait()
        listed = ckpt.checkpoints()
        assert [checkpoint.sequence for checkpoint in listed] == list(range(1, 21))
        for checkpoint in listed:
            for path in (checkpoint.path, str(tmp_path / f"{checkpoint.step}.pt")):
                assert torch.load(path)["w"].unique().tolist() == [checkpoint.step]
