"""Several threads share the pieces of a copy; errors and progress are those of the whole."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt import Checkpointer
from asyncckpt._snapshot.copy_threads import for_each_piece
from asyncckpt._snapshot.lanes import memmove
from asyncckpt._threads import Condition
from asyncckpt.testing import Gate
from support import gated_store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Helper:
    """Another thread that works on its piece until the test lets it go on; this one waits for it to begin."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.works = False
        self._caller = threading.current_thread()
        self._begun, self._may_go_on = threading.Event(), threading.Event()

    def work(self) -> None:
        if threading.current_thread() is self._caller:
            assert self._begun.wait(30)
        elif self.thread is None:
            self.thread, self.works = threading.current_thread(), True
            self._begun.set()
            self._may_go_on.wait(30)
            self.works = False

    def go_on(self) -> None:
        self._may_go_on.set()

    def join(self) -> None:
        assert self.thread is not None
        self.thread.join(30)


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch) -> Helper:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    return Helper()


@pytest.fixture
def interrupted(helper: Helper, monkeypatch: pytest.MonkeyPatch) -> type[Condition]:
    """Interrupt the first wait for a helper, which goes on once it is waited for again."""

    class Interrupted(Condition):
        came = False

        def until(self, attempt: Callable[[], Any], timeout: float | None = None) -> Any:
            if helper.works and not Interrupted.came:
                Interrupted.came = True
                raise KeyboardInterrupt
            if Interrupted.came:
                helper.go_on()
            return super().until(attempt, timeout)

    monkeypatch.setattr("asyncckpt._snapshot.copy_threads.Condition", Interrupted)
    return Condition


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 40))
def test_each_piece_is_done_once_and_reported_in_order(count: int) -> None:
    done: list[int] = []
    reported: list[int] = []

    def report(front: int) -> None:
        assert set(range(front)) <= set(done)
        reported.append(front)

    for_each_piece(done.append, range(count), report)
    assert Counter(done) == Counter(range(count))
    assert reported == sorted(set(reported))
    assert reported[-1:] == ([count] if count else [])


@pytest.mark.parametrize("failing", [0, 5, 19])
def test_an_error_is_raised_once_no_thread_is_at_work(failing: int) -> None:
    working: list[int] = []

    def do(piece: int) -> None:
        working.append(piece)
        try:
            if piece == failing:
                raise OSError(f"piece {piece}")
        finally:
            working.remove(piece)

    with pytest.raises(OSError, match=f"piece {failing}"):
        for_each_piece(do, range(20))
    assert not working


def test_no_thread_is_left_behind() -> None:
    before = set(threading.enumerate())
    for_each_piece(lambda _: None, range(20))
    for thread in set(threading.enumerate()) - before:
        if thread.name == "asyncckpt-copy":
            thread.join(30)
            assert not thread.is_alive()


def test_the_last_core_is_used_only_once_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    may, helping, caller = threading.Event(), threading.Event(), threading.current_thread()
    asked: list[int] = []
    alone: list[int] = []

    def may_use_last_core() -> bool:
        asked.append(len(alone))
        return may.is_set()

    def do(piece: int) -> None:
        if threading.current_thread() is not caller:
            helping.set()
        elif may.is_set():
            assert helping.wait(30)
        else:
            alone.append(piece)
            if len(alone) == 3:
                may.set()

    for_each_piece(do, range(20), may_use_last_core=may_use_last_core)
    assert alone == [0, 1, 2]
    assert asked == [0, 0, 1, 2, 3]
    assert helping.is_set()


@pytest.mark.usefixtures("interrupted")
def test_an_interrupt_of_the_wait_for_a_helper_is_raised_once_it_is_not_at_work(helper: Helper) -> None:
    try:
        with pytest.raises(KeyboardInterrupt):
            for_each_piece(lambda _: helper.work(), range(2))
        assert not helper.works
    finally:
        helper.go_on()
        helper.join()


def test_no_helper_of_an_interrupted_save_writes_into_the_buffer_of_the_next_one(
    tmp_path: Path, helper: Helper, interrupted: type[Condition], monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(*piece: int) -> None:
        helper.work()
        memmove(*piece)

    def state_of(value: float) -> dict[str, torch.Tensor]:
        return {name: torch.full((1 << 20,), value) for name in ("a", "b")}  # a piece for each thread

    monkeypatch.setattr("asyncckpt._snapshot.copy.memmove", copy)
    gate = Gate()
    with Checkpointer(store=gated_store(tmp_path, gate, "draft")) as ckpt:
        live = state_of(1)
        with pytest.raises(KeyboardInterrupt):
            ckpt.save(1, live)
        monkeypatch.setattr("asyncckpt._snapshot.copy_threads.Condition", interrupted)
        ckpt.save(2, state_of(2))
        helper.go_on()
        helper.join()
        gate.open()
        ckpt.wait()
        assert {value for tensor in ckpt.load(2).values() for value in tensor.unique().tolist()} == {2}
