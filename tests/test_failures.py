"""A failed save is reported once, from the right place, and stops nothing else."""

from __future__ import annotations

import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch

import asyncckpt
from asyncckpt import AsyncCkptError, Checkpoint, Checkpointer, LastN, Save, SaveError
from asyncckpt._saving.engine import get_engine
from asyncckpt.stores.local import LocalStore
from asyncckpt.testing import FaultyStore, Gate, SlowStore
from file_operations import FaultyOps
from support import faulty_store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GONE = OSError("the disk is gone")
OPERATIONS = ["draft", "write", "commit"]


@pytest.fixture
def store(tmp_path: Path) -> FaultyStore:
    return faulty_store(tmp_path)


def state_of(value: float, size: int = 5) -> dict[str, Any]:
    return {"w": torch.full((size,), float(value))}


def steps(ckpt: Checkpointer) -> list[int | None]:
    return [checkpoint.step for checkpoint in ckpt.checkpoints()]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_who_asks_for_the_result_is_told_and_nobody_else(
    tmp_path: Path, store: FaultyStore, operation: str
) -> None:
    with Checkpointer(store=store) as ckpt:
        store.fail(operation, GONE)
        save = ckpt.save(7, state_of(7))
        for ask in (save.committed.result, save.committed.exception):
            try:
                error = ask(60)
            except SaveError as raised:
                error = raised
            assert isinstance(error, SaveError)
            assert str(error) == f"saving step 7 to {tmp_path}/step-00000007.pt failed: the disk is gone"
            assert error.__cause__ is GONE
        ckpt.wait()
        ckpt.save(8, state_of(8))
    assert steps(ckpt) == [8]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008.pt"]
    assert get_engine().arena.statistics().leases == 0


@pytest.mark.parametrize("hear", [Checkpointer.wait, Checkpointer.close])
def test_a_failure_nobody_asked_for_is_raised_once(
    store: FaultyStore, hear: Callable[[Checkpointer], None]
) -> None:
    gate = Gate()
    ckpt = Checkpointer(store=SlowStore(store, gates={"commit": gate}), max_in_flight=3)
    store.fail("commit", GONE, times=2)
    for step in (1, 2, 3):
        ckpt.save(step, state_of(step))  # would raise if an earlier one had failed by now
    gate.open()
    with pytest.raises(SaveError, match=r"step 1 to .*the disk is gone; saving step 2 to .*the disk is gone"):
        hear(ckpt)
    ckpt.wait()
    ckpt.close()
    assert steps(ckpt) == [3]


def test_the_next_save_raises_a_failure_and_takes_nothing(store: FaultyStore) -> None:
    with Checkpointer(store=store) as ckpt:
        store.fail("commit", GONE)
        ckpt.save(1, state_of(1))
        get_engine().drain()
        with pytest.raises(
            SaveError, match=r"step 1 .*the disk is gone; the save that raised this was not started"
        ):
            ckpt.save(2, state_of(2))
        ckpt.save(3, state_of(3))
    assert steps(ckpt) == [3]


def test_a_failure_of_one_checkpointer_is_no_concern_of_another(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "b") as other:
        store = faulty_store(tmp_path / "a")
        ckpt = Checkpointer(store=store)
        store.fail("commit", GONE)
        ckpt.save(1, state_of(1))
        other.save(1, state_of(1))
        other.wait()
        asyncckpt.save({}, tmp_path / "c.pt")
        asyncckpt.wait()
        with pytest.raises(SaveError, match="the disk is gone"):
            ckpt.close()
    assert steps(other) == [1]


def test_a_failed_save_evicts_nothing(store: FaultyStore) -> None:
    with Checkpointer(store=store, keep=LastN(1)) as ckpt:
        ckpt.save(1, state_of(1)).committed.result(60)
        store.fail("commit", GONE, times=3)
        for step in (2, 3, 4):
            with pytest.raises(SaveError):
                ckpt.save(step, state_of(step)).committed.result(60)
            assert steps(ckpt) == [1]
        ckpt.wait()
        assert store.calls["remove"] == 0
        ckpt.save(5, state_of(5))
        ckpt.wait()
        assert steps(ckpt) == [5]


def test_an_eviction_that_fails_is_told_and_tried_again(store: FaultyStore) -> None:
    with Checkpointer(store=store, keep=LastN(1)) as ckpt:
        store.fail("remove", GONE)
        ckpt.save(1, state_of(1))
        assert ckpt.save(2, state_of(2)).committed.result(60).step == 2
        with pytest.raises(
            SaveError, match=r"2\.pt is saved, but evicting older checkpoints failed: the disk"
        ):
            ckpt.wait()
        assert steps(ckpt) == [1, 2]
        ckpt.save(3, state_of(3))
        ckpt.wait()
        assert steps(ckpt) == [3]


@pytest.mark.parametrize("operation", ["pwrite", "fsync", "replace", "open"])
@pytest.mark.parametrize("times", [1, 2, None])
def test_errors_of_the_disk_come_out_as_one_save_error(
    tmp_path: Path, operation: str, times: int | None
) -> None:
    """Also when several writers fail at once."""
    ops = FaultyOps()
    with Checkpointer(store=LocalStore(str(tmp_path), ops)) as ckpt:
        ops.fail(operation, OSError(28, "No space left on device"), times=times)
        with pytest.raises(SaveError, match=r"step 1 .*no space left on the disk") as told:
            ckpt.save(1, state_of(1, 9 << 20)).committed.result(60)
        text = repr(told.value) + str(told.value)
        assert "TaskGroup" not in text
        assert "ExceptionGroup" not in text
        cause = told.value.__cause__
        assert isinstance(cause, OSError)
        assert cause.errno == 28
        ops.reset()
        ckpt.wait()
        assert list(tmp_path.iterdir()) == []
        ckpt.save(2, state_of(2))
    assert steps(ckpt) == [2]


def test_on_error_is_called_instead_and_is_told_once(store: FaultyStore) -> None:
    calls: list[tuple[Save, AsyncCkptError, bool]] = []

    def on_error(save: Save, error: AsyncCkptError) -> None:
        calls.append((save, error, threading.current_thread() is threading.main_thread()))

    with Checkpointer(store=store, on_error=on_error) as ckpt:
        store.fail("commit", GONE)
        failed = ckpt.save(1, state_of(1))
        ckpt.save(2, state_of(2))
        ckpt.wait()
        assert calls == [(failed, failed.committed.exception(0), False)]
        with pytest.raises(SaveError, match="the disk is gone"):
            failed.committed.result(0)
    assert steps(ckpt) == [2]


def test_a_callback_that_raises_does_not_stop_the_saves(store: FaultyStore) -> None:
    def raising(*_: object) -> None:
        raise RuntimeError("oops")

    with Checkpointer(store=store, on_error=raising) as ckpt:
        store.fail("commit", GONE)
        ckpt.save(1, state_of(1))
        ckpt.save(2, state_of(2)).committed.add_done_callback(raising)
        assert ckpt.save(3, state_of(3)).committed.result(20).step == 3
        assert steps(ckpt) == [2, 3]


def test_a_logging_handler_that_raises_hides_no_outcome(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Raises(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise ValueError(record.getMessage())

    monkeypatch.setattr(logging.getLogger("asyncckpt"), "handlers", [Raises()])
    with Checkpointer(store=store, keep=LastN(1)) as ckpt:
        caplog.set_level(logging.INFO, "asyncckpt")
        assert ckpt.save(1, state_of(1)).committed.result(30).step == 1
        store.fail("commit", GONE)
        with pytest.raises(SaveError, match="the disk is gone"):
            ckpt.save(2, state_of(2)).committed.result(30)
        store.fail("remove", GONE)
        assert ckpt.save(3, state_of(3)).committed.result(30).step == 3
        with pytest.raises(SaveError, match="evicting older checkpoints failed: the disk is gone"):
            ckpt.wait()
        assert steps(ckpt) == [1, 3]


@pytest.mark.parametrize("fails", [False, True])
def test_callbacks_may_look_but_not_wait(store: FaultyStore, *, fails: bool) -> None:
    seen: list[object] = []
    done = threading.Event()

    def look(*_: object) -> None:
        seen.append([checkpoint.step for checkpoint in ckpt.checkpoints()])
        seen.append(ckpt.load(1)["w"][0].item())
        for wait in (ckpt.wait, ckpt.close, asyncckpt.wait):
            try:
                wait()
            except AsyncCkptError as error:
                seen.append(type(error))
        done.set()

    ckpt = Checkpointer(store=store, on_error=look)
    ckpt.save(1, state_of(1)).committed.result(60)
    if fails:
        store.fail("commit", GONE)
    save = ckpt.save(2, state_of(2))
    if not fails:
        save.committed.add_done_callback(look)
    assert done.wait(30)
    assert seen[:2] == [[1] if fails else [1, 2], 1.0]
    assert len(seen) == 5
    ckpt.wait()


def test_the_users_own_exception_is_not_hidden(store: FaultyStore, caplog: pytest.LogCaptureFixture) -> None:
    store.fail("commit", GONE)
    with pytest.raises(ZeroDivisionError) as told, Checkpointer(store=store) as ckpt:  # noqa: PT012 - the same
        ckpt.save(1, state_of(1))
        _ = 1 / 0
    assert "while ZeroDivisionError was raised: saving step 1" in caplog.text
    if sys.version_info >= (3, 11):
        assert "the disk is gone" in told.value.__notes__[0]


def test_pending_saves_are_finished_when_the_block_is_left_by_an_exception(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Checkpointer(tmp_path, max_in_flight=2) as ckpt:  # noqa: PT012
        ckpt.save(1, state_of(1, 1 << 20))
        ckpt.save(2, state_of(2, 1 << 20))
        _ = 1 / 0
    assert steps(ckpt) == [1, 2]


def test_a_wait_that_follows_hears_what_fails_meanwhile(store: FaultyStore) -> None:
    gate = Gate()
    slow = SlowStore(store, gates={"commit": gate})
    with Checkpointer(store=slow) as ckpt, ThreadPoolExecutor(1) as pool:
        store.fail("commit", GONE)
        ckpt.save(1, state_of(1))
        waiting = pool.submit(ckpt.wait)
        gate.wait_for_arrival()
        gate.open()
        with pytest.raises(SaveError, match="the disk is gone"):
            waiting.result(60)


def test_functions_hear_of_their_failures_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    save = asyncckpt.save(state_of(1), tmp_path / "file" / "model.pt")
    with pytest.raises(SaveError, match=r"file/model\.pt"):
        save.committed.result(60)
    asyncckpt.wait()
    asyncckpt.save(state_of(1), tmp_path / "file" / "model.pt")
    with pytest.raises(SaveError, match=r"file/model\.pt"):
        asyncckpt.wait()
    asyncckpt.wait()
    made: Checkpoint = asyncckpt.save(state_of(1), tmp_path / "model.pt").committed.result(60)
    assert made.path == str(tmp_path / "model.pt")
