"""Saving and waiting in callbacks and in signal handlers: it works, or says at once what to do."""

from __future__ import annotations

import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch

import asyncckpt
from asyncckpt import BusyError, Checkpointer, SaveError
from asyncckpt._saving.engine import get_engine
from asyncckpt._snapshot.copy import copy_ranges
from asyncckpt._threads import is_locked_by_caller, start_threads
from asyncckpt.testing import Gate
from interrupts import Interrupt, settle, wait_until
from support import faulty_store, gated_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from asyncckpt import Save


def state_of(value: float, size: int = 1000) -> dict[str, torch.Tensor]:
    return {"w": torch.full((size,), float(value))}


def steps(ckpt: Checkpointer) -> list[int | None]:
    return [checkpoint.step for checkpoint in ckpt.checkpoints()]


class TestCallbacks:
    def test_a_callback_saves(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path) as ckpt:
            again: list[Save] = []
            first = ckpt.save(1, state_of(1))
            first.committed.add_done_callback(lambda _: again.append(ckpt.save(2, state_of(2))))
            ckpt.wait()
            assert again[0].committed.result(30).step == 2
        assert steps(ckpt) == [1, 2]

    def test_what_is_called_on_an_error_saves_again(self, tmp_path: Path) -> None:
        def save_again(failed: Save, _: Exception) -> None:
            again.append(ckpt.save(failed.step or 0, state_of(9)))

        again: list[Save] = []
        store = faulty_store(tmp_path)
        store.fail("commit", OSError("once"))
        with Checkpointer(store=store, on_error=save_again) as ckpt:
            with pytest.raises(SaveError, match="once"):
                ckpt.save(1, state_of(1)).committed.result(30)
            ckpt.wait()
            assert again[0].committed.result(30).step == 1

    @pytest.mark.parametrize("busy", [False, True])
    def test_a_callback_never_hangs_while_the_loop_waits_for_a_place(
        self, tmp_path: Path, *, busy: bool
    ) -> None:
        told: list[object] = []

        def save(_: object) -> None:
            try:
                told.append(ckpt.save(100, state_of(100)).step)
            except BusyError as error:
                told.append(str(error))

        with Checkpointer(tmp_path, max_in_flight=1) as ckpt:
            for step in range(20):
                saved = ckpt.save(step, state_of(step))
                if busy or step == 19:
                    saved.committed.add_done_callback(save)
            ckpt.wait()
        assert len(told) == (20 if busy else 1)
        assert all(each == 100 or "in a callback" in str(each) for each in told)

    @pytest.mark.parametrize("what", ["wait", "close"])
    def test_a_callback_that_waits_is_told(self, tmp_path: Path, what: str) -> None:
        told: list[BusyError] = []

        def wait(_: object) -> None:
            with pytest.raises(BusyError, match=r"in a callback of a save.*in the training loop") as caught:
                getattr(ckpt, what)()
            told.append(caught.value)

        with Checkpointer(tmp_path, on_commit=wait) as ckpt:
            ckpt.save(1, state_of(1))
        assert len(told) == 1

    def test_a_callback_loads_and_lists(self, tmp_path: Path) -> None:
        told: list[Any] = []
        with Checkpointer(
            tmp_path, on_commit=lambda _: told.extend([ckpt.load()["w"][0].item(), ckpt.latest()])
        ) as ckpt:
            made = ckpt.save(1, state_of(1)).committed.result(30)
            ckpt.wait()
        assert told == [1.0, made]


def test_a_policy_that_exits_does_not_end_the_saves(tmp_path: Path) -> None:
    class Leaves:
        def keep(self, _: object, /) -> Any:
            sys.exit(3)

    with Checkpointer(tmp_path, keep=Leaves()) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(step)).committed.result(30)
            with pytest.raises(SaveError, match="evicting older checkpoints failed"):
                ckpt.wait()
        assert steps(ckpt) == [1, 2]


def test_callbacks_of_a_replaced_save_are_called_without_the_lock(tmp_path: Path) -> None:
    told: list[bool] = []
    gate = Gate()
    store = gated_store(tmp_path, gate, "draft")
    with Checkpointer(store=store, max_in_flight=2, when_busy="replace") as ckpt:
        ckpt.save(0, state_of(0))
        gate.wait_for_arrival()
        for step in (1, 2):
            save = ckpt.save(step, state_of(step))
            save.committed.add_done_callback(lambda _: told.append(is_locked_by_caller()))
        assert told == [False]
        gate.open()


def test_a_place_that_becomes_free_at_the_last_moment_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    ckpt = Checkpointer(store=gated_store(tmp_path, gate), max_in_flight=1)
    first = ckpt.save(1, state_of(1))
    refuse = ckpt._saver._refuse_to_wait

    def refuse_late() -> None:
        gate.open()
        first.committed.result(30)
        refuse()

    monkeypatch.setattr(ckpt._saver, "_refuse_to_wait", refuse_late)
    assert ckpt.save(2, state_of(2)).committed.result(30).step == 2
    ckpt.close()


@pytest.fixture
def handler() -> Iterator[Callable[[Callable[[], object]], list[object]]]:
    """Install a handler of SIGINT that calls a function and notes what it returns or raises."""
    before = signal.getsignal(signal.SIGINT)

    def install(call: Callable[[], object]) -> list[object]:
        told: list[object] = []

        def handle(*_: object) -> None:
            try:
                told.append(call())
            except BusyError as error:
                told.append(error)

        signal.signal(signal.SIGINT, handle)
        return told

    yield install
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("overlapping", [False, True])
class TestHandlers:
    @pytest.fixture(autouse=True)
    def overlap(self, monkeypatch: pytest.MonkeyPatch, *, overlapping: bool) -> None:
        if overlapping:
            monkeypatch.setattr("asyncckpt._saving.job._OVERLAP_FROM", 0)

    def test_a_handler_that_saves_and_waits(
        self,
        tmp_path: Path,
        handler: Callable[[Callable[[], object]], list[object]],
        max_in_flight: int,
        stride: int,
    ) -> None:
        """At every point of a save: what the handler saves is durable, or it is told what to do."""
        ckpt = Checkpointer(tmp_path, max_in_flight=max_in_flight)
        step = 0

        def call() -> int:
            ckpt.save(step + 1_000_000, state_of(step))
            ckpt.wait()
            return step + 1_000_000

        told = handler(call)

        def before() -> None:
            nonlocal step
            step += 1
            settle(ckpt)

        def save() -> None:
            ckpt.save(step, state_of(step))

        number = 0
        while True:
            before()
            count = len(told)
            interrupt = Interrupt(number)
            with interrupt:
                save()
            settle(ckpt)
            if not interrupt.came:
                break
            assert len(told) == count + 1, interrupt.where
            assert ckpt._saver.in_flight == 0, (interrupt.where, told[-1])
            number += stride
        saved = [each for each in told if isinstance(each, int)]
        refused = [each for each in told if isinstance(each, BusyError)]
        assert len(saved) + len(refused) == len(told)
        assert number > 100
        assert all("signal handler" in str(error) for error in refused)
        listed = set(steps(ckpt))
        assert listed >= {*saved, *range(1, step + 1)}
        assert saved
        assert ckpt._saver.in_flight == get_engine().arena.statistics().leases == 0


def test_a_handler_that_only_waits_while_the_state_is_copied(
    tmp_path: Path, handler: Callable[[Callable[[], object]], list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncckpt._saving.job._OVERLAP_FROM", 0)
    ckpt = Checkpointer(tmp_path)

    class Breaks:
        """Pressed in the middle of a copy, when the save has been submitted."""

        def __init__(self, copy: Callable[..., None]) -> None:
            self.copy = copy

        def __call__(self, *args: Any) -> None:
            signal.raise_signal(signal.SIGINT)
            self.copy(*args)

    monkeypatch.setattr("asyncckpt._saving.staging.copy_ranges", Breaks(copy_ranges))
    for call in (ckpt.wait, ckpt.load):
        told = handler(call)
        ckpt.save(1, state_of(1)).committed.result(30)
        assert len(told) == 1
        assert isinstance(told[0], BusyError)
        assert "set a flag in the handler" in str(told[0])


def test_a_handler_that_releases_while_a_listing_waits(
    tmp_path: Path, handler: Callable[[Callable[[], object]], list[object]]
) -> None:
    def release() -> None:
        asyncckpt.release()
        gate.open()

    def interrupt() -> None:
        gate.wait_for_arrival(before + 1)
        signal.pthread_kill(main.ident or 0, signal.SIGINT)

    gate, main = Gate(opened=True), threading.main_thread()
    with (
        Checkpointer(store=gated_store(tmp_path, gate, "list")) as ckpt,
        ThreadPoolExecutor(1) as pool,
    ):
        told = handler(release)
        before = gate.arrived
        gate.close()
        interrupting = pool.submit(interrupt)
        assert ckpt.checkpoints() == []
        interrupting.result(30)
    assert told == [None]


class TestStart:
    """What breaks into the start of the engine's threads, which a save begins."""

    @pytest.fixture
    def gate(self) -> Gate:
        return Gate(opened=True)

    @pytest.fixture
    def ckpt(self, tmp_path: Path, gate: Gate) -> Iterator[Checkpointer]:
        with Checkpointer(store=gated_store(tmp_path, gate, "draft"), max_in_flight=2) as ckpt:
            asyncckpt.release()
            yield ckpt

    @pytest.fixture
    def breaking_in(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Call something before, or after, the start of a thread."""

        def install(name: str, before: Callable[[], object], after: Callable[[], object]) -> None:
            def start(threads: Any, into: list[threading.Thread]) -> None:
                breaks = not left.isdisjoint(thread.name for thread in threads)
                left.difference_update(thread.name for thread in threads)
                if breaks:
                    before()
                start_threads(threads, into)
                if breaks:
                    after()

            left = {name}
            monkeypatch.setattr("asyncckpt._saving.engine_threads.start_threads", start)

        return install

    @pytest.mark.parametrize("thread", ["asyncckpt-loop", "asyncckpt-queue"])
    def test_a_handler_that_saves(
        self,
        ckpt: Checkpointer,
        gate: Gate,
        breaking_in: Callable[..., None],
        handler: Callable[[Callable[[], object]], list[object]],
        thread: str,
    ) -> None:
        told = handler(lambda: ckpt.save(2, state_of(2)).committed.result(30).step)
        breaking_in(thread, lambda: signal.raise_signal(signal.SIGINT), lambda: None)
        assert ckpt.save(1, state_of(1)).committed.result(30).step == 1
        assert told == [2]
        assert ckpt.save(3, state_of(3)).committed.result(30).step == 3
        assert gate.arrived == 3, "each is written once"
        asyncckpt.release()
        wait_until(lambda: asyncckpt.statistics().threads == 0, "the other threads go on")

    def test_a_handler_that_saves_once_the_first_save_is_being_written(
        self,
        ckpt: Checkpointer,
        gate: Gate,
        breaking_in: Callable[..., None],
        handler: Callable[[Callable[[], object]], list[object]],
    ) -> None:
        def break_in() -> None:
            gate.wait_for_arrival()
            signal.raise_signal(signal.SIGINT)
            gate.open()

        told = handler(lambda: ckpt.save(2, state_of(2)).step)
        gate.close()
        breaking_in("asyncckpt-queue", lambda: None, break_in)
        ckpt.save(1, state_of(1))
        ckpt.wait()
        assert told == [2]
        assert steps(ckpt) == [1, 2]
        assert gate.arrived == 2, "each is written once"
        asyncckpt.release()
        wait_until(lambda: asyncckpt.statistics().threads == 0, "the other threads go on")

    def test_an_interrupt_once_the_first_save_is_being_written(
        self, ckpt: Checkpointer, gate: Gate, breaking_in: Callable[..., None]
    ) -> None:
        def interrupt() -> None:
            gate.wait_for_arrival()
            raise KeyboardInterrupt

        gate.close()
        breaking_in("asyncckpt-queue", lambda: None, interrupt)
        with pytest.raises(KeyboardInterrupt):
            ckpt.save(1, state_of(1))
        ckpt.save(2, state_of(2))
        gate.open()
        ckpt.wait()
        assert steps(ckpt) == [1, 2]
        assert gate.arrived == 2, "each is written once"


def test_another_thread_saves_while_one_waits(tmp_path: Path) -> None:
    gate = Gate()
    with Checkpointer(store=gated_store(tmp_path, gate), max_in_flight=1) as ckpt:
        ckpt.save(1, state_of(1))
        threads = [threading.Thread(target=ckpt.save, args=(step, state_of(step))) for step in (2, 3)]
        for thread in threads:
            thread.start()
        gate.open()
        for thread in threads:
            thread.join(30)
        ckpt.wait()
        assert sorted(step or 0 for step in steps(ckpt)) == [1, 2, 3]
