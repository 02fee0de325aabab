"""Ranks that leave early, or in another way than the others: these do not wait for them, and lose nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from process_groups import MODULES, on_ranks, start_ranks
from programs import Interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter(*MODULES) as interpreter:
        yield interpreter


@pytest.mark.parametrize("sharded", [True, None])
def test_the_host_of_the_store_ends_when_all_ranks_have_heard_of_the_last_save(
    interpreter: Interpreter, tmp_path: Path, *, sharded: bool | None
) -> None:
    body = """
import os
from asyncckpt.stores import LocalStore
from asyncckpt.testing import SlowStore

# The others look more and more seldom.
slow = {name: 1.0 for name in ("commit", "commit_folder") if rank == 0}
with asyncckpt.Checkpointer(store=SlowStore(LocalStore(directory), delays=slow), sharded=SHARDED) as ckpt:
    dist.barrier()
    save = ckpt.save(1, {"w": torch.ones(3)})
print(json.dumps(save.committed.result().step), flush=True)
os._exit(0)
"""
    programs = start_ranks(interpreter, tmp_path, body.replace("SHARDED", str(sharded)), 3, store="tcp")
    ends = [program.end() for program in programs]
    assert [json.loads(output) for _, output, _ in ends] == [1] * 3


def test_ranks_agree_on_a_second_checkpointer_whether_all_have_saved_with_the_first(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        """
with asyncckpt.Checkpointer(directory, rank_timeout=5) as ckpt:
    ckpt.restore({"w": torch.ones(3)}, missing_ok=True)
with asyncckpt.Checkpointer(directory, rank_timeout=5) as ckpt:
    save = ckpt.save(1, {"w": torch.ones(3)})
told.append(save.committed.result().step)
""",
    )
    assert told == [[1]] * 2


@pytest.mark.parametrize("when", ["before the plan", "behind the plan"])
def test_an_interrupted_rank_is_not_waited_for(interpreter: Interpreter, tmp_path: Path, when: str) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        """
class Interrupted:
    armed = True
    def state_dict(self):
        if WHEN == "before the plan":
            self.come()
        return {"x": self}
    def load_state_dict(self, state):
        pass
    def come(self):
        if rank == 1 and self.armed:
            self.armed = False
            raise KeyboardInterrupt
    def __reduce__(self):
        self.come()
        return str, ()

own = Interrupted()
with asyncckpt.Checkpointer(directory, sharded=True, rank_timeout=30) as ckpt:
    try:
        attempt(ckpt.save, 1, {"w": torch.ones(3)}, rank_state={"own": own})
    except KeyboardInterrupt:
        told.append("interrupted")
    told.append(ckpt.save(2, {"w": torch.ones(3)}, rank_state={"own": own}).committed.result().step)
""".replace("WHEN", repr(when)),
        3,
    )
    assert told[1] == ["interrupted", 2]
    for (kind, text), *rest in (told[0], told[2]):
        assert kind == "RankError"
        assert "rank 1" in text
        assert "KeyboardInterrupt" in text
        assert rest == [2]


def test_a_refused_save_takes_part_in_collectives_of_the_state(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        """
class Gathered:  # as FullyShardedDataParallel
    def state_dict(self):
        dist.barrier()
        return {"x": 1}
    def load_state_dict(self, state):
        pass

with asyncckpt.Checkpointer(directory, filename="last.pt", sharded=True) as ckpt:
    ckpt.save(1, {"own": Gathered()}).committed.result()
    attempt(ckpt.save, 2, {"own": Gathered()})
""",
    )
    assert [kind for ((kind, _),) in told] == ["CheckpointExistsError", "RankError"]


def test_a_checkpointer_that_is_closed_twice_counts_once(interpreter: Interpreter, tmp_path: Path) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        """
keys = store.num_keys()
dist.barrier()
with asyncckpt.Checkpointer(directory, sharded=True) as ckpt:
    ckpt.restore({"w": torch.ones(3)}, missing_ok=True)
    if rank == 0:
        ckpt.close()
        assert store.num_keys() > keys  # another rank may look at them
        store.set("closed", "")
    store.get("closed")
store.set(f"gone{rank}", "")
store.get(f"gone{1 - rank}")
told.append(store.num_keys() - keys)
""",
    )
    assert told == [[3], [3]]


def test_a_process_whose_group_is_gone_saves_alone(interpreter: Interpreter, tmp_path: Path) -> None:
    body = """
ckpt = asyncckpt.Checkpointer(directory, sharded=True)
ckpt.save(1, {"w": torch.full((3,), 1.0)}).committed.result()
ckpt.wait()
dist.barrier()
dist.destroy_process_group()
if rank == 0:
    with ckpt:
        assert ckpt.save(2, {"w": torch.full((3,), 2.0)}).committed.result() == ckpt.latest()
    assert ckpt.load()["w"].tolist() == [2.0] * 3
"""
    ends = [program.end() for program in start_ranks(interpreter, tmp_path, body, 2, store="tcp")]
    assert [status for status, _, _ in ends] == [0] * 2, ends
