"""A signal that ends a process stops a training loop instead, and no save is lost."""

from __future__ import annotations

import os
import signal
import textwrap
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncckpt import AsyncCkptError, Checkpointer, SignalError, StopOnSignal
from programs import Interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

PREPARE = """
import asyncio, multiprocessing, os, signal, sys, threading, warnings
import asyncckpt, torch
from asyncckpt import Checkpointer, StopOnSignal
from asyncckpt.stores import LocalStore
from asyncckpt.testing import SlowStore

class Told(SlowStore):
    # prints what is about to happen, and goes on when a line comes in
    async def before(self, operation, subject):
        if operation == "commit":
            tell(operation)
            await asyncio.to_thread(sys.stdin.readline)

def tell(line):
    print(line, flush=True)

def train(step):
    # prints the step, and ends it when a line comes in
    tell(step)
    sys.stdin.readline()

def state_of(value):
    return {"w": torch.full((1 << 18,), float(value))}

path = sys.argv[1]
"""

LOOP = """
with StopOnSignal(*sys.argv[2:]) as stop, Checkpointer(path) as ckpt:
    for step in range(1, 5):
        train(step)
        if stop or step % 2 == 0:
            ckpt.save(step, state_of(step))
        if stop:
            break
assert all(signal.getsignal(number) == signal.SIG_DFL for number in stop._signals)
stop.exit()
"""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    former = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    yield
    assert {number: signal.getsignal(number) for number in former} == former


def program(body: str) -> str:
    """Return a program that begins with what they all need."""
    return PREPARE + textwrap.dedent(body)


def steps(path: Path) -> list[int | None]:
    """Return the steps that a new Checkpointer lists, having verified every one; there is no other file."""
    with Checkpointer(path) as ckpt:
        listed = ckpt.checkpoints()
        for checkpoint in listed:
            ckpt.verify(checkpoint.path)
            assert torch.load(checkpoint.path)["w"].unique().tolist() == [checkpoint.step]
    assert sorted(str(entry) for entry in path.iterdir()) == sorted(c.path for c in listed)
    return [checkpoint.step for checkpoint in listed]


class TestLoop:
    @pytest.mark.parametrize(
        ("names", "number"),
        [([], signal.SIGTERM), ([], signal.SIGHUP), (["USR1", "sigterm"], signal.SIGUSR1)],
    )
    def test_a_signal_in_a_step_ends_the_loop_after_a_last_save(
        self, interpreter: Interpreter, tmp_path: Path, names: list[str], number: signal.Signals
    ) -> None:
        process = interpreter.start(program(LOOP), tmp_path, *names)
        for step in ("1", "2", "3"):
            assert process.line() == step
            if step == "3":
                process.kill(number)
            process.tell()
        status, output, errors = process.end()
        assert (status, output, errors) == (128 + number, "", "")
        assert steps(tmp_path) == [2, 3]

    def test_without_a_signal_the_loop_ends_as_usual(self, interpreter: Interpreter, tmp_path: Path) -> None:
        process = interpreter.start(program(LOOP), tmp_path)
        for _ in range(4):
            process.line()
            process.tell()
        assert process.end() == (0, "", "")
        assert steps(tmp_path) == [2, 4]


class TestPendingSave:
    BODY = """
        with {stop} as stop, Checkpointer(store=Told(LocalStore(path)), max_in_flight=2) as ckpt:
            ckpt.save(1, state_of(1))
            for step in range(2, 1_000_000_000):
                if stop:
                    ckpt.save(step := 2, state_of(2))
                    break
        tell(stop.signum.name)
        """

    def test_a_signal_during_a_save_does_not_lose_it(self, interpreter: Interpreter, tmp_path: Path) -> None:
        process = interpreter.start(program(self.BODY.format(stop="StopOnSignal()")), tmp_path)
        assert process.line() == "commit"
        process.kill(signal.SIGTERM)
        process.tell()
        assert process.line() == "commit"
        process.tell()
        assert process.end() == (0, "SIGTERM\n", "")
        assert steps(tmp_path) == [1, 2]

    def test_without_the_handler_it_is_lost(self, interpreter: Interpreter, tmp_path: Path) -> None:
        script = program(
            "import contextlib\n" + textwrap.dedent(self.BODY).format(stop="contextlib.nullcontext()")
        )
        process = interpreter.start(script, tmp_path)
        assert process.line() == "commit"
        process.kill(signal.SIGTERM)
        assert process.end(closing_input=False)[0] == -signal.SIGTERM
        assert steps(tmp_path) == []

    def test_a_signal_while_the_last_save_is_waited_for_does_not_lose_it(
        self, interpreter: Interpreter, tmp_path: Path
    ) -> None:
        body = """
            with StopOnSignal() as stop, Checkpointer(store=Told(LocalStore(path))) as ckpt:
                ckpt.save(1, state_of(1))
            stop.exit()
            """
        process = interpreter.start(program(body), tmp_path)
        assert process.line() == "commit"
        process.kill(signal.SIGHUP)
        process.tell()
        assert process.end() == (128 + signal.SIGHUP, "", "")
        assert steps(tmp_path) == [1]


class TestSecondSignal:
    BODY = """
        asyncckpt.signals._REPEATED_SECONDS = float(sys.argv[3])
        with StopOnSignal(sys.argv[2]) as stop, Checkpointer(store=Told(LocalStore(path))) as ckpt:
            ckpt.save(1, state_of(1))
            while not stop:
                pass
            tell("stop")
        """

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
    def test_one_that_comes_at_once_counts_as_the_same(
        self, interpreter: Interpreter, tmp_path: Path, name: str
    ) -> None:
        process = interpreter.start(program(self.BODY), tmp_path, name, "inf")
        assert process.line() == "commit"
        for _ in range(2):
            process.kill(signal.Signals[name])
        assert process.line() == "stop"
        process.kill(signal.Signals[name])
        process.tell()
        assert process.end() == (0, "", "")
        assert steps(tmp_path) == [1]

    def test_a_later_one_ends_the_process(self, interpreter: Interpreter, tmp_path: Path) -> None:
        process = interpreter.start(program(self.BODY), tmp_path, "TERM", "0")
        assert process.line() == "commit"
        process.kill(signal.SIGTERM)
        assert process.line() == "stop"
        process.kill(signal.SIGTERM)
        # An end of its input would let the save go on, and it might be quicker than the signal.
        assert process.end(closing_input=False) == (-signal.SIGTERM, "", "")
        assert steps(tmp_path) == []

    def test_a_later_interrupt_raises_keyboard_interrupt(
        self, interpreter: Interpreter, tmp_path: Path
    ) -> None:
        body = """
            asyncckpt.signals._REPEATED_SECONDS = 0
            try:
                with StopOnSignal("INT") as stop:
                    signal.raise_signal(signal.SIGINT)
                    assert stop
                    signal.raise_signal(signal.SIGINT)
                    assert False
            except KeyboardInterrupt:
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            """
        assert interpreter.run(program(body), tmp_path) == (0, "", "")

    def test_one_of_another_kind_is_a_first_one(self, interpreter: Interpreter, tmp_path: Path) -> None:
        body = """
            asyncckpt.signals._REPEATED_SECONDS = 0
            with StopOnSignal() as stop:
                signal.raise_signal(signal.SIGHUP)
                signal.raise_signal(signal.SIGTERM)
            assert stop.signum is signal.SIGHUP
            """
        assert interpreter.run(program(body), tmp_path) == (0, "", "")


class TestFormerHandler:
    @pytest.fixture
    def calls(self) -> Iterator[list[int]]:
        """The signals that a handler of SIGUSR1 set before is called with."""
        calls: list[int] = []

        def note(number: int, frame: FrameType | None) -> None:
            assert frame is not None
            calls.append(number)

        former = signal.signal(signal.SIGUSR1, note)
        yield calls
        assert signal.getsignal(signal.SIGUSR1) is note
        signal.signal(signal.SIGUSR1, former)

    def test_a_function_is_called_for_every_signal_and_restored(self, calls: list[int]) -> None:
        with StopOnSignal("USR1") as stop:
            for _ in range(3):
                signal.raise_signal(signal.SIGUSR1)
        assert stop
        assert calls == [signal.SIGUSR1] * 3

    def test_what_a_function_raises_is_raised(self) -> None:
        def end(*_: object) -> None:
            raise SystemExit(7)

        former = signal.signal(signal.SIGUSR1, end)
        try:
            with pytest.raises(SystemExit, match="7"), StopOnSignal("USR1") as stop:
                signal.raise_signal(signal.SIGUSR1)
            assert stop
            assert signal.getsignal(signal.SIGUSR1) is end
        finally:
            signal.signal(signal.SIGUSR1, former)

    @pytest.mark.usefixtures("calls")
    def test_a_handler_set_meanwhile_stays(self) -> None:
        def other(*_: object) -> None:
            pass

        former = signal.getsignal(signal.SIGUSR1)
        with StopOnSignal("USR1", "USR2"):
            signal.signal(signal.SIGUSR1, other)
        assert signal.getsignal(signal.SIGUSR1) is other
        signal.signal(signal.SIGUSR1, former)

    def test_a_handler_set_meanwhile_can_call_ours_also_afterwards(self, calls: list[int]) -> None:
        former = signal.getsignal(signal.SIGUSR1)
        with StopOnSignal("USR1") as stop:
            ours: Any = signal.getsignal(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, lambda number, frame: [ours(number, frame)])
            signal.raise_signal(signal.SIGUSR1)
            assert stop
        signal.raise_signal(signal.SIGUSR1)
        assert calls == [signal.SIGUSR1] * 2
        signal.signal(signal.SIGUSR1, former)

    def test_an_inner_one_passes_signals_on_to_an_outer_one(self, calls: list[int]) -> None:
        with StopOnSignal("USR1") as outer:
            with StopOnSignal("USR1", "USR2") as inner:
                signal.raise_signal(signal.SIGUSR1)
            assert outer.signum is inner.signum is signal.SIGUSR1
            signal.raise_signal(signal.SIGUSR1)
        assert calls == [signal.SIGUSR1] * 2

    def test_an_ignored_signal_stays_ignored_unless_it_is_named(
        self, interpreter: Interpreter, tmp_path: Path
    ) -> None:
        """As SIGHUP is under nohup."""
        body = """
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            with StopOnSignal() as stop:
                signal.raise_signal(signal.SIGHUP)
                assert not stop
            with StopOnSignal("HUP") as stop:
                signal.raise_signal(signal.SIGHUP)
                signal.raise_signal(signal.SIGHUP)
                assert stop
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            """
        assert interpreter.run(program(body), tmp_path) == (0, "", "")


class TestErrors:
    @pytest.mark.parametrize("value", ["SIGNONE", "", "SIG_DFL", 0, 1000, True, None, [signal.SIGTERM]])
    def test_what_is_not_a_signal_is_refused(self, value: Any) -> None:
        with pytest.raises(SignalError, match="is not a signal; use a name such as 'SIGUSR1'") as caught:
            StopOnSignal(signal.SIGTERM, value)
        assert repr(value) in str(caught.value)
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, AsyncCkptError)

    def test_another_thread_is_refused(self) -> None:
        errors: list[Exception] = []

        def enter() -> None:
            try:
                with StopOnSignal("USR1"):
                    pass
            except SignalError as error:
                errors.append(error)

        thread = threading.Thread(target=enter, name="trainer")
        thread.start()
        thread.join()
        assert "in the main thread alone, not in 'trainer'" in str(errors[0])

    @pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
    def test_a_signal_without_handlers_is_refused_and_no_handler_is_changed(self, name: str) -> None:
        with (
            pytest.raises(SignalError, match=f"{name} cannot be handled by a program"),
            StopOnSignal("USR1", name),
        ):
            pytest.fail("it was entered")

    def test_a_handler_of_c_code_is_refused_and_no_handler_is_changed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = signal.getsignal
        with monkeypatch.context() as patch:
            patch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGUSR2 else real(n))
            with (
                pytest.raises(SignalError, match="SIGUSR2 is handled by C code"),
                StopOnSignal("USR1", "USR2"),
            ):
                pytest.fail("it was entered")

    def test_entering_twice_is_refused(self) -> None:
        with StopOnSignal("USR1") as stop:
            with pytest.raises(SignalError, match="entered already"), stop:
                pytest.fail("it was entered")
            signal.raise_signal(signal.SIGUSR1)
            assert stop


class TestForkedChild:
    def test_a_child_has_the_former_handlers(self, interpreter: Interpreter, tmp_path: Path) -> None:
        body = """
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            with StopOnSignal() as stop, StopOnSignal("TERM") as inner:
                ready = multiprocessing.Event()
                process = multiprocessing.get_context("fork").Process(
                    target=lambda: (ready.set(), threading.Event().wait())
                )
                process.start()
                ready.wait()
                process.terminate()
                process.join()
                status = process.exitcode
                process.kill()
                assert status == -signal.SIGTERM, status
                assert not stop and not inner
                signal.raise_signal(signal.SIGTERM)
                assert stop and inner
            """
        assert interpreter.run(program(body), tmp_path) == (0, "", "")

    def test_a_child_can_leave_the_context(self, interpreter: Interpreter, tmp_path: Path) -> None:
        body = """
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            with StopOnSignal("USR1") as stop:
                pid = os.fork()
            assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
            if not pid:
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            """
        assert interpreter.run(program(body), tmp_path) == (0, "", "")


def test_repr_names_the_signals_and_what_came() -> None:
    with StopOnSignal("usr1", signal.SIGUSR2, signal.SIGUSR1.value) as stop:
        assert repr(stop) == "<StopOnSignal SIGUSR1, SIGUSR2 received=None>"
        stop.exit()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert repr(stop) == "<StopOnSignal SIGUSR1, SIGUSR2 received=SIGUSR2>"
        with pytest.raises(SystemExit) as caught:
            stop.exit()
        assert caught.value.code == 128 + signal.SIGUSR2
