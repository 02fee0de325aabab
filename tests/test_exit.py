"""How a process ends while threads of it still save: nothing hangs, and what was taken is durable."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import pytest

from asyncckpt import Checkpointer
from programs import Interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PREPARE = """
import atexit, faulthandler, resource, signal, sys, threading, time
import asyncckpt, torch
from asyncckpt.stores import LocalStore
from asyncckpt.testing import FaultyStore, Gate, SlowStore

def state_of(value, size=1 << 20):
    return {"w": torch.full((size,), float(value))}

path = sys.argv[1]
"""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


def run(interpreter: Interpreter, path: Path, body: str) -> tuple[int, str, str]:
    status, output, errors = interpreter.run(PREPARE + textwrap.dedent(body), path)
    assert "Timeout" not in errors, errors
    return status, output, errors


def steps(path: Path) -> list[int | None]:
    ckpt = Checkpointer(path)
    for checkpoint in ckpt.checkpoints():
        ckpt.verify(checkpoint.path)
    return [checkpoint.step for checkpoint in ckpt.checkpoints()]


def test_a_thread_that_outlives_the_main_thread_goes_on_saving(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    body = """
        ckpt = asyncckpt.Checkpointer(path)
        main_is_over = threading.Event()
        threading._register_atexit(main_is_over.set)

        def train():
            main_is_over.wait()
            for step in range(1, 6):
                ckpt.save(step, state_of(step))
            print(ckpt.load()["w"][0].item())

        threading.Thread(target=train).start()
        """
    assert run(interpreter, tmp_path, body) == (0, "5.0\n", "")
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_thread_that_outlives_the_main_thread_saves_for_the_first_time(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    # Not even the imports of the first use come before the main thread has ended.
    script = """
        import sys, threading
        import asyncckpt

        main_is_over = threading.Event()
        threading._register_atexit(main_is_over.set)

        def train():
            main_is_over.wait()
            print("asyncckpt._saving.engine" in sys.modules)
            ckpt = asyncckpt.Checkpointer(sys.argv[1])
            ckpt.save(1, {"a": 1})
            ckpt.save(2, {"a": 2})

        threading.Thread(target=train).start()
        """
    assert interpreter.run(script, tmp_path) == (0, "False\n", "")
    assert steps(tmp_path) == [1, 2]


def test_a_daemon_thread_that_keeps_saving_does_not_keep_the_process(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    body = """
        ckpt = asyncckpt.Checkpointer(path, keep=asyncckpt.LastN(3))
        begun = threading.Event()

        def train():
            step = 0
            while True:
                step += 1
                try:
                    ckpt.save(step, state_of(step))
                except asyncckpt.SaveError as error:
                    assert "shutting down" in str(error)
                    time.sleep(3600)
                begun.set()

        threading.Thread(target=train, daemon=True).start()
        begun.wait()
        """
    assert run(interpreter, tmp_path, body) == (0, "", "")
    assert steps(tmp_path)


def test_a_daemon_thread_that_saves_at_exit_keeps_no_thread(interpreter: Interpreter, tmp_path: Path) -> None:
    body = """
        ckpt = asyncckpt.Checkpointer(path)
        ckpt.save(1, state_of(1)).committed.result()
        engine = asyncckpt._saving.engine.get_engine()
        ending, refused = threading.Event(), threading.Event()

        def train():
            ending.wait()
            try:
                ckpt.save(2, state_of(2))
            except asyncckpt.SaveError as error:
                print(error)
            refused.set()

        def notify_all():
            if engine._releasing and not ending.is_set():
                ending.set()
                refused.wait()
            notify()

        threading.Thread(target=train, daemon=True).start()
        ckpt.wait()
        notify, engine._changed.notify_all = engine._changed.notify_all, notify_all
        atexit.register(lambda: print(asyncckpt.statistics().threads, "threads"))
        """
    output = "the interpreter is shutting down; save, load and list earlier\n0 threads\n"
    assert run(interpreter, tmp_path, body) == (0, output, "")
    assert steps(tmp_path) == [1]


def test_a_save_that_is_refused_at_exit_takes_nothing(interpreter: Interpreter, tmp_path: Path) -> None:
    body = """
        ckpt = asyncckpt.Checkpointer(path)

        @atexit.register
        def leave():
            for _ in range(2):
                try:
                    ckpt.save(2, state_of(2))
                except asyncckpt.SaveError as error:
                    print(error)
            ckpt.close()

        ckpt.save(1, state_of(1))
        """
    status, output, errors = run(interpreter, tmp_path, body)
    assert (status, errors) == (0, "")
    assert output.count("the interpreter is shutting down") == 2
    assert steps(tmp_path) == [1]


def test_ctrl_c_at_exit_gives_up_what_is_pending_and_says_so(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    body = """
        gate = Gate(opened=True)
        ckpt = asyncckpt.Checkpointer(store=SlowStore(LocalStore(path), gates={"draft": gate}))
        ckpt.save(1, state_of(1))
        ckpt.wait()
        gate.close()
        ckpt.save(2, state_of(2))
        gate.wait_for_arrival(2)
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def tell():
            while not asyncckpt._saving.engine._ended:
                time.sleep(0.001)
            print("over", flush=True)

        threading.Thread(target=tell, daemon=True).start()
        """
    running = interpreter.start(PREPARE + textwrap.dedent(body), tmp_path)
    assert running.line() == "over"
    running.kill(2)
    _, _, errors = running.end()
    assert f"asyncckpt: {tmp_path}/step-00000002.pt is given up, as the exit was interrupted" in errors
    assert steps(tmp_path) == [1]


def test_no_thread_can_be_started(interpreter: Interpreter, tmp_path: Path) -> None:
    body = """
        start = threading.Thread.start

        def refuse(thread):
            raise RuntimeError("can't start new thread")

        threading.Thread.start = refuse
        try:
            asyncckpt.Checkpointer(path)
        except asyncckpt.SaveError as error:
            print(error)
        threading.Thread.start = start
        with asyncckpt.Checkpointer(path) as ckpt:
            threading.Thread.start = refuse  # the copy has no helpers then
            ckpt.save(1, state_of(1, 8 << 20))
            ckpt.wait()
            threading.Thread.start = start
        """
    status, output, errors = run(interpreter, tmp_path, body)
    assert (status, errors) == (0, "")
    assert "cannot start its threads: can't start new thread; raise the limit" in output
    assert steps(tmp_path) == [1]


def test_only_some_threads_can_be_started(interpreter: Interpreter, tmp_path: Path) -> None:
    body = """
        start = threading.Thread.start

        def refuse(thread):
            if thread.name == "asyncckpt-files_1":
                raise RuntimeError("can't start new thread")
            start(thread)

        threading.Thread.start = refuse
        try:
            asyncckpt.save(state_of(1), path + "/1.pt")
        except asyncckpt.SaveError as error:
            print(error)
        """
    status, output, errors = run(interpreter, tmp_path, body)
    assert (status, errors) == (0, "")
    assert "cannot start its threads: can't start new thread; raise the limit" in output
    assert not list(tmp_path.iterdir())


def test_no_file_can_be_opened_for_the_threads(interpreter: Interpreter, tmp_path: Path) -> None:
    body = """
        ckpt = asyncckpt.Checkpointer(path)
        ckpt.save(1, state_of(1))
        asyncckpt.release()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        for _ in range(2):
            try:
                ckpt.save(2, state_of(2))
            except asyncckpt.SaveError as error:
                print(error)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for thread in threading.enumerate():
            if thread.name.startswith("asyncckpt"):
                thread.join()
        ckpt.save(3, state_of(3)).committed.result()
        ckpt.close()
        """
    status, output, _ = run(interpreter, tmp_path, body)  # asyncio complains of a loop of its own
    assert status == 0
    assert output.count("cannot start its threads: [Errno 24] Too many open files") == 2
    assert steps(tmp_path) == [1, 3]


def test_no_memory_can_be_had(interpreter: Interpreter, tmp_path: Path) -> None:
    body = """
        ckpt = asyncckpt.Checkpointer(path)
        state = state_of(1, 8 << 20)
        with open("/proc/self/statm") as statm:
            mapped = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (1 << 20), resource.RLIM_INFINITY))
        for _ in range(2):
            try:
                ckpt.save(1, state)
            except asyncckpt.SaveError as error:
                print(type(error).__name__, error)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        ckpt.save(2, state)
        ckpt.close()
        assert asyncckpt._saving.engine.get_engine().arena.statistics().leases == 0
        """
    status, output, errors = run(interpreter, tmp_path, body)
    assert (status, errors) == (0, "")
    assert output.count("SaveError cannot take") == 2
    assert "ulimit -v" in output
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89])
def test_ctrl_c_at_any_point_of_the_exit(interpreter: Interpreter, tmp_path: Path, number: int) -> None:
    """The process ends; what is not durable then is told."""
    body = f"""
        left = {number}

        def count(frame, event, _):
            global left
            if event in {{"call", "c_return"}} and "asyncckpt" in frame.f_code.co_filename:
                left -= 1
                if left < 0:
                    sys.setprofile(None)
                    raise KeyboardInterrupt

        ckpt = asyncckpt.Checkpointer(path, max_in_flight=2)
        ckpt.save(1, state_of(1))
        ckpt.wait()
        ckpt.save(2, state_of(2))
        threading._register_atexit(lambda: sys.setprofile(count))
        """
    _, _, errors = run(interpreter, tmp_path, body)
    found = steps(tmp_path)
    assert found in ([1], [1, 2])
    assert found == [1, 2] or "step-00000002.pt is given up" in errors
