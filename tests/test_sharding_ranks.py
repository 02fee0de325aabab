"""Sharded states on several ranks: what is found, what is refused, and what other ranks restore."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from process_groups import on_ranks
from programs import Interpreter
from sharded_programs import PLANS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


def test_states_without_shards_are_found_without_an_import_of_torch_distributed(
    interpreter: Interpreter,
) -> None:
    status, output, errors = interpreter.run(
        """
        import json, sys, torch
        import asyncckpt._sharding.planning, asyncckpt._sharding.states, asyncckpt._sharding.metadata
        from asyncckpt._sharding.detect import is_sharded
        model = torch.nn.Linear(1, 1)
        print(json.dumps([
            is_sharded({"m": model, "w": [torch.ones(1)]}),
            [name for name in sys.modules if name.startswith("torch.distributed.tensor")],
            [name for name in sys.modules if name.startswith("torch.distributed.checkpoint")],
        ]))
        """
    )
    assert status == 0, errors
    assert json.loads(output) == [False, [], []]


def test_shards_are_found_and_what_has_no_plan_is_refused(interpreter: Interpreter, tmp_path: Path) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PLANS
        + """
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Partial
from asyncckpt._sharding.detect import is_sharded

mesh, alone = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
whole = torch.arange(12.0).reshape(4, 3)
split = distribute_tensor(whole, mesh, [Shard(0)])
model = nn.Linear(3, 4)
fully_shard(model)
opt = torch.optim.SGD(model.parameters())
found = [split, {"a": [1, ({"b": split},)]}, {"m": nn.Sequential(model)}, [opt]]
one = distribute_tensor(whole, alone["b"], [Replicate()])
cycle = [torch.ones(1)]
cycle.append(cycle)
other = [whole, one, {"a": {"b": 1}}, nn.Linear(1, 1), cycle, None, "x"]
assert all(map(is_sharded, found))
assert not any(map(is_sharded, other))

def encoded(state):
    return attempt(LocalPlan(state).encode)

encoded({"a": {"b": (1, [split])}})
encoded({"a": [(1, {"b": split})]})
encoded({"sums": DTensor.from_local(whole, mesh, [Partial()])})
encoded({"odd": DTensor.from_local(whole, mesh, [Shard(0)], run_check=False, shape=(5, 3), stride=(3, 1))})

def planned(state):
    payloads = everywhere(LocalPlan(state).encode())
    attempt(global_plan, payloads)

planned({"x": whole.double() if rank else whole})
planned({"x": whole[rank:]})
planned({"x": 1 if rank else whole})
planned({"x": whole if rank else split})
planned({} if rank else {"x": split})
planned({"x": 1, "only here": 2} if rank else {"x": 1})
""",
    )
    for errors in told:
        kinds = [error and error[0] for error in errors]
        assert kinds == ["ShardedStateError"] * 2 + ["SaveError"] * 7 + [None]
    texts = [error[1] for error in told[0] if error]
    assert texts[0].startswith("a.b[1][0]: a tensor that is sharded over several ranks, in a tuple")
    assert texts[1].startswith('a[0][1]["b"]: a tensor that is sharded over several ranks, in a list')
    assert texts[2].startswith("sums: a DTensor of partial sums")
    assert texts[3].startswith("odd: the local tensor has shape (4, 3), but")
    assert texts[4] == (
        "x is a tensor of shape (4, 3) and torch.float32 on rank 0, but a tensor of shape (4, 3) and"
        " torch.float64 on rank 1"
    )
    assert texts[6].endswith("but an object on rank 1")
    assert texts[7].startswith("x is a sharded tensor of shape (4, 3)")
    assert texts[8] == "x: the ranks have 6 of its 12 elements; it is not in the state of ranks [1]"


def test_a_changed_layout_changes_the_fingerprint(interpreter: Interpreter, tmp_path: Path) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PLANS
        + """
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed._shard.sharded_tensor import Shard as Part, ShardMetadata, init_from_local_shards

line, grid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
whole = torch.arange(12.0).reshape(4, 3)

def parts(*sizes):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return init_from_local_shards([
        Part(torch.ones(size, 2), ShardMetadata([2 * rank + start, 0], [size, 2], f"rank:{rank}/cpu"))
        for start, size in zip(starts, sizes)
    ], 4, 2)

makes = [
    lambda: distribute_tensor(whole, line, [Shard(0)]),
    lambda: distribute_tensor(whole, line, [Shard(1)]),
    lambda: distribute_tensor(whole, line, [Replicate()]),
    lambda: distribute_tensor(whole, grid, [Shard(0), Shard(0)]),
    lambda: distribute_tensor(whole.half(), line, [Shard(0)]),
    lambda: distribute_tensor(whole.T, line, [Shard(0)]),
    lambda: whole,
    lambda: parts(2),
    lambda: parts(1, 1),
]
prints = [LocalPlan({"x": make()}).fingerprint for make in makes]
assert all(prints[i] != prints[j] for i in range(len(makes)) for j in range(i))
assert [LocalPlan({"x": make()}).fingerprint for make in makes] == prints
""",
    )
    assert told == [[], []]


@pytest.mark.parametrize(("saving", "loading"), [(4, 2), (2, 4), (3, 1)])
def test_fresh_optimizers_of_other_ranks_get_the_state(
    interpreter: Interpreter, tmp_path: Path, saving: int, loading: int
) -> None:
    program = (
        PLANS
        + """
from asyncckpt._sharding.states import apply, fit_optimizers, misfits
saved = os.path.dirname(os.path.dirname(directory)) + "/saved"

def full(state):
    # All values of a collected state, from all ranks.
    if isinstance(state, dict):
        return {key: full(value) for key, value in state.items()}
    if isinstance(state, list):
        return [full(value) for value in state]
    if isinstance(state, torch.Tensor):
        return (state.full_tensor() if hasattr(state, "full_tensor") else state).tolist()
    return state

model = net()
for layer in model:
    fully_shard(layer)
"""
    )
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = on_ranks(
        interpreter,
        tmp_path / "first",
        program
        + """
state = {"model": model, "opt": stepped(model)}
dcp.save(collect_sharded(state)[0], checkpoint_id=saved)
told.append(full(collect_sharded(state)[0]))
""",
        saving,
    )
    second = on_ranks(
        interpreter,
        tmp_path / "second",
        program
        + """
opt = torch.optim.AdamW(model.parameters(), lr=5.0)
state = {"model": model, "opt": opt}
collected, _ = collect_sharded(state)
with open(saved + "/.metadata", "rb") as file:
    assert fit_optimizers(state, collected, pickle.load(file)) == []
dcp.load(collected, checkpoint_id=saved)
assert misfits(state, collected) == []
apply(state, collected)
assert opt.param_groups[0]["lr"] == 0.01
told.append(full(collect_sharded(state)[0]))
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
opt.step()
""",
        loading,
    )
    assert all(values == first[0] for values in first + second)


@pytest.mark.skipif(torch.__version__.startswith("2.7"), reason="it needs a GPU there")
def test_flat_parameters_are_saved_and_restored(interpreter: Interpreter, tmp_path: Path) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PLANS
        + """
from torch.distributed.fsdp import FullyShardedDataParallel
from asyncckpt._sharding.states import apply, fit_optimizers, misfits

def made(seed):
    torch.manual_seed(seed)
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=True)
    return {"model": model, "opt": torch.optim.AdamW(model.parameters(), lr=0.01)}

def shards(state):
    flat = LocalPlan(collect_sharded(state)[0]).flat
    tensors = {key: value for key, value in flat.items() if isinstance(value, torch.Tensor)}
    return {
        key: [part.tensor.tolist() for part in value.local_shards()] if hasattr(value, "local_shards")
        else value.tolist()
        for key, value in tensors.items()
    }

first = made(1)
collected, _ = collect_sharded(first)
assert not first["opt"].state and collected["opt"]["state"] == {}
first["model"](torch.ones(4, 6)).sum().backward()
first["opt"].step()
dcp.save(collect_sharded(first)[0], checkpoint_id=directory)
second = made(2)
collected, _ = collect_sharded(second)
with open(directory + "/.metadata", "rb") as file:
    assert fit_optimizers(second, collected, pickle.load(file)) == []
dcp.load(collected, checkpoint_id=directory)
assert misfits(second, collected) == []
apply(second, collected)
assert shards(second) == shards(first)
told.append(len(shards(first)))
""",
    )
    assert told == [[5 * 4], [5 * 4]]
