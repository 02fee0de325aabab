"""Checkpoints that all ranks of a process group write together, and that stock DCP reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import asyncckpt
from process_groups import on_ranks
from programs import Interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TRAIN = """
from torch.distributed.fsdp import fully_shard
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as sd

def trained(seed=0, steps=2, width=5):
    torch.manual_seed(seed)  # the same parameters on every rank
    model = torch.nn.Sequential(torch.nn.Linear(7, width), torch.nn.ReLU(), torch.nn.Linear(width, 3))
    fully_shard(model)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        train(model, opt)
    return model, opt

def train(model, opt):
    model(torch.ones(2, 7) * (rank + 1)).sum().backward()
    opt.step()
    opt.zero_grad()

def whole(model, opt):
    options = sd.StateDictOptions(full_state_dict=True, cpu_offload=True)
    m, o = sd.get_state_dict(model, opt, options=options)
    if rank:
        return None
    flat, _ = torch.distributed.checkpoint._nested_dict.flatten_state_dict({"model": m, "opt": o})
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in flat.items()}
"""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_stock_dcp_reads_what_all_ranks_saved(interpreter: Interpreter, tmp_path: Path, ranks: int) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        TRAIN
        + """
model, opt = trained()
saved = whole(model, opt)
with asyncckpt.Checkpointer(directory, sharded=True) as ckpt:
    save = ckpt.save(100, {"model": model, "opt": opt, "step": 100}, metrics={"loss": 0.5})
    assert save.path == f"{directory}/step-00000100"
    train(model, opt)  # what is saved is the state before
    checkpoint = save.committed.result()
    told.append([checkpoint.step, checkpoint.metrics, checkpoint.nbytes > 0])
    assert ckpt.checkpoints() == [checkpoint]
dist.barrier()
model, opt = trained(seed=1)
m, o = sd.get_state_dict(model, opt)
state = {"model": m, "opt": o, "step": 0}
dcp.load(state, checkpoint_id=save.path)
sd.set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["opt"])
assert state["step"] == 100
loaded = whole(model, opt)
assert loaded == saved
""",
        ranks,
    )
    assert told == [[[100, {"loss": 0.5}, True]]] * ranks


def test_one_rank_writes_what_is_not_sharded_and_all_get_its_result(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        """
with asyncckpt.Checkpointer(directory) as ckpt:
    dist.barrier()
    for step in (1, 2):
        save = ckpt.save(step, {"w": torch.full((3,), float(rank)), "step": step})
        checkpoint = save.committed.result()
        told.append([checkpoint.step, checkpoint.sequence, checkpoint.path == save.path])
dist.barrier()
assert ckpt.load()["w"].tolist() == [0.0] * 3
""",
    )
    assert told == [[[1, 1, True], [2, 2, True]]] * 2


@pytest.mark.parametrize("ranks", [1, 3])
def test_another_number_of_ranks_restores(interpreter: Interpreter, tmp_path: Path, ranks: int) -> None:
    program = (
        TRAIN
        + """
import pathlib
model, opt = trained(seed=ranks)
state = {"model": model, "opt": opt, "step": ranks}
place = f"{directory}-shared"
with asyncckpt.Checkpointer(place, sharded=True) as ckpt:
    if ranks == 2:
        ckpt.save(7, state)
    else:
        assert ckpt.restore(state).step == 7
        assert state["step"] == 2
told.append(whole(model, opt))
"""
    )
    saved, *_ = on_ranks(interpreter, tmp_path, program, 2)
    (tmp_path / "run-group").unlink()
    restored, *_ = on_ranks(interpreter, tmp_path, program, ranks)
    assert restored == saved


def test_tensors_with_other_strides_keep_their_plan(tmp_path: Path) -> None:
    # Of some the record with the strides takes 64 bytes more.
    shapes = [(2, *[1] * more, 300) for more in range(20)]
    rows = {f"{len(shape)}": torch.rand(shape) for shape in shapes}
    columns = {
        key: torch.rand(value.shape[::-1]).permute(*reversed(range(value.ndim)))
        for key, value in rows.items()
    }
    with asyncckpt.Checkpointer(tmp_path, sharded=True) as ckpt:
        for step, state in enumerate((rows, columns, rows)):
            ckpt.save(step, state)
        for step, state in enumerate((rows, columns, rows)):
            loaded = ckpt.load(step)
            assert all(torch.equal(loaded[key], value) for key, value in state.items())
