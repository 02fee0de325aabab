"""What becomes of pending saves when their process ends, is killed, or is interrupted."""

from __future__ import annotations

import random
import signal
import textwrap
import time
from typing import TYPE_CHECKING

import pytest
import torch

from asyncckpt import Checkpointer, LastN
from programs import Interpreter
from support import run_python

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PREPARE = """
import asyncio, faulthandler, os, signal, sys, threading, time
import asyncckpt, torch
from asyncckpt.stores import LocalStore
from asyncckpt.testing import FaultyStore, Gate, SlowStore

def state_of(value, size=1 << 20):
    return {"w": torch.full((size,), float(value))}

class Told(SlowStore):
    # prints what is about to happen, and goes on when a line comes in
    told = ()

    async def before(self, operation, subject):
        if operation in self.told:
            os.write(1, f"{operation}\\n".encode())  # whole, whatever another thread prints
            await asyncio.to_thread(sys.stdin.readline)

path = sys.argv[1]
local = LocalStore(path)
told = Told(local)
"""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


def program(body: str) -> str:
    """Return a program that begins with what they all need."""
    return PREPARE + textwrap.dedent(body)


def steps(path: Path, filename: str = "step-{step:08d}.pt") -> list[int | None]:
    """Return what a new Checkpointer lists, having verified every one."""
    with Checkpointer(path, filename=filename) as ckpt:
        listed = ckpt.checkpoints()
        for checkpoint in listed:
            ckpt.verify(checkpoint.path)
            assert torch.load(checkpoint.path)["w"].unique().tolist() == [checkpoint.step]
    assert sorted(str(entry) for entry in path.iterdir()) == sorted(c.path for c in listed)
    return [checkpoint.step for checkpoint in listed]


SAVE_THREE = """
ckpt = asyncckpt.Checkpointer(path, max_in_flight=3)
def save():
    for step in (1, 2, 3):
        ckpt.save(step, state_of(step))
    asyncckpt.save(state_of(4), os.path.join(path, "other", "4.pt"))
"""


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("save()", 0),
        ("save(); sys.exit(3)", 3),
        ("save(); 1 / 0", 1),
        ("async def main(): save()\nasyncio.run(main())", 0),
        ("async def main(): save(); sys.exit(4)\nasyncio.run(main())", 4),
        ("save(); asyncio.run(asyncio.sleep(0)); del ckpt; import gc; gc.collect()", 0),
        ("thread = threading.Thread(target=save); thread.start(); thread.join()", 0),
    ],
)
def test_what_is_pending_at_the_end_of_the_program_is_finished(
    interpreter: Interpreter, tmp_path: Path, ending: str, status: int
) -> None:
    found, _, errors = interpreter.run(PREPARE + SAVE_THREE + ending, tmp_path / "run")
    assert found == status, errors
    assert ("Traceback" in errors) == (status == 1)
    (tmp_path / "run" / "other").rename(tmp_path / "other")
    assert steps(tmp_path / "run") == [1, 2, 3]
    assert torch.load(tmp_path / "other" / "4.pt")["w"].unique().tolist() == [4]


@pytest.mark.parametrize("call", ["ckpt.save(4, state_of(4))", "ckpt.checkpoints()", "ckpt.load()"])
def test_what_comes_after_that_is_refused_clearly(
    interpreter: Interpreter, tmp_path: Path, call: str
) -> None:
    late = f"import atexit; atexit.register(lambda: {call}); save()"
    _, _, errors = interpreter.run(PREPARE + SAVE_THREE + late, tmp_path / "run")
    assert "\nasyncckpt.errors." in errors
    assert "shut" in errors.splitlines()[-1]
    (tmp_path / "run" / "other").rename(tmp_path / "other")
    assert steps(tmp_path / "run") == [1, 2, 3]


def test_the_same_in_an_interpreter_of_its_own(tmp_path: Path) -> None:
    status, _, errors = run_python(PREPARE + SAVE_THREE + "save()", str(tmp_path / "run"))
    assert (status, errors) == (0, "")
    (tmp_path / "run" / "other").rename(tmp_path / "other")
    assert steps(tmp_path / "run") == [1, 2, 3]


@pytest.mark.parametrize("before", ["", "ckpt.save(0, state_of(0)); ckpt.wait()"])
def test_pending_saves_are_finished_where_no_thread_can_be_started_any_more(
    interpreter: Interpreter, tmp_path: Path, before: str
) -> None:
    """As from Python 3.12 on, once the interpreter has begun to shut down."""
    script = program("""
        def refuse(thread):
            raise RuntimeError("can't create new thread at interpreter shutdown")

        def no_more_threads():
            threading.Thread.start = refuse
            gate.open()

        gate = Gate(opened=True)
        ckpt = asyncckpt.Checkpointer(store=SlowStore(local, gates={"draft": gate}), max_in_flight=3)
        threading._register_atexit(no_more_threads)
        exec(sys.argv[2])
        gate.close()
        for step in (1, 2, 3):
            ckpt.save(step, state_of(step, 10 << 20))
        """)
    status, _, errors = interpreter.run(script, tmp_path, before)
    assert (status, errors) == (0, "")
    assert steps(tmp_path) == ([0, 1, 2, 3] if before else [1, 2, 3])


def test_a_failure_at_exit_is_printed(interpreter: Interpreter, tmp_path: Path) -> None:
    script = program("""
        store, gate = FaultyStore(local), Gate()
        store.fail("commit", OSError("the disk is gone"))
        ckpt = asyncckpt.Checkpointer(store=SlowStore(store, gates={"draft": gate}), max_in_flight=2)
        ckpt.save(1, state_of(1))
        ckpt.save(2, state_of(2))  # would raise if the first had failed by now
        gate.open()
        """)
    _, _, errors = interpreter.run(script, tmp_path)
    assert errors == f"asyncckpt: saving step 1 to {tmp_path}/step-00000001.pt failed: the disk is gone\n"
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize("how", ["on_error", "callback"])
def test_a_callback_that_exits_does_not_stop_the_saves(
    interpreter: Interpreter, tmp_path: Path, how: str
) -> None:
    script = program("""
        def leave(*_):
            sys.exit(3)

        store, gate = FaultyStore(local), Gate()
        store.fail("commit", OSError("the disk is gone"))
        slow = SlowStore(store, gates={"draft": gate})
        ckpt = asyncckpt.Checkpointer(store=slow, max_in_flight=3, on_error=leave)
        ckpt.save(1, state_of(1))
        save = ckpt.save(2, state_of(2))
        if sys.argv[2] == "callback":
            save.committed.add_done_callback(leave)
        gate.open()
        save.committed.result()
        ckpt.save(3, state_of(3)).committed.result()
        """)
    _, _, errors = interpreter.run(script, tmp_path, how)
    assert "Timeout" not in errors, errors
    assert steps(tmp_path) == [2, 3]


@pytest.mark.parametrize("operation", ["draft", "write", "commit", "remove"])
def test_a_process_killed_in_the_middle_leaves_whole_checkpoints_only(
    interpreter: Interpreter, tmp_path: Path, operation: str
) -> None:
    script = program("""
        ckpt = asyncckpt.Checkpointer(store=told, max_in_flight=2, keep=asyncckpt.LastN(1))
        ckpt.save(1, state_of(1))
        ckpt.wait()
        told.told = [sys.argv[2]]
        ckpt.save(2, state_of(2))
        ckpt.save(3, state_of(3))
        ckpt.wait()
        """)
    running = interpreter.start(script, tmp_path, operation)
    assert running.line() == operation
    drafts = [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]
    assert bool(drafts) == (operation in {"write", "commit"})
    running.kill()
    assert running.end()[0] == -signal.SIGKILL
    assert steps(tmp_path) == ([1, 2] if operation == "remove" else [1])
    with Checkpointer(tmp_path) as ckpt:
        latest = ckpt.latest()
        assert latest is not None
        assert ckpt.save(5, {"w": torch.full((1,), 5.0)}).committed.result(60).sequence == latest.sequence + 1


@pytest.mark.parametrize("template", ["step-{step}.pt", "only.pt"])
def test_there_is_a_good_checkpoint_whenever_the_process_is_killed(
    interpreter: Interpreter, tmp_path: Path, template: str
) -> None:
    script = program("""
        options = {"filename": sys.argv[2], "keep": asyncckpt.LastN(1), "overwrite": True}
        ckpt = asyncckpt.Checkpointer(path, **options)
        found = ckpt.latest()
        step = found.step if found else 0
        while True:
            step += 1
            ckpt.save(step, state_of(step, 300_000))
            print(step, flush=True)
        """)
    chance = random.Random(0)
    last = 0
    for _ in range(12):
        running = interpreter.start(script, tmp_path, template)
        for _ in range(2 + chance.randrange(4)):
            taken = int(running.line())
        # Any moment will do: this is where the kill comes from, nothing is waited for.
        time.sleep(chance.random() * 0.02)
        running.kill()
        taken = int((running.end()[1].split() or [str(taken)])[-1])
        found = [step for step in steps(tmp_path, template) if step is not None]
        # One place in flight: before a save is taken the one before the last is durable.
        assert last <= taken - 2 <= max(found) <= taken + 1
        last = max(found)
    # Killed before an eviction, again and again, a run leaves one more each time; the next commit evicts all.
    with Checkpointer(tmp_path, filename=template, keep=LastN(1), overwrite=True) as ckpt:
        ckpt.save(last + 9, {"w": torch.full((1,), last + 9.0)})
    assert steps(tmp_path, template) == [last + 9]


def test_an_interrupt_while_waiting_is_raised_and_the_save_is_finished(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    script = program("""
        told.told = ["commit"]
        ckpt = asyncckpt.Checkpointer(store=told)
        ckpt.save(1, state_of(1))
        try:
            ckpt.wait()
        except KeyboardInterrupt:
            os.write(1, b"interrupted\\n")
        ckpt.wait()
        print([c.step for c in ckpt.checkpoints()])
        """)
    running = interpreter.start(script, tmp_path)
    assert running.line() == "commit"
    running.kill(signal.SIGINT)
    assert running.line() == "interrupted"
    running.tell()
    assert running.end() == (0, "[1]\n", "")
    assert steps(tmp_path) == [1]


def test_an_interrupt_in_the_block_finishes_what_is_pending(interpreter: Interpreter, tmp_path: Path) -> None:
    script = program("""
        told.told = ["draft"]
        with asyncckpt.Checkpointer(store=told, max_in_flight=2) as ckpt:
            ckpt.save(1, state_of(1))
            ckpt.save(2, state_of(2))
            os.write(1, b"taken\\n")
            ckpt.save(3, state_of(3))  # waits for a place
        """)
    running = interpreter.start(script, tmp_path)
    assert {running.line(), running.line()} == {"draft", "taken"}
    running.kill(signal.SIGINT)
    for _ in range(2):
        running.tell()
    status, _, errors = running.end()
    assert status == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    assert steps(tmp_path) == [1, 2]
