"""Files that one rank writes, as each of several ranks sees them; for programs of a process group."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import asyncckpt
from asyncckpt import Checkpointer, LastN
from asyncckpt.stores import LocalStore
from asyncckpt.testing import FaultyStore, Gate, SlowStore

if TYPE_CHECKING:
    from collections.abc import Callable

_PATIENCE = 80.0


def outcome(call: Callable[[], Any]) -> Any:
    """Return the step of the checkpoint, or the error of a save or of its call."""
    try:
        return call().committed.result(_PATIENCE).step
    except (asyncckpt.AsyncCkptError, ValueError) as error:
        return [type(error).__name__, str(error)]


def state(step: int) -> dict[str, Any]:
    """Return a state that says of which rank and step it is."""
    return {"w": torch.full((3,), float(dist.get_rank())), "step": step}


def results(path: str) -> Any:
    """Save more often than results are kept, with retention and metrics."""
    with Checkpointer(path, keep=LastN(2), rank_timeout=_PATIENCE) as ckpt:
        dist.barrier()
        saves = [ckpt.save(step, state(step), metrics={"loss": 1.0 / step}) for step in range(1, 8)]
    found = [save.committed.result() for save in saves]
    dist.barrier()
    assert [checkpoint.step for checkpoint in ckpt.checkpoints()] == [6, 7]
    live = state(0)
    ckpt.restore(live)
    return (
        [[c.step, c.metrics["loss"] * (c.step or 0), c.sequence] for c in found],
        live["w"].tolist(),
        live["step"],
    )


def failures(path: str) -> Any:
    """Let the writer fail in the background, and then in the call."""
    store = FaultyStore(LocalStore(path))
    ckpt = Checkpointer(store=store, rank_timeout=_PATIENCE)
    dist.barrier()
    store.fail("commit", OSError(28, "No space left on device"))
    seen = [outcome(lambda: ckpt.save(1, state(1))), outcome(lambda: ckpt.save(2, state(2)))]
    broken = {"w": threading.Lock()} if dist.get_rank() == 0 else state(3)
    seen += [outcome(lambda: ckpt.save(3, broken)), outcome(lambda: ckpt.save(4, state(4)))]
    ckpt.close()
    dist.barrier()
    return seen, [checkpoint.step for checkpoint in ckpt.checkpoints()]


def skips(path: str) -> Any:
    """Save while the writer is busy."""
    gate = Gate()
    store = SlowStore(LocalStore(path), gates={"commit": gate})
    ckpt = Checkpointer(store=store, when_busy="skip", rank_timeout=_PATIENCE)
    dist.barrier()
    first = ckpt.save(1, state(1))
    if dist.get_rank() == 0:
        gate.wait_for_arrival()
    dist.barrier()
    second = ckpt.save(2, state(2))
    dist.barrier()
    gate.open()
    seen = [outcome(lambda: first)]  # and nobody asks what became of the second
    seen.append(outcome(lambda: ckpt.save(3, state(3))))
    ckpt.close()
    return seen, second.skipped


def alone(path: str) -> Any:
    """Make a Checkpointer on one rank that is not the first."""
    if dist.get_rank() != 1:
        return None
    with Checkpointer(path) as ckpt:
        saves = [ckpt.save(step, state(step)) for step in (1, 2)]
    return [save.committed.result().step for save in saves], ckpt.load()["w"].tolist()


def apart(path: str) -> Any:
    """Give each rank a file of its own."""
    rank = dist.get_rank()
    with Checkpointer(path, filename=f"rank{rank}-{{step}}.pt", keep=LastN(1)) as ckpt:
        for step in range(1, 3 + rank):
            ckpt.save(step, state(step))
    dist.barrier()
    return ckpt.load()["w"].tolist(), [checkpoint.step for checkpoint in ckpt.checkpoints()]


def lacking(path: str) -> Any:
    """Save tensors that the writer does not have."""
    own = {f"only{i}": torch.ones(2) for i in range(5)} if dist.get_rank() == 2 else {}
    with Checkpointer(path, rank_timeout=_PATIENCE, on_error=lambda *_: None) as ckpt:
        dist.barrier()
        return outcome(lambda: ckpt.save(1, {**state(1), "more": own}))


def differing(path: str) -> Any:
    """Save different steps; and nothing on the writer."""
    rank = dist.get_rank()
    with Checkpointer(path, rank_timeout=1.0, on_error=lambda *_: None) as ckpt:
        dist.barrier()  # rank 0 is the first to ask who writes
        seen = [outcome(lambda: ckpt.save(1 + rank // 2, state(1)))]
        if rank:
            seen.append(outcome(lambda: ckpt.save(3, state(3))))
    dist.barrier()
    return seen


CASES = [results, failures, skips, alone, apart, lacking, differing]


def told_of(directory: str) -> dict[str, Any]:
    """Return what this rank sees of each case."""
    seen = {}
    for case in CASES:
        seen[case.__name__] = case(f"{directory}/{case.__name__}")
        dist.barrier()
    return seen
