"""Threads, host memory and descriptors are given back when nobody uses them any more."""

from __future__ import annotations

import gc
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

import asyncckpt
from asyncckpt import BusyError, Checkpointer, SaveError
from asyncckpt._saving.engine import get_engine
from asyncckpt.testing import Gate
from interrupts import wait_until
from support import gated_store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture(autouse=True)
def released() -> None:
    gc.collect()
    asyncckpt.release()


def state() -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(SIZE // 4)}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held() -> tuple[int, int, int]:
    """Return the bytes of host memory, the threads and the descriptors that asyncckpt holds."""
    threads = [t for t in threading.enumerate() if t.name.startswith(("asyncckpt", "AnyIO"))]
    return asyncckpt.statistics().memory, len(threads), len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_the_last_close_gives_memory_threads_and_descriptors_back(tmp_path: Path) -> None:
    live, nothing = state(), held()
    first, second = Checkpointer(tmp_path / "a"), Checkpointer(tmp_path / "b")
    before = resident()
    first.save(1, live)
    first.wait()
    assert asyncckpt.statistics().memory >= SIZE
    assert resident() - before > SIZE // 2
    first.close()
    assert asyncckpt.statistics().memory >= SIZE, "the second one still uses it"
    second.close()
    assert held() == nothing
    assert resident() - before < SIZE // 2
    with Checkpointer(tmp_path / "c") as third:
        assert third.save(1, live).committed.result(60).step == 1


def test_between_saves_memory_and_threads_stay(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as ckpt:
        for step in range(3):
            ckpt.save(step, state())
            ckpt.wait()
            statistics = asyncckpt.statistics()
            assert (statistics.pending, statistics.in_use) == (0, 0)
            assert SIZE <= statistics.memory < 2 * SIZE
            assert statistics.threads > 0


def test_a_checkpointer_that_is_collected_gives_back_as_a_closed_one_does(tmp_path: Path) -> None:
    nothing = held()
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, state()).committed.result(60)
    del ckpt
    wait_until(lambda: held() == nothing, "something is still held")


def test_memory_reserved_after_a_release_is_given_back_as_well(tmp_path: Path) -> None:
    nothing = held()
    ckpt = Checkpointer(tmp_path)
    asyncckpt.release()
    ckpt.reserve(state())
    assert asyncckpt.statistics().memory >= SIZE
    del ckpt
    wait_until(lambda: held() == nothing, "something is still held")


def test_nothing_can_be_reserved_once_it_is_closed(tmp_path: Path) -> None:
    nothing = held()
    ckpt = Checkpointer(tmp_path)
    ckpt.close()
    with pytest.raises(SaveError, match="is closed; make a new one"):
        ckpt.reserve(state())
    assert held() == nothing


def test_a_close_on_a_thread_of_the_engine_does_not_wait_for_its_end(tmp_path: Path) -> None:
    """As in a finalizer, where a callback of a save holds the last reference."""

    class Trainer:
        def __init__(self) -> None:
            self.ckpt = Checkpointer(store=gated_store(tmp_path, gate))

        def train(self) -> None:
            self.ckpt.save(1, {"w": torch.zeros(3)}).committed.add_done_callback(self.note)

        def note(self, _: object) -> None:
            pass

        def __del__(self) -> None:
            closing.append(threading.current_thread())
            self.ckpt.close()
            closed.set()

    nothing = held()
    gate, closed = Gate(), threading.Event()
    closing: list[threading.Thread] = []
    Trainer().train()
    assert not closing
    gate.open()
    assert closed.wait(30)
    assert closing[0] is not threading.current_thread()
    wait_until(lambda: held() == nothing, "something is still held")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_what_the_functions_hold_is_given_back_on_demand(tmp_path: Path) -> None:
    nothing = held()
    asyncckpt.save(state(), tmp_path / "a.pt")
    asyncckpt.release()  # waits for it
    assert (tmp_path / "a.pt").stat().st_size > SIZE
    assert held() == nothing


def test_a_load_on_its_own_leaves_no_thread(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "a.pt")
    nothing = held()[1]
    asyncckpt.load(tmp_path / "a.pt")
    wait_until(lambda: held()[1] == nothing, "a thread is still there")


def test_a_close_does_not_wait_for_what_others_have_pending(tmp_path: Path) -> None:
    gate = Gate()
    slow = Checkpointer(store=gated_store(tmp_path / "slow", gate))
    save = slow.save(1, state())
    with Checkpointer(tmp_path / "other"):
        pass
    assert not save.committed.done()
    gate.open()
    slow.close()
    assert save.committed.done()
    assert asyncckpt.statistics().threads == 0


def test_release_while_saves_go_on_loses_nothing(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, filename="{step}.pt") as ckpt:
        stop = threading.Event()

        def release() -> None:
            while not stop.is_set():
                asyncckpt.release()

        thread = threading.Thread(target=release)
        thread.start()
        try:
            saves = [ckpt.save(step, {"w": torch.full((1000,), float(step))}) for step in range(100)]
        finally:
            stop.set()
            thread.join()
        assert [save.committed.result(60).step for save in saves] == list(range(100))
        assert ckpt.load(99)["w"][0] == 99


def test_release_in_a_callback_is_refused(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def release(_: object) -> None:
        try:
            asyncckpt.release()
        except BusyError as error:
            errors.append(error)

    with Checkpointer(tmp_path, on_commit=release) as ckpt:
        ckpt.save(1, {"w": torch.zeros(3)})
    assert "would wait for itself" in str(errors[0])


def test_the_engine_in_use_is_not_ended_by_a_pending_release(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "a"):
        pass
    engine = get_engine()
    user = Checkpointer(tmp_path / "b")
    engine._release_if_unused()
    assert user.save(1, {"w": torch.zeros(3)}).committed.result(60).step == 1
    assert asyncckpt.statistics().threads > 0
    user.close()
