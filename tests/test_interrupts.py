"""Ctrl-C at every point of a save, a wait, a load and a construction: nothing hangs, leaks or is torn."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

import asyncckpt
from asyncckpt import Checkpointer
from asyncckpt._saving.engine import get_engine
from asyncckpt.stores import LocalStore
from asyncckpt.testing import Gate, SlowStore
from interrupts import held, interrupt_everywhere, settle, wait_until
from support import gated_store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    # The interpreter prints and drops what is raised while it closes a generator.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def state_of(value: float, size: int = 1000) -> dict[str, Any]:
    return {"w": torch.full((size,), float(value)), "n": value}


@pytest.fixture(params=["copied first", "written while it is copied"])
def overlapping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "copied first":
        monkeypatch.setattr("asyncckpt._saving.job._OVERLAP_FROM", 0)


@pytest.mark.usefixtures("overlapping")
@pytest.mark.parametrize("error", [None, MemoryError], ids=["Ctrl-C", "a failing call"])
@pytest.mark.parametrize("memory", ["warm", "cold"])
def test_save(tmp_path: Path, memory: str, error: type[Exception] | None, stride: int) -> None:
    ckpt = Checkpointer(tmp_path, keep=asyncckpt.LastN(1))
    step = 0

    def before() -> None:
        nonlocal step
        step += 1
        settle(ckpt)
        if memory == "cold":
            get_engine().arena.release()

    def after(where: str) -> None:
        nonlocal step
        settle(ckpt)
        assert ckpt._saver.in_flight == 0, where
        assert held()[0] == 0, where
        step += 1
        ckpt.save(step, state_of(step)).committed.result(30)
        settle(ckpt)
        assert held()[1:] == steady, where
        assert ckpt.load()["n"] == step
        assert len(list(tmp_path.iterdir())) == 1, where

    get_engine().arena.release()
    ckpt.save(0, state_of(0))
    settle(ckpt)
    steady = held()[1:]
    assert (
        interrupt_everywhere(lambda: ckpt.save(step, state_of(step)), before, after, error, stride=stride)
        > 100
    )
    settle(ckpt)


def test_save_that_replaces_another_one(tmp_path: Path, stride: int) -> None:
    gate, queued = Gate(), []
    store = gated_store(tmp_path, gate, "draft")
    ckpt = Checkpointer(store=store, max_in_flight=2, when_busy="replace", keep=asyncckpt.LastN(1))
    step = 0

    def before() -> None:
        nonlocal step
        gate.close()
        step += 3
        arrived = gate.arrived
        ckpt.save(step - 2, state_of(step))
        gate.wait_for_arrival(arrived + 1)
        queued.append(ckpt.save(step - 1, state_of(step)))

    def after(where: str) -> None:
        gate.open()
        settle(ckpt)
        assert queued[-1].committed.done(), where
        assert (ckpt._saver.in_flight, held()[0]) == (0, 0), where

    assert interrupt_everywhere(lambda: ckpt.save(step, state_of(step)), before, after, stride=stride) > 100
    gate.open()
    settle(ckpt)
    assert queued[-1].skipped


def test_save_that_waits_for_a_place(tmp_path: Path, stride: int) -> None:
    store = SlowStore(LocalStore(str(tmp_path)), delays={"commit": 0.001})
    ckpt = Checkpointer(store=store, keep=asyncckpt.LastN(1))
    step = 0

    def before() -> None:
        nonlocal step
        settle(ckpt)
        step += 2
        ckpt.save(step - 1, state_of(step - 1))

    def after(where: str) -> None:
        settle(ckpt)
        assert (ckpt._saver.in_flight, held()) == (0, steady), where

    before()
    settle(ckpt)
    steady = held()
    assert interrupt_everywhere(lambda: ckpt.save(step, state_of(step)), before, after, stride=stride) > 100
    settle(ckpt)
    latest = ckpt.latest()
    assert latest is not None
    assert latest.step == step


@pytest.mark.parametrize(
    "call", [Checkpointer.wait, Checkpointer.close, lambda ckpt: ckpt.__exit__(None, None, None)]
)
def test_wait(tmp_path: Path, call: Callable[[Checkpointer], object], stride: int) -> None:
    store = SlowStore(LocalStore(str(tmp_path)), delays={"commit": 0.001})
    ckpts = [Checkpointer(store=store)]
    step = 0

    def before() -> None:
        nonlocal step
        step += 1
        ckpts.append(Checkpointer(store=store))
        ckpts[-1].save(step, state_of(step))

    def after(where: str) -> None:
        settle(ckpts[-1])
        latest = ckpts.pop().latest()
        assert latest is not None
        assert latest.step == step, where
        assert held() == steady, where

    before()
    settle(ckpts[-1])
    steady = held()
    assert interrupt_everywhere(lambda: call(ckpts[-1]), before, after, stride=stride) > 20


@pytest.mark.parametrize("engine", ["running", "not yet started"])
def test_construction(tmp_path: Path, engine: str, stride: int) -> None:
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state_of(1))

    def before() -> None:
        if engine == "not yet started":
            get_engine().release()

    def save() -> None:
        ckpt = Checkpointer(tmp_path)
        ckpt.save(1, state_of(1)).committed.result(30)
        ckpt.close()
        get_engine().arena.release()

    def after(where: str) -> None:
        save()
        # Threads of a start that was broken off end by themselves.
        wait_until(lambda: held()[2:] == steady, where)

    save()
    steady = held()[2:]
    assert interrupt_everywhere(lambda: Checkpointer(tmp_path), before, after, stride=stride) > 30


def test_construction_with_signals(tmp_path: Path, stride: int) -> None:
    former = signal.getsignal(signal.SIGUSR1)
    made: list[Checkpointer] = []

    def make() -> None:
        made.append(Checkpointer(tmp_path, on_signal="USR1"))

    def after(where: str) -> None:
        made.clear()
        assert signal.getsignal(signal.SIGUSR1) == former, where

    with Checkpointer(tmp_path):  # keeps the engine
        assert interrupt_everywhere(make, lambda: None, after, stride=stride) > 30
    made.clear()
    assert signal.getsignal(signal.SIGUSR1) == former


@pytest.mark.parametrize("call", ["load", "restore", "verify"])
def test_reading(tmp_path: Path, call: str, stride: int) -> None:
    live = state_of(0, 50_000)
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, state_of(1, 50_000)).committed.result(30)
    ckpt.load()
    steady = held()

    def read() -> None:
        getattr(ckpt, call)(*([live] if call == "restore" else []))

    def before() -> None:
        live.update(state_of(0, 50_000))

    def after(where: str) -> None:
        assert live["w"].unique().tolist() == [live["n"]], where
        wait_until(lambda: held() == steady, where)

    assert interrupt_everywhere(read, before, after, stride=stride) > 50
