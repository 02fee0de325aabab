"""When `Checkpointer.due` says that a save is due, what saves cost, and signals."""

from __future__ import annotations

import signal
import textwrap
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncckpt import (
    Budget,
    BusyError,
    Checkpoint,
    Checkpointer,
    Every,
    EveryN,
    SaveError,
    SignalError,
)
from asyncckpt._saving.costs import CostMeter
from asyncckpt._saving.engine import get_engine
from asyncckpt._saving.save import Save
from asyncckpt._snapshot import fences
from asyncckpt.testing import Gate, SlowStore
from programs import Interpreter
from support import faulty_store, gated_store

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from asyncckpt.schedule import Progress

STATE = {"w": torch.ones(3)}


def run(ckpt: Checkpointer, steps: Iterable[int]) -> list[int]:
    """Save what is due; return the steps of the saves."""
    saved = []
    for step in steps:
        if ckpt.due(step):
            ckpt.save(step, STATE)
            saved.append(step)
    return saved


class Recorder:
    """A schedule that is never due, and keeps what it is asked with."""

    def __init__(self) -> None:
        self.asked: list[Progress] = []

    def due(self, progress: Progress) -> bool:
        self.asked.append(progress)
        return False


class TestIntervals:
    def test_every_n_steps(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, every=Every(steps=4)) as ckpt:
            assert run(ckpt, range(13)) == [4, 8, 12]

    def test_a_resumed_run_saves_at_the_same_multiples(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, every=Every(steps=4)) as ckpt:
            assert run(ckpt, range(8, 13)) == [8, 12]
        with Checkpointer(tmp_path, every=Every(steps=4)) as ckpt:
            assert run(ckpt, range(9, 13)) == [12]

    def test_a_run_that_went_back_saves_again(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, every=Every(steps=4)) as ckpt:
            assert run(ckpt, range(1, 9)) == [4, 8]
            assert run(ckpt, range(3, 9)) == [4, 8]

    def test_any_save_begins_a_new_interval(self, tmp_path: Path) -> None:
        asked = Recorder()
        with Checkpointer(tmp_path, every=asked | Every(hours=1)) as ckpt:
            for step in (5, 6, 7):
                assert not ckpt.due(step)
                began = time.perf_counter()
                ckpt.save(step, STATE)
                assert not ckpt.due(step)
                assert 0 < asked.asked[-1].seconds <= time.perf_counter() - began
                ckpt.wait()
        assert [(each.steps, each.saves) for each in asked.asked] == [
            (1, 0),
            (0, 1),
            (1, 1),
            (0, 2),
            (1, 2),
            (0, 3),
        ]

    def test_a_time_that_is_over_is_due_at_each_step_once(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, every=Every(seconds=1e-9), max_in_flight=3) as ckpt:
            assert not ckpt.due(1)  # the time counts from here
            assert ckpt.due(2)
            assert ckpt.due(2)
            ckpt.save(2, STATE)
            assert not ckpt.due(2)
            assert ckpt.due(3)

    def test_what_is_due_stays_due_if_the_save_is_skipped(self, tmp_path: Path) -> None:
        gate = Gate()
        store = gated_store(tmp_path, gate)
        with Checkpointer(store=store, when_busy="skip", every=Every(steps=3)) as ckpt:
            ckpt.save(1, STATE)
            for step in (3, 4):
                assert ckpt.due(step)
                assert ckpt.save(step, STATE).skipped
            gate.open()
            ckpt.wait()
            assert ckpt.due(5)
            assert not ckpt.save(5, STATE).skipped
            assert not ckpt.due(5)

    def test_what_raises_does_not_count_as_a_save(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, every=Every(steps=3)) as ckpt:
            assert ckpt.due(3)
            with pytest.raises(SaveError):
                ckpt.save(3, {"f": lambda: None})
            assert ckpt.due(4)

    def test_a_failed_save_is_due_again_at_the_next_step_and_then_less_and_less_often(
        self, tmp_path: Path
    ) -> None:
        store = faulty_store(tmp_path)
        store.fail("commit", OSError("gone"), times=5)
        with Checkpointer(store=store, every=Every(steps=100), on_error=lambda *_: None) as ckpt:
            tried = []
            for step in range(100, 210):
                if ckpt.due(step):
                    tried.append(step)
                    ckpt.save(step, STATE).committed.exception()
            assert tried == [100, 101, 103, 107, 115, 131, 200]
            assert [c.step for c in ckpt.checkpoints()] == [131, 200]
            store.fail("commit", OSError("gone"))
            for step in (300, 301):  # a success forgets the failures before
                assert ckpt.due(step)
                ckpt.save(step, STATE).committed.exception()
            assert not ckpt.due(302)

    def test_saves_that_are_replaced_are_no_failures(self, tmp_path: Path) -> None:
        gate, store = Gate(), faulty_store(tmp_path)
        slow = SlowStore(store, gates={"commit": gate})
        with Checkpointer(
            store=slow,
            when_busy="replace",
            max_in_flight=2,
            every=Every(steps=100),
            on_error=lambda *_: None,
        ) as ckpt:
            ckpt.save(1, STATE)
            gate.wait_for_arrival()
            saves = [ckpt.save(step, STATE) for step in (2, 3, 4)]
            assert [save.skipped for save in saves] == [True, True, False]
            store.fail("commit", OSError("gone"), times=2)
            gate.open()
            ckpt.wait()
            assert ckpt.due(5)

    def test_without_a_schedule_there_is_no_answer(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path) as ckpt, pytest.raises(ValueError, match=r"such as Every\(minutes=10\)"):
            ckpt.due(1)

    def test_closed(self, tmp_path: Path) -> None:
        ckpt = Checkpointer(tmp_path, every=Every(steps=1))
        ckpt.close()
        with pytest.raises(SaveError, match="is closed"):
            ckpt.due(1)

    @pytest.mark.parametrize("step", ["1", 1.0, None, True])
    def test_a_step_is_an_int(self, tmp_path: Path, step: Any) -> None:
        with (
            Checkpointer(tmp_path, every=Every(steps=1)) as ckpt,
            pytest.raises(TypeError, match="step must be an int"),
        ):
            ckpt.due(step)

    @pytest.mark.parametrize("every", [500, EveryN(500), Every, "10 minutes", lambda _: True])
    def test_what_is_no_schedule_is_refused(self, tmp_path: Path, every: Any) -> None:
        with pytest.raises(TypeError, match=r"every must be a schedule such as Every\(steps=500\)"):
            Checkpointer(tmp_path / "new", every=every)
        assert not (tmp_path / "new").exists()


def a_save(*, stall: float = 0.0, durable: float = 0.0, fails: bool = False) -> Save:
    """Return a save that has ended."""
    save = Save(1, "run/1.pt")
    save.stats.stall, save.stats.durable = stall, durable
    if fails:
        save.committed.set_exception(SaveError("a full disk"))
    else:
        save.committed.set_result(Checkpoint(1, "run/1.pt"))
    return save


class Run:
    """A training loop whose steps take as long as they are told to."""

    def __init__(self) -> None:
        self.costs = CostMeter()
        self.now = 100.0
        self.costs.end_step(self.now, pending=False)

    def steps(self, *seconds: float, pending: bool = False) -> None:
        for each in seconds:
            self.now += each
            self.costs.end_step(self.now, pending=pending)

    def save(self, save: Save, *beside: float) -> None:
        self.now += save.stats.stall
        self.costs.save_taken(save, self.now)
        self.steps(*beside[:-1], pending=True)
        self.steps(*beside[-1:])


class TestCosts:
    def test_nothing_is_known_at_first(self) -> None:
        costs = Run().costs
        assert (costs.cost, costs.durable, costs.between_calls) == (None, 0.0, None)

    def test_a_save_costs_its_stall_and_the_slowdown_of_the_steps_beside_it(self) -> None:
        run = Run()
        run.steps(*[0.1] * 9)
        run.save(a_save(stall=0.5, durable=2.0), 0.15, 0.15, 0.15, 0.15)
        assert run.costs.cost == pytest.approx(0.5 + 4 * 0.05)
        assert run.costs.durable == 2.0
        assert run.costs.between_calls == pytest.approx(0.1)

    def test_the_wait_at_a_fence_in_the_first_step_counts(self) -> None:
        run = Run()
        run.steps(*[0.1] * 9)
        run.save(a_save(), 0.4, 0.1, 0.1, 0.1)
        assert run.costs.cost == pytest.approx(0.3)

    def test_an_evaluation_among_the_steps_does_not_count(self) -> None:
        run = Run()
        run.steps(0.1, 0.1, 60.0, 0.1)
        run.save(a_save(stall=0.5), 0.1, 0.1, 60.0, 0.1)
        assert run.costs.cost == pytest.approx(0.5)

    def test_an_evaluation_in_the_first_step_counts_as_the_time_until_durable_at_most(self) -> None:
        run = Run()
        run.steps(0.1, 0.1)
        run.save(a_save(stall=0.5, durable=0.8), 60.0)
        assert run.costs.cost == pytest.approx(0.8)

    def test_an_evaluation_between_due_and_save_does_not_count(self) -> None:
        run = Run()
        run.steps(0.1, 0.1)
        run.now += 60.0
        run.save(a_save(stall=0.5), 0.1)
        assert run.costs.cost == pytest.approx(0.5)

    def test_steps_count_until_nothing_is_pending(self) -> None:
        run = Run()
        run.steps(0.1, 0.1)
        run.save(a_save(stall=0.5), 0.2, 0.2)
        run.steps(0.1, 0.2)
        assert run.costs.cost == pytest.approx(0.7)
        assert run.costs.between_calls == pytest.approx(0.1)

    def test_faster_steps_are_no_gain(self) -> None:
        run = Run()
        run.steps(0.1, 0.1)
        run.save(a_save(stall=0.5), 0.05, 0.05, 0.05)
        assert run.costs.cost == pytest.approx(0.5)

    def test_a_failed_save_costs_the_next_one(self) -> None:
        run = Run()
        run.steps(0.1, 0.1)
        run.save(a_save(stall=0.5, durable=9.0, fails=True), 0.1)
        assert run.costs.cost is None
        run.save(a_save(stall=0.5, durable=2.0), 0.1)
        assert run.costs.cost == pytest.approx(1.0)
        assert run.costs.durable == 2.0

    def test_a_save_that_the_next_one_overtakes_counts_with_it(self) -> None:
        run = Run()
        run.steps(0.1, 0.1)
        pending = Save(1, "run/1.pt")
        pending.stats.stall = 0.5
        run.costs.save_taken(pending, run.now)
        run.steps(0.3, pending=True)
        run.save(a_save(stall=0.5), 0.1)
        assert run.costs.cost == pytest.approx(1.2)

    def test_the_first_save_counts_until_there_is_another(self) -> None:
        run = Run()
        run.save(a_save(stall=5.0, durable=9.0), 0.1)
        assert (run.costs.cost, run.costs.durable) == (5.0, 9.0)
        run.save(a_save(stall=0.5, durable=2.0), 0.1)
        assert run.costs.cost == pytest.approx(0.5)
        assert run.costs.durable == 2.0

    def test_a_long_history_does_not_hide_a_change(self) -> None:
        run = Run()
        for stall in (*[0.1] * 50, 1.0):
            run.save(a_save(stall=stall), 0.1)
        assert run.costs.cost == pytest.approx(0.28)  # all five pay for the costly one
        for _ in range(4):
            run.save(a_save(stall=1.0), 0.1)
        assert run.costs.cost == pytest.approx(1.0)


def test_a_budget_saves_once_and_goes_on_by_what_that_cost(tmp_path: Path) -> None:
    gate, asked = Gate(), Recorder()
    with Checkpointer(store=gated_store(tmp_path, gate), every=asked | Budget(0.9)) as ckpt:
        assert run(ckpt, range(1, 21)) == [20]
        assert run(ckpt, range(21, 200)) == []  # the first save is pending
        assert asked.asked[-1].cost is None
        gate.open()
        ckpt.wait()
        step = 200
        while not ckpt.due(step):
            step += 1
        last = asked.asked[-1]
        assert last.cost is not None
        assert 0 < last.cost <= 0.9 * last.seconds
        assert 0 < last.durable <= last.seconds


class TestSignals:
    @pytest.fixture(autouse=True)
    def _handlers(self) -> Iterator[None]:
        former = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
        yield
        assert {number: signal.getsignal(number) for number in former} == former

    def test_a_signal_makes_a_save_due_until_one_is_taken(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, every=Every(hours=1), on_signal="USR1", max_in_flight=2) as ckpt:
            assert not ckpt.due(1)
            signal.raise_signal(signal.SIGUSR1)
            assert not ckpt.signum  # not before a save is due
            assert ckpt.due(2)
            assert ckpt.signum is signal.SIGUSR1
            assert ckpt.due(3)
            ckpt.save(3, STATE)
            signal.raise_signal(signal.SIGUSR1)  # within a second: the same request
            assert not ckpt.due(4)
            assert ckpt.signum is signal.SIGUSR1

    def test_one_of_another_kind_makes_a_save_due_again(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, on_signal=("SIGUSR1", signal.SIGUSR2)) as ckpt:
            signal.raise_signal(signal.SIGUSR1)
            assert run(ckpt, (1, 2)) == [1]
            signal.raise_signal(signal.SIGUSR2)
            assert run(ckpt, (3, 4)) == [3]
            assert ckpt.signum is signal.SIGUSR2

    def test_a_signal_after_the_last_step_is_known_once_closed(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, on_signal="USR1") as ckpt:
            assert not ckpt.due(1)
            signal.raise_signal(signal.SIGUSR1)
            assert not ckpt.signum
        assert ckpt.signum is signal.SIGUSR1

    def test_one_that_is_dropped_swallows_no_signal(self, tmp_path: Path) -> None:
        former = signal.getsignal(signal.SIGUSR1)
        ckpt = Checkpointer(tmp_path, on_signal="USR1")
        assert signal.getsignal(signal.SIGUSR1) != former
        del ckpt
        assert signal.getsignal(signal.SIGUSR1) == former

    async def test_async_with_releases_everything_when_saves_are_given_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("asyncckpt._threads._LOOK_AGAIN", 0.01)
        gate = Gate()
        ckpt = Checkpointer(store=gated_store(tmp_path, gate), on_signal="USR1", grace=1e-6, overlap=True)
        ckpt.save(1, STATE)
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(BusyError, match="given up"):
            async with ckpt:
                pass
        assert fences.watchers() == []
        gate.open()
        ckpt._saver.drain()
        engine = get_engine()
        assert engine._changed.until(lambda: engine._threads is None, 10)

    async def test_async_with_restores_the_handlers(self, tmp_path: Path) -> None:
        former = signal.getsignal(signal.SIGUSR1)
        async with Checkpointer(tmp_path, on_signal="USR1") as ckpt:
            assert signal.getsignal(signal.SIGUSR1) != former
            signal.raise_signal(signal.SIGUSR1)
            assert ckpt.due(1)

    def test_a_failed_construction_sets_no_handler(self, tmp_path: Path) -> None:
        former = signal.getsignal(signal.SIGUSR1)
        for options in ({"create": False}, {"storage_options": {"a": 1}}, {"grace": -1}):
            with pytest.raises((OSError, ValueError)):
                Checkpointer(tmp_path / "no", on_signal="USR1", **options)
        assert signal.getsignal(signal.SIGUSR1) is former

    def test_another_thread_is_refused(self, tmp_path: Path) -> None:
        errors: list[Exception] = []

        def make() -> None:
            try:
                Checkpointer(tmp_path, on_signal="USR1")
            except SignalError as error:
                errors.append(error)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        assert "main thread alone" in str(errors[0])

    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({"on_signal": "SIGNONE"}, SignalError, "'SIGNONE' is not a signal"),
            ({"on_signal": "USR1", "grace": 0}, ValueError, "positive and finite, not 0"),
            ({"on_signal": "USR1", "grace": "1"}, TypeError, "number of seconds, not '1'"),
            ({"grace": 1}, ValueError, "name the signals"),
        ],
    )
    def test_invalid_options(
        self, tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str
    ) -> None:
        with pytest.raises(error, match=text):
            Checkpointer(tmp_path, **options)

    def test_grace_without_a_signal_limits_nothing(self, tmp_path: Path) -> None:
        gate = Gate()
        with Checkpointer(store=gated_store(tmp_path, gate), on_signal="USR1", grace=1e-6) as ckpt:
            ckpt.save(1, STATE)
            with pytest.raises(BusyError, match=r"still pending after 0\.01 s"):
                ckpt._due.drain(0.01)
            gate.open()
        assert [c.step for c in ckpt.checkpoints()] == [1]


PREPARE = """
import os, signal, sys, threading
import asyncckpt, torch
from asyncckpt import BusyError, Checkpointer, Every, StopOnSignal
from asyncckpt.stores import LocalStore
from asyncckpt.testing import Gate, SlowStore

def tell(line):
    print(line, flush=True)

path = sys.argv[1]
state = {"w": torch.ones(3)}
"""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


def program(body: str) -> str:
    return PREPARE + textwrap.dedent(body)


class TestPrograms:
    def test_a_loop_saves_once_more_and_stops(self, interpreter: Interpreter, tmp_path: Path) -> None:
        body = """
            with Checkpointer(path, every=Every(steps=2), on_signal=("SIGTERM", "SIGUSR1")) as ckpt:
                for step in range(1, 10):
                    tell(step)
                    sys.stdin.readline()
                    if ckpt.due(step):
                        ckpt.save(step, state)
                    if ckpt.signum:
                        break
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            if ckpt.signum:
                sys.exit(128 + ckpt.signum)
            """
        process = interpreter.start(program(body), tmp_path)
        for step in ("1", "2", "3"):
            assert process.line() == step
            if step == "3":
                process.kill(signal.SIGTERM)
            process.tell()
        assert process.end() == (128 + signal.SIGTERM, "", "")
        with Checkpointer(tmp_path) as ckpt:
            assert [c.step for c in ckpt.checkpoints()] == [2, 3]

    @pytest.mark.parametrize("when", ["before", "during"])
    def test_what_is_pending_after_the_grace_period_is_given_up(
        self, interpreter: Interpreter, tmp_path: Path, when: str
    ) -> None:
        body = """
            asyncckpt._threads._LOOK_AGAIN = 0.01
            gate = Gate()
            store = SlowStore(LocalStore(path), gates={"commit": gate})
            try:
                with Checkpointer(store=store, on_signal="TERM", grace=0.05) as ckpt:
                    ckpt.save(1, state)
                    gate.wait_for_arrival()
                    if sys.argv[2] == "before":
                        signal.raise_signal(signal.SIGTERM)
                    tell("saved")
            except BusyError as error:
                tell(error)
            try:
                ckpt.close()
            except BusyError:
                tell(ckpt.signum.name)
            """
        process = interpreter.start(program(body), tmp_path, when)
        assert process.line() == "saved"
        if when == "during":
            process.kill(signal.SIGTERM)
        path = tmp_path / "step-00000001.pt"
        assert process.line() == f"the grace period of 0.05 s after a signal is over: given up are {path}"
        assert process.line() == "SIGTERM"
        assert process.end() == (0, "", "")
        with Checkpointer(tmp_path) as ckpt:
            assert ckpt.checkpoints() == []

    def test_a_save_after_others_were_given_up_is_finished_at_exit(
        self, interpreter: Interpreter, tmp_path: Path
    ) -> None:
        body = """
            gate = Gate()
            store = SlowStore(LocalStore(path), gates={"commit": gate})
            try:
                with Checkpointer(store=store, on_signal="USR1", grace=1e-6) as ckpt:
                    ckpt.save(1, state)
                    signal.raise_signal(signal.SIGUSR1)
            except BusyError:
                tell("given up")
            later = Checkpointer(path)
            later.save(2, state)
            threading.Timer(0.2, gate.open).start()
            """
        process = interpreter.start(program(body), tmp_path)
        assert process.end() == (0, "given up\n", "")
        with Checkpointer(tmp_path) as ckpt:
            assert [c.step for c in ckpt.checkpoints()] == [1, 2]

    @pytest.mark.parametrize("how", ["another thread", "another order"])
    def test_handlers_that_cannot_be_restored_pass_their_signals_on(
        self, interpreter: Interpreter, tmp_path: Path, how: str
    ) -> None:
        body = """
            first = Checkpointer(path, on_signal="TERM")
            if sys.argv[2] == "another order":
                second = Checkpointer(path, filename="other-{step}.pt", on_signal="TERM")
                first.close()
                second.close()
            else:
                thread = threading.Thread(target=first.close)
                thread.start()
                thread.join()
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
            signal.raise_signal(signal.SIGTERM)
            tell("it was not ended")
            """
        process = interpreter.start(program(body), tmp_path, how)
        assert process.end() == (-signal.SIGTERM, "", "")
