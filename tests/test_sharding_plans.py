"""Plans of sharded states on several ranks: those of stock DCP, item by item."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

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


@pytest.mark.parametrize("ranks", [2, 4])
def test_plans_are_those_of_stock_dcp(interpreter: Interpreter, tmp_path: Path, ranks: int) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PLANS
        + """
from torch.nn.parallel import DistributedDataParallel
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False)
        self.last.weight = self.first.weight
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))

def fsdp(model, **options):
    for layer in model.children():
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model

def pair(model, opt):
    return {"model": get_model_state_dict(model), "opt": get_optimizer_state_dict(model, opt)}

model = fsdp(net())
opt = stepped(model)
scheduler = torch.optim.lr_scheduler.StepLR(opt, 2)
scaler = torch.amp.GradScaler("cpu")
rest = {
    "step": 3, "numbers": [1, 2], "array": np.arange(3), "pair": (1, torch.ones(2)), 7: {8: torch.ones(3)},
    "list": [torch.zeros(2), {"x": torch.ones(())}], "empty": torch.ones(0, 4), "none": None,
}
live = {"model": model, "opt": opt, "scheduler": scheduler, "nested": {"scaler": scaler}, **rest}
states = {"scheduler": scheduler.state_dict(), "nested": {"scaler": scaler.state_dict()}}
compare("fsdp", live, {**pair(model, opt), **states, **rest})
compare("raw", {"model": model.state_dict(), "opt": opt.state_dict()})

torch.manual_seed(2)
tied = Tied()
fully_shard(tied)
opt = stepped(tied, kind=torch.optim.SGD, momentum=0.9)
compare("tied", {"opt": opt, "model": tied}, dict(reversed(pair(tied, opt).items())))

half = fsdp(net().bfloat16())
compare("half", {"model": half}, {"model": get_model_state_dict(half)})

ddp = DistributedDataParallel(net())
opt = stepped(ddp)
compare("ddp", {"model": ddp, "opt": opt}, pair(ddp, opt))

inner = net()
inner[0], inner[1] = checkpoint_wrapper(inner[0]), torch.compile(inner[1], backend="eager")
compiled = torch.compile(fsdp(inner), backend="eager")
opt = stepped(inner)
compare("wrapped", {"model": compiled, "opt": opt}, pair(compiled, opt))

a, b = fsdp(net()), fsdp(net())
opts = stepped(a), stepped(b)
compare(
    "two", {"a": a, "b": b, "opts": list(opts)},
    {"a": pair(a, opts[0])["model"], "b": pair(b, opts[1])["model"],
     "opts": [pair(a, opts[0])["opt"], pair(b, opts[1])["opt"]]},
)
halves = stepped(a, *a[0].parameters()), stepped(a, *a[1].parameters(), *a[2].parameters())
compare(
    "halves", {"model": a, "opts": {"x": halves[0], "y": halves[1]}},
    {"model": pair(a, halves[0])["model"],
     "opts": {"x": pair(a, halves[0])["opt"], "y": pair(a, halves[1])["opt"]}},
)
""",
        ranks,
    )
    assert told[0] == told[-1]
    assert len(told[0]) == 8


def test_plans_of_meshes_are_those_of_stock_dcp(interpreter: Interpreter, tmp_path: Path) -> None:
    told = on_ranks(
        interpreter,
        tmp_path,
        PLANS
        + """
from torch.distributed._shard.sharded_tensor import Shard, ShardMetadata, init_from_local_shards
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))

def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))

def check(name, model, **options):
    opt = stepped(model, **options)
    state = {"model": get_model_state_dict(model), "opt": get_optimizer_state_dict(model, opt)}
    compare(name, {"model": model, "opt": opt}, state)

split = {"0": ColwiseParallel(), "1": RowwiseParallel()}
check("tp", parallelize_module(mlp(), line, split))
both = parallelize_module(mlp(), grid["inner"], split)
for layer in both:
    fully_shard(layer, mesh=grid["outer"])
check("fsdp-tp", both)
hybrid = net()
fully_shard(hybrid, mesh=grid)
check("hsdp", hybrid, forward=False)  # gloo does not average in torch 2.7

whole = torch.arange(30.0).reshape(5, 6)
odd = {
    "rows": distribute_tensor(whole, line, [Split(0)]),
    "columns": distribute_tensor(whole, line, [Split(1)]),
    "copies": distribute_tensor(whole, line, [Replicate()]),
    "blocks": distribute_tensor(whole, grid, [Split(0), Split(1)]),
    "scalar": distribute_tensor(torch.ones(()), line, [Replicate()]),
}
few = DeviceMesh("cpu", [0, 1])
if rank < 2:
    odd["few"] = distribute_tensor(whole, few, [Split(0)])
shards = [
    Shard(torch.full((size, 2), float(rank)), ShardMetadata([start, 0], [size, 2], f"rank:{rank}/cpu"))
    for start, size in ((3 * rank, 1), (3 * rank + 1, 2))
]
odd["shards"] = init_from_local_shards(shards, 12, 2)
compare("odd", odd)

flat = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
if torch.__version__.startswith("2.7"):  # it needs a GPU there
    told.append("left out")
else:
    check("fsdp1", flat)
""",
        ranks=4,
    )
    assert told[0] == told[-1]
    assert len(told[0]) == 5
