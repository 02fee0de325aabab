"""States of every kind of parallelism that some ranks save and others load; for programs of groups."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from asyncckpt import Checkpointer

_stock: Any = torch.distributed.checkpoint  # whose functions have no types
KINDS = {1: ["fsdp"], 2: ["fsdp", "tp", "ddp"], 3: ["fsdp", "ddp"], 4: ["fsdp", "tp", "hsdp", "ddp"]}
_DTYPES = [torch.float32, torch.bfloat16, torch.complex64, torch.bool, torch.float8_e4m3fn, torch.int16]


class Net(nn.Module):
    """Uneven, tied, frozen, tiny and empty parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 7)
        self.down = nn.Linear(7, 6, bias=False)
        self.tied = nn.Linear(7, 6, bias=False)
        self.tied.weight = self.down.weight
        self.low = nn.Linear(5, 3).bfloat16()
        self.tiny = nn.Parameter(torch.randn(1))
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.scalar = nn.Buffer(torch.randn(()))
        self.frozen = nn.Parameter(torch.randn(3, 2), requires_grad=False)


def model_of(kind: str, seed: int) -> Any:
    """Return a model, the same on all ranks."""
    torch.manual_seed(seed)
    return parallelized(Net(), kind)


def parallelized(model: Any, kind: str) -> Any:
    """Spread a model that has modules `up` and `low` over all ranks."""
    ranks = dist.get_world_size()
    if kind == "tp":
        mesh = init_device_mesh("cpu", (ranks,))
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "low": RowwiseParallel()})
    elif kind == "fsdp":
        mesh = init_device_mesh("cpu", (ranks,))
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    elif kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    return model


def trained(kind: str, seed: int, optimizer: str) -> tuple[Any, Any]:
    """Return a model and its optimizer, which has made a step."""
    model = model_of(kind, seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer == "sgd":
        opt: Any = torch.optim.SGD(parameters, lr=0.01 * seed, momentum=0.9)
    else:
        opt = torch.optim.AdamW(parameters, lr=0.01 * seed)
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, seed + number)
    opt.step()
    return model, opt


def extras(fill: int) -> dict[str, Any]:
    """Return tensors of all sorts, sharded and not; other values for another `fill`."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = {str(dtype): (torch.arange(35).reshape(7, 5) % 3 * fill).to(dtype) for dtype in _DTYPES}
    whole["rows"] = torch.arange(35.0).reshape(5, 7).t() * fill
    whole["images"] = (torch.arange(120.0).reshape(2, 3, 4, 5) * fill).to(memory_format=torch.channels_last)
    found: dict[str, Any] = {f"plain {key}": value for key, value in whole.items()}
    found |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(float(fill)), "number": fill}
    for dim in (0, 1):
        for key, value in whole.items():
            found[f"sharded {key} {dim}"] = distribute_tensor(value, mesh, [Shard(dim)], src_data_rank=None)
    found["replicated"] = distribute_tensor(whole["rows"], mesh, [Replicate()], src_data_rank=None)
    return found


def digest(model: Any, opt: Any) -> str:
    """Return a digest of all that a model and its optimizer hold, on all ranks together."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    said: list[Any] = [None]
    states = get_state_dict(model, opt, options=options)
    if dist.get_rank() == 0:
        lines: list[str] = []
        _describe(states, "", lines)
        said = [hashlib.blake2b("\n".join(sorted(lines)).encode()).hexdigest()]
    dist.broadcast_object_list(said)
    return str(said[0])


def _describe(value: Any, path: str, lines: list[str]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _describe(item, f"{path}.{key}", lines)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _describe(item, f"{path}.{number}", lines)
    elif isinstance(value, torch.Tensor):
        lines.append(f"{path} {value.dtype} {value.tolist()}")
    else:
        lines.append(f"{path} {value}")


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the keys of what differs on this rank."""
    return [key for key in expected if not _same(found[key], expected[key])]


def _same(one: Any, other: Any) -> bool:
    if not isinstance(other, torch.Tensor):
        return bool(one == other)
    one, other = (t.to_local() if isinstance(t, DTensor) else t for t in (one, other))
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bytes(one.contiguous().view(-1).view(torch.uint8).tolist()) == bytes(
        other.contiguous().view(-1).view(torch.uint8).tolist()
    )


def save_all(directory: str) -> dict[str, str]:
    """Save a state of each kind; return the digests by the names of the folders."""
    ranks, told = dist.get_world_size(), {}
    for step, kind in enumerate(KINDS[ranks]):
        for optimizer in ("adamw", "sgd"):
            model, opt = trained(kind, 1, optimizer)
            name = f"{kind}-{ranks}-{optimizer}"
            with Checkpointer(f"{directory}/{name}", sharded=True) as ckpt:
                state = {"model": model, "opt": opt, "extras": extras(1), "step": 7}
                ckpt.save(step, state, rank_state={"rank": torch.tensor(dist.get_rank())})
            told[name] = digest(model, opt)
            dist.barrier()
    return told


def load_all(directory: str, saved: dict[str, str]) -> list[str]:
    """Load each folder into each kind, by stock DCP and by ours; return what is wrong."""
    ranks, wrong = dist.get_world_size(), []
    for name, expected in saved.items():
        optimizer = name.rpartition("-")[2]
        for kind in KINDS[ranks]:
            model, opt = trained(kind, 2, optimizer)
            own = {"rank": torch.tensor(-1)}
            more = extras(2)
            with Checkpointer(f"{directory}/{name}", sharded=True) as ckpt:
                ckpt.verify()
                found = ckpt.restore({"model": model, "opt": opt, "extras": more, "step": 0}, rank_state=own)
            assert found is not None
            if digest(model, opt) != expected:
                wrong.append(f"{name} as {kind} by ours")
            wrong += [f"{name} {key} by ours" for key in differences(more, extras(1))]
            if int(own["rank"]) != (dist.get_rank() if f"-{ranks}-" in name else -1):
                wrong.append(f"{name} rank state {own}")

            model, opt = trained(kind, 3, optimizer)
            states: dict[str, Any] = dict(zip(("model", "opt"), get_state_dict(model, opt), strict=True))
            states["extras"] = more = extras(3)
            _stock.load(states, checkpoint_id=found.path)
            set_state_dict(model, opt, model_state_dict=states["model"], optim_state_dict=states["opt"])
            if digest(model, opt) != expected:
                wrong.append(f"{name} as {kind} by stock")
            wrong += [f"{name} {key} by stock" for key in differences(states["extras"], extras(1))]
    return wrong
