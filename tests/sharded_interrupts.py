"""Saves of two ranks that Ctrl-C interrupts on one of them; for programs of a process group."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import asyncckpt
from asyncckpt import Checkpointer
from interrupts import Interrupt, held, wait_until

if TYPE_CHECKING:
    from asyncckpt._saving.save import Save

_PATIENCE = 80.0
_DEADLINE = 30.0  # seconds that ranks wait for each other


class Trigger:
    """An object at whose collection the points of an interrupt begin: before that, no rank waits."""

    def __init__(self, interrupt: Interrupt) -> None:
        self._interrupt = interrupt

    def state_dict(self) -> dict[str, Any]:
        self._interrupt.__enter__()
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class Interrupted:
    """Saves of all ranks, one of which is interrupted.

    Args:
        directory: of the checkpoints.
        victim: the rank that is interrupted.
        plans: whether the ranks have to plan each save anew.
    """

    def __init__(self, directory: str, victim: int, *, plans: bool) -> None:
        self.ckpt = Checkpointer(
            directory, sharded=True, rank_timeout=_DEADLINE, on_error=lambda *_: None, keep=asyncckpt.LastN(2)
        )
        self.rank, self.victim, self.plans = dist.get_rank(), victim, plans
        self.step = 0
        self.save(trigger={}).committed.result(_PATIENCE)

    def save(self, **more: Any) -> Save:
        """Save another step."""
        self.step += 1
        key = f"x{self.step}" if self.plans else "x"
        return self.ckpt.save(self.step, {key: torch.full((30,), self.step), "y": self.step, **more})

    def everywhere(self, stride: int) -> int:
        """Interrupt saves at every so-many-th point; return how many there were.

        Behind each of them, either all ranks have the checkpoint or none, and the next save works.
        """
        number = 0
        self.ckpt.wait()
        before = held()
        while True:
            interrupt = Interrupt(number)
            seen: list[Any] = [None] * dist.get_world_size()
            began = time.monotonic()
            dist.all_gather_object(seen, (self._attempt(interrupt), interrupt.came, interrupt.where))
            _, came, where = seen[self.victim]
            outcomes = [outcome for outcome, _, _ in seen]
            assert outcomes in ([True] * len(seen), [False] * len(seen)), (where, outcomes)
            assert time.monotonic() - began < _DEADLINE, where  # no rank has waited until the deadline
            if not came:
                break
            self.save(trigger={}).committed.result(_PATIENCE)
            number += stride
        self.ckpt.wait()
        dist.barrier()
        wait_until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)), str(before))
        return number

    def _attempt(self, interrupt: Interrupt) -> bool:
        """Save, interrupted if this is the victim; return whether the checkpoint is there for this rank."""
        try:
            try:
                save = self.save(trigger=Trigger(interrupt) if self.rank == self.victim else {})
            finally:
                interrupt.__exit__()
            save.committed.result(_PATIENCE)
        except KeyboardInterrupt:
            self.ckpt.wait()
        except asyncckpt.AsyncCkptError as error:
            if f"rank {self.victim}" not in str(error):
                raise
            return False
        else:
            return True
        return any(checkpoint.step == self.step for checkpoint in self.ckpt.checkpoints())
