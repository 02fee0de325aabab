"""DCP's functions with one import changed: programs of its users run as before, on the same files."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

import asyncckpt
import asyncckpt.distributed as dcp
from process_groups import on_ranks
from programs import Interpreter

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed.checkpoint.planner import SavePlan

PROGRAM = """
import {module} as dcp
from torch.distributed.fsdp import fully_shard
import torch.distributed.checkpoint.state_dict as sd

def trained(seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(6, 5)
    fully_shard(model)
    opt = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 6) * (rank + 1)).sum().backward()
    opt.step()
    return model, opt

class Progress:
    def __init__(self, step):
        self.step = step
    def state_dict(self):
        return {{"step": self.step}}
    def load_state_dict(self, state):
        self.step = state["step"]

def states(model, opt, step):
    m, o = sd.get_state_dict(model, opt)
    return {{"model": m, "opt": o, "progress": Progress(step), "note": "a", "lr": [0.1, 0.2]}}

model, opt = trained(0)
state = states(model, opt, 3)
future = dcp.async_save(state, checkpoint_id=f"{{directory}}/1")
with torch.no_grad():
    before = [p.full_tensor().clone() for p in model.parameters()]
    for p in model.parameters():
        p.zero_()
future.result()
model, opt = trained(1)
state = states(model, opt, 0)
state["note"], state["lr"] = "", []
dcp.load(state, checkpoint_id=f"{{directory}}/1")
sd.set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["opt"])
for p, value in zip(model.parameters(), before):
    assert torch.equal(p.full_tensor(), value)
told.append([state["progress"].step, state["note"], state["lr"]])
dist.barrier()
"""


@pytest.mark.parametrize("module", ["torch.distributed.checkpoint", "asyncckpt.distributed"])
def test_a_program_runs_with_either_import(tmp_path: Path, module: str) -> None:
    with Interpreter() as interpreter:
        told = on_ranks(interpreter, tmp_path, PROGRAM.format(module=module))
    assert told == [[[3, "a", [0.1, 0.2]]]] * 2


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoint")


def _state(value: float) -> dict[str, Any]:
    return {"w": torch.full((3, 2), value), "n": int(value)}


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize(("saving", "loading"), [(dcp, stock), (stock, dcp), (dcp, dcp)])
def test_both_read_what_either_wrote(path: str, saving: Any, loading: Any) -> None:
    saving.save(_state(4.0), checkpoint_id=path)
    state = _state(0.0)
    loading.load(state, checkpoint_id=path)
    assert (state["w"].tolist(), state["n"]) == ([[4.0, 4.0]] * 3, 4)


def test_a_checkpoint_is_replaced_as_a_whole(path: str) -> None:
    for value in (1.0, 2.0):
        dcp.async_save(_state(value), checkpoint_id=path)
    dcp.wait()
    assert asyncckpt.load(path)["n"] == 2


class _Some(DefaultSavePlanner):
    """Plans a part of a state."""

    names: tuple[str, ...] = ("n",)

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        return replace(plan, items=[item for item in plan.items if item.index.fqn in self.names])


def test_a_plan_is_not_kept_for_another_planner(path: str) -> None:
    some, saved = _Some(), []
    for planner in (some, None, some, some):
        dcp.save(_state(1.0), checkpoint_id=path, planner=planner, no_dist=True)
        saved.append(sorted(asyncckpt.load(path)))
        some.names = ("w",)
    assert saved == [["n"], sorted(_state(1.0)), ["w"], ["w"]]


def test_the_arguments_of_dcp(path: str) -> None:
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True, enable_plan_caching=True)
    dcp.save(_state(1.0), storage_writer=FileSystemWriter(path), planner=planner, no_dist=True)
    state = {**_state(0.0), "more": torch.zeros(2)}
    with pytest.raises(asyncckpt.StateMismatchError, match="more"):
        dcp.load(state, storage_reader=FileSystemReader(path))
    assert state["n"] == 0
    with pytest.warns(UserWarning, match="more"):
        dcp.load(state, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=True))
    assert state["n"] == 1
    for wrong, arguments in (
        ("use_collectives", {"checkpoint_id": path, "use_collectives": False}),
        ("checkpoint_id", {}),
        ("storage_writer", {"storage_writer": object()}),
    ):
        with pytest.raises((TypeError, ValueError), match=wrong):
            dcp.async_save(_state(1.0), **arguments)  # type: ignore[arg-type]


def test_a_stager_that_stages_later_gets_dcp_s_response(path: str) -> None:
    staging = pytest.importorskip("torch.distributed.checkpoint.staging")
    if not hasattr(staging, "DefaultStager"):
        pytest.skip("torch 2.9")
    names = ("use_pinned_memory", "use_shared_memory", "use_non_blocking_copy")
    stager = staging.DefaultStager(staging.StagingOptions(**dict.fromkeys(names, False)))
    try:
        response = dcp.async_save(_state(1.0), checkpoint_id=path, async_stager=stager)
        response.staging_completion.result()
        assert response.upload_completion.result().path == path
    finally:
        stager.close()
