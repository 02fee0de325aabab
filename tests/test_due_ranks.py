"""`Checkpointer.due` in a process group: all ranks get the answers of rank 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from process_groups import on_ranks
from programs import Interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PREPARE = """
import os, signal
from asyncckpt import Budget, Checkpointer, Every
from asyncckpt._ranks import verdicts
from asyncckpt._saving import due
from asyncckpt.stores import LocalStore
from asyncckpt.testing import FaultyStore

state = {"w": torch.ones(3)}

def run(ckpt, steps, saves=rank == 0):
    # rank 0 saves; the ranks take each step together
    found = []
    for step in steps:
        dist.barrier()
        if ckpt.due(step):
            found.append(step)
            if saves:
                ckpt.save(step, state).committed.exception()
    return found
"""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


def test_multiples_of_steps_are_due_on_all_ranks_and_need_few_exchanges(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PREPARE
        + """
due._LOOK_AGAIN = 0  # what time could change would be looked at in each step
ckpt = Checkpointer(directory, every=Every(steps=500))
told.append(run(ckpt, range(1, 1201)))
told.append(ckpt._due._agreement._number)
""",
    )
    assert told[0] == told[1]
    assert told[0][0] == [500, 1000]
    assert told[0][1] <= 12


def test_multiples_of_steps_are_found_however_many_steps_are_between_calls(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PREPARE
        + """
with Checkpointer(directory, every=Every(steps=500)) as ckpt:
    told.append(run(ckpt, [1, 2, 3, *range(10, 2000, 10), *range(100, 501, 100)]))
""",
    )
    assert told == [[[500, 1000, 1500, 500]]] * 2


def test_only_rank_0_makes_memory_ready_for_a_first_save(interpreter: Interpreter, tmp_path: Path) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PREPARE
        + """
layer = torch.nn.Linear(200, 200)
opt = torch.optim.AdamW(layer.parameters())
with Checkpointer(directory, overlap=True) as ckpt:
    ckpt.attach(opt)
    for _ in range(3):
        layer(torch.ones(2, 200)).sum().backward()
        opt.step()
    told.append(asyncckpt.statistics().memory > 0)
""",
    )
    assert told == [[True], [False]]


def test_a_schedule_computes_with_finite_times(interpreter: Interpreter, tmp_path: Path) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PREPARE
        + """
class EveryMinute:
    def due(self, progress):
        return int(progress.seconds) >= 60

with Checkpointer(directory, every=EveryMinute()) as ckpt:
    told.append(run(ckpt, range(1, 5)))
""",
    )
    assert told == [[[]]] * 2


def test_a_time_is_over_on_all_ranks_when_it_is_on_rank_0(interpreter: Interpreter, tmp_path: Path) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PREPARE
        + """
every = Every(hours=1) if rank else Every(seconds=0.02)
with Checkpointer(directory, every=every | Budget(0.5)) as ckpt:
    told.append(run(ckpt, range(1, 2000)))
if rank == 0:
    told.append([c.step for c in ckpt.checkpoints()])
""",
    )
    assert told[0][0] == told[1][0] == told[0][1]
    assert len(told[0][0]) > 1


def test_each_rank_may_have_checkpointers_and_series_of_its_own(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PREPARE
        + """
with (
    Checkpointer(directory, filename=f"rank{rank}-{{step}}.pt", every=Every(seconds=0.02)) as own,
    Checkpointer(directory, filename=f"other{rank}-{{step}}.pt", every=Every(steps=3)) as other,
):
    dues = [[], []]
    for step in range(1, 500):
        for ckpt, found in zip((own, other), dues):
            if ckpt.due(step):
                found.append(step)
                ckpt.save(step, state)
told.extend(dues)
told.append([[c.step for c in ckpt.checkpoints()] for ckpt in (own, other)])
""",
    )
    assert told[0] == told[1]
    dues, multiples, saved = told[0][0], told[0][1], told[0][2]
    assert multiples == list(range(3, 500, 3))
    assert saved == [dues, multiples]
    assert dues


def test_a_rank_may_be_in_several_groups(interpreter: Interpreter, tmp_path: Path) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PREPARE
        + """
for others in (1, 2):
    group = dist.new_group([0, others])
    if rank in (0, others):
        name = f"{others}-{{step}}.pt"
        with Checkpointer(directory, filename=name, every=Every(steps=2), process_group=group) as ckpt:
            told.append([ckpt.due(step) for step in range(1, 5)])
""",
        3,
    )
    dues = [False, True, True, True]
    assert told == [[dues, dues], [dues], [dues]]


def test_a_failed_save_of_rank_0_is_due_again_on_all_ranks(interpreter: Interpreter, tmp_path: Path) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PREPARE
        + """
store = FaultyStore(LocalStore(directory))
store.fail("commit", OSError("gone"), times=2)
with Checkpointer(store=store, every=Every(steps=100), on_error=lambda *_: None) as ckpt:
    told.append(run(ckpt, range(1, 150)))
""",
    )
    assert told == [[[100, 101, 103]]] * 2


def test_a_signal_on_one_rank_makes_a_save_due_on_all(interpreter: Interpreter, tmp_path: Path) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PREPARE
        + """
due._LOOK_AGAIN = 0  # or the answer comes a second later
ckpt = Checkpointer(directory, every=Every(hours=1), on_signal=("USR1", "USR2"))

def number_of(ckpt):
    return ckpt.signum and ckpt.signum.name

told.append([run(ckpt, range(1, 10)), number_of(ckpt)])
if rank == 1:
    os.kill(os.getpid(), signal.SIGUSR2)
told.append([run(ckpt, range(10, 20)), number_of(ckpt), ckpt._due._agreed_at > 0])
signal.raise_signal(signal.SIGUSR1)  # of another kind, and on both
told.append([run(ckpt, range(20, 30)), number_of(ckpt)])
if rank == 0:
    signal.raise_signal(signal.SIGUSR2)  # known from the other rank
told.append([run(ckpt, range(30, 40)), number_of(ckpt)])
ckpt.close()
told.append(number_of(ckpt))
""",
    )
    assert told[0] == told[1]
    assert told[0][0] == [[], None]
    # Rank 0 may have decided for the step at which rank 1 reports it.
    assert told[0][1] in ([[10], "SIGUSR2", True], [[11], "SIGUSR2", True])
    assert told[0][2] == [[20], "SIGUSR1"]
    assert told[0][3] == [[], "SIGUSR1"]
    assert told[0][4] == "SIGUSR1"


def test_what_ranks_do_not_agree_on_is_an_error(interpreter: Interpreter, tmp_path: Path) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PREPARE
        + """
class Broken:
    def due(self, progress):
        raise KeyError("no such key")

ckpt = Checkpointer(directory, every=Every(seconds=1e-9))
attempt(ckpt.due, 5 if rank else 4)
attempt(ckpt.due, 6)
broken = Checkpointer(directory, every=Broken() if rank == 0 else Every(steps=1))
try:
    attempt(broken.due, 1)
except KeyError as error:
    told.append(repr(error))
late = Checkpointer(directory, every=Every(steps=1))
if rank == 0:
    dist.barrier()
    told.append(None)
else:
    from datetime import timedelta
    late._due._agreement = verdicts.Agreement(asyncckpt._ranks.group.process_group())
    late._due._calls = 1
    store = late._due._agreement._store
    store.set_timeout(timedelta(milliseconds=10))
    attempt(late.due, 7)
    store.set_timeout(timedelta(seconds=60))
    dist.barrier()
""",
    )
    assert told[0] == [None, None, "KeyError('no such key')", None]
    (mismatch, text), nothing, (broken, why), (late, patience) = told[1]
    assert nothing is None
    assert (mismatch, broken, late) == ("SaveError", "SaveError", "BusyError")
    assert "rank 1 called due(5) where rank 0 called due(4)" in text
    assert "rank 0 could not decide whether a save is due: KeyError: 'no such key'" in why
    assert "rank 0 has not called due(7) for 0 s" in patience


def test_verdicts_do_not_pile_up_in_the_store(interpreter: Interpreter, tmp_path: Path) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PREPARE
        + """
from torch.distributed.distributed_c10d import _get_default_store
due._LOOK_AGAIN = 0
ckpt = Checkpointer(directory, every=Every(hours=1))
store = _get_default_store()
run(ckpt, range(1, 10))
dist.barrier()
before = store.num_keys()
dist.barrier()
numbers = ckpt._due._agreement._number
run(ckpt, range(10, 100))
dist.barrier()
told.append([ckpt._due._agreement._number - numbers, store.num_keys() - before])
""",
    )
    for [[exchanges, keys]] in told:
        assert exchanges == 90
        assert keys < 90
