"""Ctrl-C, forks, exits and failures while a copy goes on: nothing hangs, is left behind or is torn."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncckpt import BusyError, Checkpointer, LastN, SaveError
from asyncckpt._snapshot import fences
from asyncckpt._snapshot.range_copy import RangeCopy
from copier import copy_threads
from interrupts import held as held_now
from interrupts import interrupt_everywhere, settle, wait_until
from overlaps import Call, Held
from programs import Interpreter
from support import faulty_store
from trainings import momentum, train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from copier import Copier

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    # The interpreter prints and drops what is raised while it closes a generator.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Steady:
    """Looks whether anything is left of an interrupted save, and whether the next one succeeds."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self.step = 0
        self.save_and_step()
        self._steady = held_now()

    def save_and_step(self) -> None:
        """Make an overlapped save that is as it must be."""
        self.step += 1
        save = self._held.save(self.step)
        self._held.opt.step()
        self._held.assert_saved(save)
        settle(self._held.ckpt)

    def check(self, where: str) -> None:
        """Fail if something is left."""
        settle(self._held.ckpt)
        assert self._held.ckpt._saver.in_flight == 0, where
        assert fences.pending() == (), where
        wait_until(lambda: not copy_threads(), where)
        self._held.opt.step()  # after one that was interrupted, nothing is deferred until another has ended
        self.save_and_step()
        wait_until(lambda: held_now() == self._steady, f"{where}, before: {self._steady}")


@pytest.fixture
def widely(stride: int) -> int:
    """How far apart the interrupts are: these calls have many points, and each is followed by a commit."""
    return 11 if stride == 1 else 3 * stride


@pytest.fixture
def opening(copier: Copier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a copy go on once somebody waits for its end, or takes over."""

    def opened(wait: Callable[[RangeCopy], None]) -> Callable[[RangeCopy], None]:
        def call(copy: RangeCopy) -> None:
            copier.open()
            wait(copy)

        return call

    for wait in (RangeCopy.fence, RangeCopy.cancel):
        monkeypatch.setattr(RangeCopy, wait.__name__, opened(wait))


@pytest.fixture
def held(tmp_path: Path, copier: Copier) -> Iterator[Held]:
    with Held(copier, tmp_path, keep=LastN(1)) as held:
        held.backward()
        yield held


@pytest.mark.usefixtures("opening")
@pytest.mark.parametrize("copy", ["held back", "going on"])
@pytest.mark.parametrize("error", [None, MemoryError], ids=["Ctrl-C", "a failing call"])
def test_save(held: Held, copier: Copier, copy: str, error: type[Exception] | None, widely: int) -> None:
    steady = Steady(held)

    def before() -> None:
        steady.step += 1
        settle(held.ckpt)
        if copy == "held back":
            copier.hold()

    def after(where: str) -> None:
        copier.open()
        steady.check(where)

    state = held.training.plain_state()
    points = interrupt_everywhere(
        lambda: held.ckpt.save(steady.step, state, overlap=True), before, after, error, stride=widely
    )
    assert points > 100
    copier.open()


@pytest.mark.usefixtures("opening")
@pytest.mark.parametrize("call", ["opt.step", "ckpt.fence", "ckpt.wait"])
@pytest.mark.parametrize("copy", ["held back", "going on", "ended"])
def test_fence(held: Held, copier: Copier, call: str, copy: str, widely: int) -> None:
    steady = Steady(held)
    saves: list[Any] = []
    calls: dict[str, Callable[[], object]] = {
        "opt.step": held.opt.step,
        "ckpt.fence": held.ckpt.fence,
        "ckpt.wait": held.ckpt.wait,
    }

    def before() -> None:
        steady.step += 1
        settle(held.ckpt)
        saves.append(held.save(steady.step))
        if copy != "held back" or call == "ckpt.wait":
            copier.open()
        if copy == "ended":
            wait_until(lambda: not copy_threads(), "the copy does not end")

    def after(where: str) -> None:
        torch.set_grad_enabled(True)  # an interrupted step of torch may leave it off
        # The step may have been interrupted in the middle, with the fence behind it.
        copier.open()
        held.ckpt.fence()
        held.assert_saved(saves.pop())
        steady.check(where)

    points = interrupt_everywhere(calls[call], before, after, stride=widely)
    assert points > 10
    held.assert_saved(saves.pop())


def test_close(tmp_path: Path, copier: Copier, widely: int) -> None:
    training = train(lambda _: None, momentum)
    ckpts: list[Checkpointer] = []
    step = 0

    def before() -> None:
        nonlocal step
        step += 1
        ckpts.append(Checkpointer(tmp_path, overlap=True))
        training.step()
        copier.hold()
        save = ckpts[-1].save(step, training.state(), overlap=True)
        assert save.stats.overlapped
        copier.wait_for_arrival()
        copier.open()

    def after(where: str) -> None:
        settle(ckpts[-1])
        latest = ckpts.pop().latest()
        assert latest is not None
        assert latest.step == step, where
        assert fences.pending() == (), where

    def close() -> None:
        ckpts[-1].close()

    assert interrupt_everywhere(close, before, after, stride=widely) > 20


@pytest.mark.parametrize("operation", ["draft", "write", "commit"])
def test_a_store_that_fails_during_the_copy(tmp_path: Path, copier: Copier, operation: str) -> None:
    store = faulty_store(tmp_path)
    with Held(copier, store=store) as held:
        steady = Steady(held)
        store.fail(operation, OSError(28, "No space left on device"))
        steady.step += 1
        save = held.save(steady.step)
        copier.release()
        copier.open()
        with pytest.raises(SaveError, match="No space left"):
            save.committed.result(30)
        assert save.snapshotted.done()
        steady.check(operation)


def test_a_store_that_fails_does_not_end_the_fence(tmp_path: Path, copier: Copier) -> None:
    """The buffer is still written to, and the step must not tear the next one who has it."""
    copier.yields = False
    store = faulty_store(tmp_path)
    with Held(copier, store=store) as held:
        held.backward()
        store.fail("draft", OSError(28, "No space left on device"))
        save = held.save()
        before = held.values()
        step = Call(held.opt.step)
        step.assert_waits()
        assert all(torch.equal(one, other) for one, other in zip(held.values(), before, strict=True))
        copier.open()
        step.join()
        assert isinstance(save.committed.exception(30), SaveError)


def test_a_copy_that_fails_fails_the_save(
    tmp_path: Path, copier: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: int) -> None:
        raise OSError("bad memory")

    with Held(copier, tmp_path, keep=LastN(1)) as held:
        steady = Steady(held)
        with monkeypatch.context() as patch:
            patch.setattr("asyncckpt._snapshot.lanes.memmove", fail)
            save = held.ckpt.save(7, held.training.plain_state(), overlap=True)
            held.opt.step()
            with pytest.raises(SaveError, match="could not copy the state to host memory: bad memory"):
                save.committed.result(30)
        steady.step = 7
        steady.check("")


def test_without_threads_the_copy_is_over_when_save_returns(
    tmp_path: Path, copier: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with Held(copier, tmp_path, keep=LastN(1)) as held:
        steady = Steady(held)
        monkeypatch.setattr("asyncckpt._snapshot.deferred.start_threads", refuse)
        monkeypatch.setattr("asyncckpt._snapshot.copy_threads.start_threads", refuse)
        before = copier.behind
        save = held.ckpt.save(7, held.training.plain_state(), overlap=True)
        held.expected[7] = held.training.plain_state()
        copied = copier.fenced
        held.ckpt.wait()
        assert (copier.behind, copier.fenced) == (before, copied)
        held.assert_saved(save)
        monkeypatch.undo()
        monkeypatch.setattr("asyncckpt._snapshot.lanes.memmove", copier)
        steady.step = 7
        steady.check("")


def test_ctrl_c_in_a_copy_without_threads_is_raised(
    tmp_path: Path, copier: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with Held(copier, tmp_path, keep=LastN(1)) as held:
        steady = Steady(held)
        with monkeypatch.context() as patch:
            patch.setattr("asyncckpt._snapshot.deferred.start_threads", refuse)
            patch.setattr("asyncckpt._snapshot.lanes.memmove", interrupt)
            with pytest.raises(KeyboardInterrupt):
                held.ckpt.save(7, held.training.plain_state(), overlap=True)
        steady.step = 7
        steady.check("")


def test_close_with_a_time_limit_leaves_the_copy_alone(tmp_path: Path, copier: Copier) -> None:
    with Held(copier, tmp_path) as held:
        save = held.save()
        with pytest.raises(BusyError, match="1 saves are still pending"):
            held.ckpt.close(timeout=0)
        assert not save.committed.done()
        copier.release()
        held.opt.step()
        held.assert_saved(save)


PROGRAM = """
import os, signal, sys, threading, traceback, warnings
import asyncckpt, torch
from asyncckpt._snapshot import fences, lanes

warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, whoever forks
memmove, may_go_on, arrived = lanes.memmove, threading.Event(), threading.Event()

def held_back(*piece):
    if threading.current_thread() is not threading.main_thread():
        arrived.set()
        may_go_on.wait(60)
    memmove(*piece)

lanes.memmove = held_back
model = torch.nn.Linear(300, 300)
opt = torch.optim.AdamW(model.parameters())
ckpt = asyncckpt.Checkpointer(sys.argv[1], overlap=True)

def step():
    model(torch.ones(2, 300)).square().mean().backward()
    opt.step()

def save(number):
    global expected
    expected = model.weight.detach().clone()
    torch.save(expected, sys.argv[1] + ".expected")
    arrived.clear()
    made = ckpt.save(number, {"model": model, "opt": opt}, overlap=True)
    assert made.stats.overlapped
    arrived.wait(60)
    return made

step()
"""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


def run(interpreter: Interpreter, path: Path, body: str) -> str:
    status, output, errors = interpreter.run(PROGRAM + body, path)
    assert (status, errors) == (0, "")
    return output


def assert_expected(path: Path, step: int) -> None:
    with Checkpointer(path) as ckpt:
        assert [checkpoint.step for checkpoint in ckpt.checkpoints()] == [step]
        assert torch.equal(ckpt.load(step)["model"]["weight"], torch.load(f"{path}.expected"))


def test_a_fork_during_the_copy(interpreter: Interpreter, tmp_path: Path) -> None:
    body = """
pending = save(1)
pid = os.fork()
if not pid:
    signal.alarm(60)
    try:
        assert fences.pending() == ()
        step()  # waits for nothing: the thread that copies is the parent's
        assert isinstance(pending.committed.exception(0), asyncckpt.SaveError)
        ckpt.fence()
        may_go_on.set()
        other = asyncckpt.Checkpointer(sys.argv[1] + ".child")
        made = other.save(2, {"model": model, "opt": opt}, overlap=True)
        assert made.stats.overlapped
        step()
        assert made.committed.result(30).step == 2
        assert fences.pending() == ()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert torch.equal(model.weight, expected)
assert len(fences.pending()) == 1
may_go_on.set()
step()
assert not torch.equal(model.weight, expected)
pending.committed.result(30)
"""
    run(interpreter, tmp_path / "run", body)
    assert_expected(tmp_path / "run", 1)


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "del model, opt, ckpt"])
def test_the_interpreter_ends_during_the_copy(interpreter: Interpreter, tmp_path: Path, end: str) -> None:
    body = f"""
from asyncckpt._saving import engine

def let_go_at_the_end():
    while not engine._ended:
        may_go_on.wait(0.001)
    may_go_on.set()

save(1)
threading.Thread(target=let_go_at_the_end, daemon=True).start()
{end}
"""
    run(interpreter, tmp_path / "run", body)
    assert_expected(tmp_path / "run", 1)


def test_the_interpreter_ends_on_an_error_after_the_fence(interpreter: Interpreter, tmp_path: Path) -> None:
    body = """
save(1)
may_go_on.set()
step()
raise ValueError("of the training")
"""
    status, _, errors = interpreter.run(PROGRAM + body, tmp_path / "run")
    assert status == 1
    assert "ValueError: of the training" in errors
    assert_expected(tmp_path / "run", 1)
