"""Measure what overlapped and blocking saves cost a training on the CPU."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

import torch

import states
from asyncckpt import Checkpointer, LastN
from asyncckpt._bench.training import training_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Options, Samples

# Small steps that stand for the forward and backward pass of the model, whose own would take seconds here.
_PASSES = 400
# Saves before the Checkpointer has decided whether to overlap.
_TRIAL = 9


def overlapped(options: Options) -> Samples:
    """Save in one of two iterations, by turns blocking, overlapped, and as the Checkpointer has decided."""
    training = options.training()
    state = {"model": training.model, "optimizer": training.optimizer}
    beside = training_step(torch.device("cpu"))
    for parameter in training.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
    samples: defaultdict[str, list[float]] = defaultdict(list)

    def iteration() -> None:
        for _ in range(_PASSES):
            beside()
        training.optimizer.step()

    with Checkpointer(options.directory, keep=LastN(1), overlap=True) as ckpt:

        def save(step: int, overlap: bool | None) -> None:  # noqa: FBT001
            kind = {None: "chosen", True: "overlapped", False: "blocking"}[overlap]
            began = time.perf_counter()
            saved = ckpt.save(step, state, overlap=overlap)
            returned = time.perf_counter()
            iteration()
            samples[f"{kind}_step_s"].append(time.perf_counter() - began)
            samples[f"{kind}_call_s"].append(returned - began)
            samples[f"{kind}_fence_s"].append(saved.stats.fence)
            samples[f"{kind}_was_overlapped"].append(float(saved.stats.overlapped))
            saved.committed.result()
            ckpt.wait()

        iteration()
        for step in range(_TRIAL):
            save(step, None)
        samples.clear()
        for turn in range(options.repeat):
            for kind, overlap in enumerate((False, True, None)):
                options.settle()
                samples["step_s"].append(_time(iteration))
                save(_TRIAL + 3 * turn + kind, overlap)
    samples["tensors"].append(float(len(states.distinct_tensors(training.state()))))
    return samples


def _time(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
