"""A training with FSDP2 on two ranks, and overlapped copies of the shards of one of them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from asyncckpt._saving.staging import Snapshot
from asyncckpt._snapshot import lanes
from asyncckpt._snapshot.arena import Arena
from asyncckpt._snapshot.copy import SMALL
from asyncckpt._snapshot.deferred import Overlap
from asyncckpt._snapshot.device_budget import DeviceBudget
from asyncckpt._snapshot.local_tensors import local_of
from asyncckpt._snapshot.owners import Owners
from asyncckpt._snapshot.shards import shards_of
from asyncckpt.errors import TornSnapshotError
from asyncckpt.layout.item_file import ItemFile
from asyncckpt.types import SaveStats
from copier import Copier
from item_files import Items
from sameness import raw

if TYPE_CHECKING:
    from collections.abc import Callable

# Odd, so that the shards of the last rank are padded; and large enough to be deferred.
_WIDTHS = (129, 257, 131)


class ShardedTraining:
    """A training whose optimizer has made a step.

    Args:
        options: of AdamW.
    """

    def __init__(self, **options: Any) -> None:
        self.copier = Copier()
        lanes.memmove = self.copier  # type: ignore[assignment]
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", (2,))
        layers = [nn.Linear(*widths) for widths in pairwise(_WIDTHS)]
        self.model: Any = nn.Sequential(*layers)
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=0.1, **options)
        self.owners = Owners()
        self.owners.attach([self.opt])
        self.step()

    def step(self) -> None:
        """Train one step."""
        self.opt.zero_grad()
        self.model(torch.ones(2, _WIDTHS[0])).square().mean().backward()
        self.opt.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Return the parameters and the state of the optimizer, by their names."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            state[name] = parameter
            for kind, value in self.opt.state[parameter].items():
                state[f"{name}.{kind}"] = value
        return state

    def save(self, *, checksums: bool = False) -> ShardedSave:
        """Save, and hold the copy back before its first piece."""
        return ShardedSave(self, Overlap(self.owners, DeviceBudget(0), checksums))


class ShardedSave:
    """An overlapped copy of what this rank writes of a training.

    Attributes:
        stats: of the save.
        large: bytes of all ranges that are large enough to be deferred.
        padded: how many ranges are a part of their storage.
    """

    def __init__(self, training: ShardedTraining, overlap: Overlap) -> None:
        self._copier = training.copier
        state = training.state()
        shards, ranges = shards_of(list(state.values()), list(state))
        self.large = sum(size for size in shards.sizes if size > SMALL)
        self.padded = sum(
            size < source.nbytes() for source, size in zip(ranges.sources, ranges.sizes, strict=True)
        )
        self._expected = [
            raw(source)[offset : offset + size].clone()
            for source, offset, size, _ in zip(*ranges, strict=True)
        ]
        items, made = Items(shards.pickles, shards.sizes), ItemFile()
        body = made.lay_out(items)
        self.stats = SaveStats()
        lease = Arena().lease(body.nbytes)
        self._snapshot = Snapshot(made, items, body, lease, self.stats, ranges, overlap)
        self._copier.hold()
        self._snapshot.copy()
        assert self._snapshot.deferred is not None, self.stats.reason
        self._snapshot.deferred.state = state
        self._snapshot.deferred.start()
        self._copier.wait_for_arrival()

    def settle(self) -> str:
        """Let all be copied; return whether the bytes are those of the save, or why the snapshot is torn."""
        self._copier.open()
        self._snapshot.filled.wait_for_end()
        try:
            self._snapshot.settle()
        except TornSnapshotError as error:
            return str(error)
        finally:
            self._snapshot.end_copy()
        body, buffer = self._snapshot.body, torch.frombuffer(self._snapshot.lease.view, dtype=torch.uint8)
        found = [
            buffer[start:stop] for start, stop in zip(body.starts.tolist(), body.stops.tolist(), strict=True)
        ]
        return str(all(map(torch.equal, found, self._expected)))


def double(parameter: Any) -> None:
    """Change a parameter on all ranks."""
    with torch.no_grad():
        parameter.mul_(2)


def double_local(parameter: Any) -> None:
    """Change the shard of this rank."""
    with torch.no_grad():
        parameter.to_local().mul_(2)


def double_by_foreach(parameter: Any) -> None:
    """Change a parameter by an operation on a list of tensors."""
    with torch.no_grad():
        torch._foreach_mul_([parameter], 2)


def report(**options: Any) -> dict[str, Any]:
    """Return what became of saves, by what was done while they were copied."""
    training = ShardedTraining(**options)
    weight, told = training.model[0].weight, dict[str, Any]()
    save = training.save()
    told["deferred"], told["large"], told["padded"] = save.stats.deferred_bytes, save.large, save.padded
    told["nothing"] = save.settle()

    def note(name: str, change: Callable[[], object], *, checksums: bool = False) -> None:
        save = training.save(checksums=checksums)
        before = local_of(weight).clone()
        change()
        told[name] = save.settle()
        told[name + " fenced"] = save.stats.fence > 0
        told[name + " changed"] = not torch.equal(before, local_of(weight))

    momentum = training.opt.state[weight]["exp_avg"]
    note("step", training.step)
    note("step, checksums", training.step, checksums=True)
    note("parameter", lambda: double(weight))
    note("local", lambda: double_local(weight))
    note("momentum", lambda: double(momentum))
    note("foreach", lambda: double_by_foreach(weight))
    note("foreach, checksums", lambda: double_by_foreach(weight), checksums=True)
    note("step after all", training.step)
    return told
