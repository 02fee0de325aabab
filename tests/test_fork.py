"""A forked child has an engine of its own, and nothing of its parent's saves to wait for or to hold."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING

import pytest
import torch

from asyncckpt import Checkpointer
from programs import Interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PREPARE = """
import faulthandler, multiprocessing, os, signal, sys, threading, traceback, warnings
import asyncckpt, torch
from asyncckpt.stores import LocalStore
from asyncckpt.testing import Gate, SlowStore

warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, whoever forks

def give_up(*error):
    traceback.print_exception(*error)
    sys.stderr.flush()
    os._exit(1)  # the end of the program would wait for what is held back

sys.excepthook = give_up
# Who hangs says where, and ends. The usual watchdog is a thread: the end of a forked child would wait for it.
faulthandler.cancel_dump_traceback_later()
faulthandler.register(signal.SIGALRM, chain=True)
signal.alarm(100)

def state_of(value, size=1 << 20):
    return {"w": torch.full((size,), float(value))}

def child(body):
    # runs a function in a forked child; returns its process id
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(80)
    try:
        body()
    except BaseException as error:
        give_up(error)
    os._exit(0)

def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

path = sys.argv[1]
gate, parent = Gate(opened=True), os.getpid()

class HeldInParent(SlowStore):
    async def before(self, operation, subject):
        if os.getpid() == parent:
            await super().before(operation, subject)

store = HeldInParent(LocalStore(path), gates={"commit": gate})
ckpt = asyncckpt.Checkpointer(store=store, max_in_flight=2)
"""

# Saves step 1 and holds the save of step 2 back where it would be committed.
HOLD = """
first = ckpt.save(1, state_of(1))
ckpt.wait()
gate.close()
pending = ckpt.save(2, state_of(2))
gate.wait_for_arrival(2)
"""

# Lets the save of step 2 go on: what children did must have made no difference to it.
FINISH = """
assert not pending.committed.done()
gate.open()
assert pending.committed.result(20).step == 2
ckpt.save(5, state_of(5))
ckpt.wait()
"""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


def run(interpreter: Interpreter, path: Path, *bodies: str) -> str:
    status, output, errors = interpreter.run(PREPARE + "".join(map(textwrap.dedent, bodies)), path)
    assert (status, errors) == (0, "")
    return output


def steps(path: Path) -> list[int]:
    """Return the steps of a directory in ascending order, having verified every file and found no other."""
    with Checkpointer(path) as ckpt:
        listed = ckpt.checkpoints()
        for checkpoint in listed:
            ckpt.verify(checkpoint.path)
            assert torch.load(checkpoint.path)["w"].unique().tolist() == [checkpoint.step]
    assert sorted(str(entry) for entry in path.iterdir()) == sorted(c.path for c in listed)
    return sorted(checkpoint.step for checkpoint in listed if checkpoint.step is not None)


def test_a_child_saves_with_an_engine_of_its_own(interpreter: Interpreter, tmp_path: Path) -> None:
    body = """
        def body():
            assert ckpt.save(3, state_of(3)).committed.result(10).step == 3
            asyncckpt.save(state_of(4), sys.argv[1] + ".pt").committed.result(10)
            ckpt.save(4, state_of(4))
            ckpt.wait(10)
            assert [c.step for c in ckpt.checkpoints() if c.step != 3] == [1, 4]
            assert ckpt.load(3)["w"].unique().tolist() == [3]

        assert status_of(child(body)) == 0
        """
    run(interpreter, tmp_path / "run", HOLD, body, FINISH)
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert torch.load(tmp_path / "run.pt")["w"].unique().tolist() == [4]


def test_a_child_is_told_at_once_that_a_pending_save_is_the_parents(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    body = """
        def body():
            assert first.committed.result(0).step == 1
            assert pending.snapshotted.result(0) is None
            error = pending.committed.exception(0)
            assert isinstance(error, asyncckpt.SaveError) and "forked from" in str(error)
            ckpt.wait(0)  # nothing is pending here, and nothing is left to be told
            assert "0 in flight" in repr(ckpt)
            assert asyncckpt._saving.engine.get_engine().arena.statistics().leases == 0

        assert status_of(child(body)) == 0
        """
    run(interpreter, tmp_path, HOLD, body, FINISH)
    assert steps(tmp_path) == [1, 2, 5]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_child_keeps_no_memory_of_the_parents(interpreter: Interpreter, tmp_path: Path) -> None:
    body = """
        def held(pid):
            # kilobytes of memory that is not copied for forked children, as the arena's is not
            with open(f"/proc/{pid}/smaps") as maps:
                areas = maps.read().split("\\nVmFlags:")
            flags = [area.partition("\\n")[0].split() for area in areas[1:]]
            sizes = [int(area.rpartition("\\nSize:")[2].split()[0]) for area in areas[:-1]]
            return sum(size for size, kept in zip(sizes, flags, strict=True) if "dc" in kept)

        ckpt.save(3, state_of(3, 2 << 20))  # into a second buffer
        before = held(os.getpid())
        assert before << 10 >= asyncckpt._saving.engine.get_engine().arena.statistics().mapped > 4 << 20
        ready, told = os.pipe()
        pid = child(lambda: (os.write(told, b"x"), signal.pause()))
        os.read(ready, 1)
        assert held(pid) == 0
        os.kill(pid, signal.SIGKILL)
        assert status_of(pid) == -signal.SIGKILL
        assert held(os.getpid()) == before
        """
    run(interpreter, tmp_path, HOLD, body, FINISH)
    assert steps(tmp_path) == [1, 2, 3, 5]


ENDINGS = {
    "multiprocessing": """
        process = multiprocessing.get_context("fork").Process(target=body)
        process.start()
        process.join(80)
        assert process.exitcode == 0
        """,
    "os.fork": """
        pid = os.fork()
        if not pid:
            signal.alarm(80)
            body()
            sys.exit(0)
        assert status_of(pid) == 0
        """,
}


@pytest.mark.parametrize("how", ENDINGS)
def test_what_is_pending_in_a_child_is_finished_when_it_ends(
    interpreter: Interpreter, tmp_path: Path, how: str
) -> None:
    body = """
        def body():
            ckpt.save(3, state_of(3))
            ckpt.save(4, state_of(4))
        """
    run(interpreter, tmp_path, HOLD, body, ENDINGS[how], FINISH)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_fork_at_any_moment_leaves_no_lock_behind(interpreter: Interpreter, tmp_path: Path) -> None:
    """The main thread saves as fast as it can while another one forks."""
    body = """
        def fork_again_and_again():
            for number in range(20):
                def body():
                    other = asyncckpt.Checkpointer(sys.argv[1] + ".children")
                    other.save(number, state_of(number, 1000)).committed.result(10)
                statuses.append(status_of(child(body)))

        statuses, step = [], 0
        thread = threading.Thread(target=fork_again_and_again)
        thread.start()
        while thread.is_alive():
            step += 1
            ckpt.save(step, state_of(step, 5000))
        assert statuses == [0] * 20, statuses
        ckpt.wait()
        print(step)
        """
    last = int(run(interpreter, tmp_path / "run", body))
    assert steps(tmp_path / "run") == [*range(1, last + 1)]
    assert steps(tmp_path / "run.children") == [*range(20)]


def test_a_data_loader_forks_its_workers_while_a_save_is_pending(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    body = """
        data = torch.utils.data.TensorDataset(torch.arange(12))
        options = {"batch_size": 4, "num_workers": 1, "multiprocessing_context": "fork"}
        for _ in range(2):
            loader = torch.utils.data.DataLoader(data, **options)
            assert torch.cat([batch for batch, in loader]).tolist() == [*range(12)]
        """
    run(interpreter, tmp_path, HOLD, body, FINISH)
    assert steps(tmp_path) == [1, 2, 5]
