"""A GPT on many ranks: sharded by FSDP2, or the same on each under DDP."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from asyncckpt._bench.training import PlainCopy
from gpu_model import GPT, TINY, Shape

if TYPE_CHECKING:
    from collections.abc import Sequence

LARGE = Shape(layers=12, width=512, heads=8, vocabulary=24_000)  # 50 M parameters, 600 MB with AdamW in fp32
KINDS = ("fsdp", "ddp")


class RankTraining(NamedTuple):
    """What each rank holds: a model, and an optimizer that has taken a step."""

    model: nn.Module
    optimizer: torch.optim.AdamW

    def tensors(self) -> list[Tensor]:
        """Return the tensors of this rank's part of the state, without the padding of shards."""
        found = [*self.model.parameters(), *self.model.buffers()]
        for values in self.optimizer.state.values():
            found += [value for value in values.values() if isinstance(value, Tensor)]
        return [_local(tensor).detach() for tensor in found]


def training(kind: str, device: str, *, quick: bool) -> RankTraining:
    """Make a model and its AdamW on this rank; all ranks call this.

    Args:
        kind: "fsdp" or "ddp".
        device: "cpu" or "cuda".
        quick: a small one.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = GPT(TINY if quick else LARGE)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for block in model.get_submodule("blocks").children():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
    optimizer.step()
    optimizer.zero_grad()
    return RankTraining(model, optimizer)


class BareCopy(PlainCopy):
    """Copies tensors as they are, and not their whole storages."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.pairs = [
            (torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda), tensor) for tensor in tensors
        ]
        self.run()


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def shares(tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """Divide whole tensors into `count` parts of about as many bytes, the largest tensors first."""
    parts: list[list[Tensor]] = [[] for _ in range(count)]
    sizes = [0] * count
    for tensor in sorted(tensors, key=lambda tensor: -tensor.nbytes):
        least = sizes.index(min(sizes))
        parts[least].append(tensor)
        sizes[least] += tensor.nbytes
    return parts


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
