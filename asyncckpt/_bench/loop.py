"""A small training beside which saves are measured."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

_BATCH, _WIDTH, _CLASSES = 64, 256, 10
_RATE = 0.01


class Loop:
    """Takes training steps one after another, on one thread, as that of a GPU job is; torch's others rest.

    Args:
        step: takes one.
    """

    def __init__(self, step: Callable[[], object]) -> None:
        self._step = step

    def run(self, seconds: float) -> list[float]:
        """Take steps for some time; returns what each took, in seconds."""
        end = time.perf_counter() + seconds
        return self.run_while(lambda: time.perf_counter() < end)

    def run_while(self, going: Callable[[], bool]) -> list[float]:
        """Take steps, at least one, while `going` says so; returns what each took, in seconds."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            times = []
            last = time.perf_counter()
            while True:
                self._step()
                now = time.perf_counter()
                times.append(now - last)
                last = now
                if not going():
                    return times
        finally:
            torch.set_num_threads(threads)


def training_step(device: torch.device) -> Callable[[], float]:
    """Return a step of a real training: forward, backward, descent, and the loss as a number."""
    model = nn.Sequential(
        nn.Linear(_WIDTH, _WIDTH),
        nn.GELU(),
        nn.Linear(_WIDTH, _WIDTH),
        nn.GELU(),
        nn.Linear(_WIDTH, _CLASSES),
    ).to(device)
    parameters = list(model.parameters())
    inputs = torch.rand(_BATCH, _WIDTH, device=device)
    labels = torch.arange(_BATCH, device=device) % _CLASSES

    def step() -> float:
        loss = nn.functional.cross_entropy(model(inputs), labels)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=_RATE)
        return loss.item()

    return step
