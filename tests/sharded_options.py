"""Saves of all ranks with each option of a Checkpointer; for programs of a process group of two."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import asyncckpt
from asyncckpt import BestK, Checkpointer, LastN
from asyncckpt._snapshot import lanes
from asyncckpt.schedule import Every
from asyncckpt.stores import LocalStore
from asyncckpt.testing import Gate, SlowStore
from copier import Copier

if TYPE_CHECKING:
    from collections.abc import Callable

_PATIENCE = 80.0


def state(value: float) -> dict[str, Any]:
    """Return a state that all ranks have alike, in two parts."""
    return {"a": torch.full((50,), value), "b": torch.full((50,), value), "value": value}


def values(ckpt: Checkpointer) -> list[float]:
    """Return what the tensors of each checkpoint hold, in order of commit."""
    found = [ckpt.load(checkpoint.path) for checkpoint in ckpt.checkpoints()]
    assert all(len({*s["a"].tolist(), *s["b"].tolist(), s["value"]}) == 1 for s in found)
    return [s["value"] for s in found]


def slow(path: str, rank: int) -> tuple[SlowStore, Gate]:
    """Return a store whose files are not committed on one rank until a gate is open."""
    gate = Gate(opened=dist.get_rank() != rank)
    return SlowStore(LocalStore(path), gates={"commit": gate}), gate


def skips(path: str) -> Any:
    """Save while one rank is busy: all skip."""
    store, gate = slow(path, 1)
    with Checkpointer(store=store, sharded=True, when_busy="skip", rank_timeout=_PATIENCE) as ckpt:
        saves = [ckpt.save(step, state(step)) for step in (1, 2)]
        dist.barrier()
        gate.open()
        ckpt.wait()
        saves.append(ckpt.save(3, state(3)))
    return [save.skipped for save in saves], values(ckpt)


def waits(path: str) -> Any:
    """Save twice, with room for two, while one rank is slow."""
    store, gate = slow(path, 0)
    with Checkpointer(store=store, sharded=True, max_in_flight=2, rank_timeout=_PATIENCE) as ckpt:
        saves = [ckpt.save(step, state(step)) for step in (1, 2)]
        pending = [save.committed.done() for save in saves]
        dist.barrier()
        gate.open()
        saves.append(ckpt.save(3, state(3)))
    return pending, values(ckpt)


def policies(path: str) -> Any:
    """Evict by steps and metrics."""
    with Checkpointer(path, sharded=True, keep=LastN(1) | BestK(2, "loss"), rank_timeout=_PATIENCE) as ckpt:
        for step, loss in enumerate((3.0, 1.0, 2.0, 5.0, 4.0)):
            ckpt.save(step, state(step), metrics={"loss": loss}).committed.result(_PATIENCE)
    dist.barrier()
    best = ckpt.best()
    return values(ckpt), best and best.step, sorted(os.listdir(path))  # noqa: PTH208


def again(path: str) -> Any:
    """Save a step twice, and another step under its name."""
    with Checkpointer(path, sharded=True, filename="last.pt", rank_timeout=_PATIENCE) as ckpt:
        ckpt.save(1, state(1)).committed.result(_PATIENCE)
        ckpt.save(1, state(2)).committed.result(_PATIENCE)
        dist.barrier()
        seen: list[Any] = [values(ckpt)]
        try:
            ckpt.save(2, state(3))
        except asyncckpt.SaveError as error:
            seen += [type(error).__name__, "is the checkpoint of step 1" in str(error)]
    with Checkpointer(path, sharded=True, filename="last.pt", overwrite=True, rank_timeout=_PATIENCE) as ckpt:
        ckpt.save(2, state(3))
    dist.barrier()
    return [*seen, values(ckpt), os.listdir(path)]  # noqa: PTH208


def due(path: str) -> Any:
    """Save what is due by steps, and after a signal on one rank."""
    with Checkpointer(path, sharded=True, every=Every(steps=4), rank_timeout=_PATIENCE) as ckpt:
        for step in range(1, 11):
            if ckpt.due(step):
                ckpt.save(step, state(step))
    with Checkpointer(path, sharded=True, on_signal="SIGUSR1", rank_timeout=_PATIENCE) as ckpt:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        while not ckpt.due(step := step + 1):
            pass
        ckpt.save(step, state(step))
        assert ckpt.signum == signal.SIGUSR1
    dist.barrier()
    assert ckpt.latest() is not None
    return values(ckpt)[:-1], values(ckpt)[-1] == step


def awaited(path: str) -> Any:
    """Save in async code."""

    async def train() -> list[int | None]:
        async with Checkpointer(path, sharded=True, rank_timeout=_PATIENCE) as ckpt:
            saves = [ckpt.save(step, state(step)) for step in (1, 2)]
            return [(await save).step for save in saves]

    return asyncio.run(train())


def forked(path: str) -> Any:
    """Fork while a save is pending: the child is told at once, and the parent finishes it."""
    store, gate = slow(path, dist.get_rank())
    with Checkpointer(store=store, sharded=True, rank_timeout=_PATIENCE) as ckpt:
        save = ckpt.save(1, state(1))
        gate.wait_for_arrival()
        child = os.fork()
        if not child:
            error = save.committed.exception(1.0)
            os._exit(0 if isinstance(error, asyncckpt.SaveError) else 1)
        _, status = os.waitpid(child, 0)
        gate.open()
    return status, values(ckpt)


def changing(path: str) -> Any:
    """Save states whose entries come and go, with a state of each rank, and a reserved one."""
    rank, seen = dist.get_rank(), []
    with Checkpointer(path, sharded=True, rank_timeout=_PATIENCE) as ckpt:
        assert ckpt.reserve(state(0)) > 0
        extras: list[dict[str, Any]] = [{}, {"c": torch.ones(3)}, {}, {"c": torch.ones(4)}, {"c": "text"}]
        for step, more in enumerate(extras):
            ckpt.save(step, state(step) | more, rank_state={"rank": torch.tensor([rank, step])})
        ckpt.wait()
        dist.barrier()
        for step in range(5):
            own = {"rank": torch.zeros(2, dtype=torch.int64)}
            ckpt.restore({"a": torch.zeros(50)}, step, rank_state=own, strict=False)
            seen.append(own["rank"].tolist() == [rank, step])
        return seen, values(ckpt), [str(ckpt.load(step).get("c")) for step in (2, 4)]


def overlapped(path: str) -> Any:
    """Save overlapped while FSDP2 trains on, beside whole states at the same instants."""
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(*(torch.nn.Linear(301, 301) for _ in range(3)))
    fully_shard(model)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        model(torch.ones(2, 301) * (dist.get_rank() + 1)).square().mean().backward()
        opt.step()
        opt.zero_grad()

    def whole() -> list[Any]:
        found = [parameter.full_tensor().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            found += [opt.state[parameter][key].full_tensor().clone() for key in ("exp_avg", "exp_avg_sq")]
        return found

    step()
    twins, overlaps = [], []
    lanes.memmove = copier = Copier()  # type: ignore[assignment]
    with Checkpointer(path, rank_timeout=_PATIENCE) as ckpt:
        for number in range(4):
            twins.append(whole())
            save = ckpt.save(number, {"model": model, "opt": opt}, overlap=True)
            step()
            overlaps.append(save.stats.overlapped)
        ckpt.wait()
        dist.barrier()
        same = []
        for number, twin in enumerate(twins):
            ckpt.restore({"model": model, "opt": opt}, number)
            same.append(all(map(torch.equal, whole(), twin)))
        copier.hold()
        save = ckpt.save(9, {"model": model, "opt": opt}, overlap=True)
        copier.wait_for_arrival()
        if dist.get_rank() == 1:
            with torch.no_grad():
                model[0].weight.to_local().mul_(2)
        copier.open()
        error = save.committed.exception(_PATIENCE)
        dist.barrier()
        torn = [type(error).__name__, "rank 1: TornSnapshotError" in str(error)]
        return overlaps[1:], same, torn, [checkpoint.step for checkpoint in ckpt.checkpoints()]


CASES: list[Callable[[str], Any]] = [
    skips, waits, policies, again, due, awaited, forked, changing, overlapped,
]  # fmt: skip


def told_of(directory: str) -> dict[str, Any]:
    """Return what this rank sees of each case."""
    seen = {}
    for case in CASES:
        seen[case.__name__] = case(f"{directory}/{case.__name__}")
        dist.barrier()
    return seen
