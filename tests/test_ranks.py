"""Several ranks of a process group: what would be torn or lost is refused on all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from process_groups import on_ranks
from programs import Interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


def test_sharded_states_are_no_files_and_the_entry_is_named(interpreter: Interpreter, tmp_path: Path) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        """
from torch.distributed.fsdp import fully_shard

model = torch.nn.Linear(8, 8)
fully_shard(model)
opt = torch.optim.Adam(model.parameters())
model(torch.ones(2, 8)).sum().backward()
opt.step()
ckpt = asyncckpt.Checkpointer(directory, filename=f"{rank}-{{step}}.pt", sharded=False)
attempt(ckpt.save, 1, {"model": model})
attempt(ckpt.save, 1, {"step": 3, "opt": opt})
attempt(asyncckpt.save, {"w": [model.weight]}, f"{directory}/{rank}.pt")
assert ckpt.checkpoints() == []

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    ckpt.save(1, {"model": whole})
    ckpt.wait()
    assert ckpt.load()["model"]["weight"].shape == (8, 8)
""",
    )
    for model, opt, listed in told:
        assert {kind for kind, _ in (model, opt, listed)} == {"ShardedStateError"}
        assert 'state["model"]["weight"]: a DTensor over 2 ranks' in model[1]
        assert 'state["opt"]["state"][0]["exp_avg"]: a DTensor' in opt[1]
        assert 'state["w"][0]: a ' in listed[1]
        assert "with a Checkpointer on every rank" in model[1]


def test_one_file_is_written_by_one_rank_at_once(interpreter: Interpreter, tmp_path: Path) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        """
from asyncckpt._saving import operations
import threading
go_on = threading.Event()

async def hold():
    await asyncckpt._threads.in_thread(go_on.wait)

operations.submit(hold, "held", exists=True)  # what is saved now is pending until both have tried
attempt(asyncckpt.save, {"w": torch.ones(3)}, f"{directory}/same.pt")
attempt(asyncckpt.save, {"w": torch.ones(3)}, f"{directory}/{rank}.pt")
dist.barrier()
go_on.set()
asyncckpt.wait()
dist.barrier()
if rank == 1:  # one after the other
    attempt(asyncckpt.save, {"w": torch.ones(3)}, f"{directory}/same.pt")
    asyncckpt.wait()
dist.barrier()
if rank == 0:
    attempt(asyncckpt.save, {"w": torch.ones(3)}, f"{directory}/same.pt")
    asyncckpt.wait()
""",
    )
    assert sorted(each[0] is None for each in told) == [False, True]
    assert [each[1:] for each in told] == [[None, None]] * 2


@pytest.mark.parametrize("what", ["a mesh of one rank", "no process group"])
def test_one_rank_saves_as_ever(interpreter: Interpreter, tmp_path: Path, what: str) -> None:
    body = """
import torch.distributed as dist, torch, asyncckpt, sys
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
state = {"w": torch.ones(3)}
if sys.argv[2] == "a mesh of one rank":
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}-group", rank=0, world_size=1)
    state["d"] = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)))
with asyncckpt.Checkpointer(sys.argv[1]) as ckpt:
    ckpt.save(1, state)
    ckpt.save(2, state)
assert ckpt.latest().step == 2
if dist.is_initialized():
    dist.destroy_process_group()
"""
    status, _, errors = interpreter.run(body, tmp_path / "run", what)
    assert status == 0, errors
