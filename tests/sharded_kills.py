"""A training of several ranks of which one is killed while it saves; for programs of a process group."""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import asyncckpt
from asyncckpt import Checkpointer, LastN

_PATIENCE = 80.0


def train(directory: str, seed: int, timeout: float) -> None:
    """Restore the latest checkpoint, and save steps until a save fails, as it does once a rank is killed.

    Writes the step that was restored, and at the end what failed, after how many seconds, and the last step
    that this rank knows to be committed.
    """
    rank, chance = dist.get_rank(), random.Random(seed)
    own, tensors = torch.full((30,), float(rank)), [torch.zeros(20) for _ in range(6)]
    state: dict[str, Any] = {"tensors": tensors, "step": 0}
    with Checkpointer(
        directory, keep=LastN(2), sharded=True, rank_timeout=timeout, on_error=lambda *_: None
    ) as ckpt:
        found = ckpt.restore(state, missing_ok=True, rank_state={"own": own})
        last: Any = 0 if found is None else found.step
        assert {x for tensor in tensors for x in tensor.tolist()} == {last} == {state["step"]}, (last, state)
        assert set(own.tolist()) == {last + rank}, (last, own)
        for checkpoint in ckpt.checkpoints():
            ckpt.verify(checkpoint.step or 0)
        sys.stdout.write(f"{last}\n")
        sys.stdout.flush()
        while True:
            began, number = time.monotonic(), state["step"] + 1
            for tensor in tensors:
                tensor.fill_(number)
            state["step"] = number
            own.fill_(number + rank)
            try:
                save = ckpt.save(number, state, rank_state={"own": own})
                if chance.random() < 0.7:
                    last = save.committed.result(_PATIENCE).step
            except asyncckpt.SaveError as error:
                json.dump([type(error).__name__, str(error), time.monotonic() - began, last], sys.stdout)
                return
