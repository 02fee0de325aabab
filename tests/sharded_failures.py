"""Saves of all ranks that fail on one of them, as each rank sees them; for programs of a process group."""

from __future__ import annotations

import errno
import gc
import os
import resource
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import asyncckpt
from asyncckpt import Checkpointer, LastN
from asyncckpt.stores import LocalStore
from asyncckpt.testing import FaultyStore, Gate, SlowStore
from interrupts import held, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._saving.save import Save

LONG, SHORT = 60.0, 2.0  # seconds that ranks wait for each other
_PATIENCE = 80.0


class Broken:
    """An object that has no state on one rank."""

    def __init__(self, rank: int) -> None:
        self._broken = rank == dist.get_rank()

    def state_dict(self) -> dict[str, Any]:
        if self._broken:
            raise ValueError("broken")
        return {"x": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class Unpicklable:
    """An object that cannot be pickled."""

    def __reduce__(self) -> NoReturn:
        raise ValueError("not to be pickled")


class Case:
    """A Checkpointer of all ranks that has saved step 1.

    Args:
        directory: of all cases.
        name: of this one.
    """

    def __init__(self, directory: str, name: str) -> None:
        self.rank = dist.get_rank()
        self.path = f"{directory}/{name}"
        self.gate = Gate(opened=True)
        self.gated = ""
        self.faults = FaultyStore(_GatedStore(self))
        self.ckpt = Checkpointer(store=self.faults, keep=LastN(1), sharded=True, rank_timeout=LONG)
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.save(1).committed.result(_PATIENCE)
        self.ckpt.wait()

    def state(self, value: float) -> dict[str, Any]:
        """Return a state of tensors that ranks have alike and of their own."""
        own = torch.full((3, 5), value + self.rank)
        return {
            "own": DTensor.from_local(own, self.mesh, [Shard(0)]),
            "same": torch.full((40,), value),
            "value": value,
        }

    def save(self, step: int, *, rank_state: Any = None, **more: Any) -> Save:
        """Save the state of a step."""
        own = {"rank": self.rank, **(rank_state or {})}
        return self.ckpt.save(step, {**self.state(float(step)), **more}, rank_state=own)

    def fail(self, rank: int, operation: str) -> None:
        """Let the disk of a rank be full."""
        if self.rank == rank:
            self.faults.fail(operation, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def hold(self, rank: int, operation: str) -> None:
        """Let an operation of a rank wait until the next `barrier`."""
        if self.rank == rank:
            self.gated = operation
            self.gate.close()

    def barrier(self) -> None:
        """Wait for all ranks; then everything works again."""
        dist.barrier()
        self.faults.reset()
        self.gate.open()

    def found(self) -> list[int | None]:
        """Return the steps that there are."""
        return [checkpoint.step for checkpoint in self.ckpt.checkpoints()]

    def differences(self, step: int) -> list[str]:
        """Return what is wrong with a checkpoint."""
        self.ckpt.verify(step)
        state, own, expected = self.state(0.0), {"rank": -1}, self.state(float(step))
        self.ckpt.restore(state, step, rank_state=own)
        wrong = [] if own == {"rank": self.rank} else [f"the rank state is {own}"]
        for key in ("same", "own"):
            one, other = (s[key].to_local() if key == "own" else s[key] for s in (state, expected))
            if not torch.equal(one, other):
                wrong.append(f"{key} of step {step} is {one}")
        return wrong


class _GatedStore(SlowStore):
    def __init__(self, case: Case) -> None:
        super().__init__(LocalStore(case.path))
        self._case = case

    async def before(self, operation: str, subject: str) -> None:
        del subject
        if operation == self._case.gated:
            await self._case.gate.passing()


def _limited(case: Case) -> Save:
    """Save where no file may be longer than a page, on rank 1."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if case.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    try:
        save = case.save(2, rank_state={"x": torch.ones(5_000)})
        save.committed.exception(_PATIENCE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return save


def _short_of_memory(case: Case) -> Save:
    if case.rank == 2:
        asyncckpt.set_memory_limit(1)
    try:
        return case.save(2)
    finally:
        asyncckpt.set_memory_limit(None)


def _late(case: Case) -> Save:
    """Save with one rank that is slow, but comes in time."""
    case.hold(1, "commit")
    save = case.save(2)
    if case.rank == 1:
        case.gate.wait_for_arrival()
    dist.barrier()
    assert not save.committed.done()
    case.barrier()
    return save


def _elsewhere(case: Case) -> Save:
    """Save to directories that are not shared, though they have the same name."""
    home, here = Path.cwd(), Path(f"{case.path}-{case.rank}")
    here.mkdir()
    os.chdir(here)
    try:
        with Checkpointer("same", sharded=True, rank_timeout=LONG, on_error=lambda *_: None) as ckpt:
            save = ckpt.save(1, case.state(1.0))
            save.committed.exception(_PATIENCE)
    finally:
        os.chdir(home)
    assert not [path.name for path in (here / "same").iterdir()]
    return save


def _silent(case: Case, rank: int) -> Save | None:
    return None if case.rank == rank else case.save(2)


def _held(case: Case, rank: int, operation: str) -> Save:
    case.hold(rank, operation)
    save = case.save(2)
    if case.rank != rank:
        save.committed.exception(_PATIENCE)
    case.barrier()
    return save


def _full(case: Case, rank: int, operation: str) -> Save:
    case.fail(rank, operation)
    return case.save(2)


def _unheard(case: Case) -> Save:
    """Save again without asking what became of the last one."""
    case.fail(1, "write")
    failed = threading.Event()
    case.save(2).committed.add_done_callback(lambda _: failed.set())
    failed.wait(_PATIENCE)
    return case.save(2)


# Each returns a save, or raises; those behind `SHORT` last until a deadline.
CASES: dict[str, tuple[Callable[[Case], Save | None], float]] = {
    **{
        f"rank {rank} raises": (lambda case, rank=rank: case.save(2, x=Broken(rank)), LONG)  # type: ignore[misc]
        for rank in range(3)
    },
    "rank 1 cannot pickle": (
        lambda case: case.save(2, rank_state={"x": Unpicklable() if case.rank == 1 else 1}),
        LONG,
    ),
    **{
        f"{operation} fails on rank {rank}": (
            lambda case, rank=rank, operation=operation: _full(case, rank, operation),  # type: ignore[misc]
            LONG,
        )
        for rank, operation in (
            (0, "list"), (0, "folder_draft"), (0, "write"), (0, "commit_folder"),
            (1, "join_folder"), (1, "draft"), (2, "write"), (2, "commit"),
        )
    },
    "the disk of rank 1 is full": (_limited, LONG),
    "rank 2 has no memory": (_short_of_memory, LONG),
    "rank 1 is slow": (_late, LONG),
    "the directory is not shared": (_elsewhere, LONG),
    "rank 1 saves another step": (lambda case: case.save(9 if case.rank == 1 else 2), LONG),
    "rank 1 lacks a shard": (lambda case: case.save(2, **({"own": 1} if case.rank == 1 else {})), LONG),
    "rank 2 has another shape": (lambda case: case.save(2, x=torch.ones(2 + case.rank // 2)), LONG),
    "rank 0 has another type": (
        lambda case: case.save(2, x=torch.ones(2, dtype=torch.float64 if case.rank else torch.float32)),
        LONG,
    ),
    "rank 1 has an object": (lambda case: case.save(2, x=1 if case.rank == 1 else torch.ones(2)), LONG),
    "a failure is not asked for": (_unheard, LONG),
    "rank 1 hangs": (lambda case: _held(case, 1, "write"), SHORT),
    "rank 0 hangs": (lambda case: _held(case, 0, "folder_draft"), SHORT),
    "rank 2 does not call": (lambda case: _silent(case, 2), SHORT),
    "rank 0 does not call": (lambda case: _silent(case, 0), SHORT),
}  # fmt: skip


def told_of(directory: str) -> dict[str, Any]:
    """Return what this rank sees of each case: the error, its seconds, and what is wrong behind it."""
    gc.freeze()  # what is there already need not be looked at each time
    return {name: _seen(Case(directory, name.replace(" ", "-")), *case) for name, case in CASES.items()}


def _seen(case: Case, call: Callable[[Case], Save | None], timeout: float) -> dict[str, Any]:
    dist.barrier()
    before = _left(case)
    dist.barrier()
    coordination = case.ckpt._ranked.coordination()
    coordination.timeout = timeout
    began = time.monotonic()
    error = _error_of(case, call)
    seconds = time.monotonic() - began
    case.barrier()
    case.ckpt._saver.drain(_PATIENCE)  # what is evicted is gone
    dist.barrier()
    coordination.timeout = LONG
    wrong = _wrong(case, 2 if error is None and case.found() == [2] else 1)
    dist.barrier()
    with suppress(AssertionError):  # the end of a connection is noticed later by the host of the store
        wait_until(lambda: all(now <= then for now, then in zip(_left(case), before, strict=True)), "")
    after = _left(case)
    if any(now > then for now, then in zip(after, before, strict=True)):
        wrong.append(f"leases, mappings, descriptors, threads, keys: {before} became {after}")
    case.ckpt.close()
    dist.barrier()
    if case.rank == 0:
        Checkpointer(case.path).close()
        wrong += [name for name in os.listdir(case.path) if name != "step-00000003"]  # noqa: PTH208
    return {"error": error, "seconds": seconds, "wrong": wrong}


def _error_of(case: Case, call: Callable[[Case], Save | None]) -> list[str] | None:
    try:
        save = call(case)
        if save is not None:
            save.committed.result(_PATIENCE)
    except (asyncckpt.AsyncCkptError, ValueError) as error:
        return [type(error).__name__, str(error)]
    return None


def _wrong(case: Case, last: int) -> list[str]:
    """Return what is wrong behind a save: with the last checkpoint, or with the next saves."""
    wrong = [] if case.found() == [last] else [f"there are {case.found()}"]
    wrong += case.differences(last)
    dist.barrier()
    for _ in range(2):  # with a plan, and without
        case.save(3).committed.result(_PATIENCE)
        case.ckpt.wait()
    dist.barrier()
    wrong += [] if case.found() == [3] else [f"there are {case.found()} at last"]
    return wrong + case.differences(3)


def _left(case: Case) -> list[int]:
    """Return what there is of leases, mappings, descriptors, threads, and keys in the store of the group."""
    store = dist.distributed_c10d._get_default_store()
    return [*held(), store.num_keys() if case.rank == 0 else 0]
