"""A small training beside which saves are measured, and the plain copy that no save can beat."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from asyncckpt._bench.states import distinct_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

_BATCH, _WIDTH, _CLASSES = 64, 256, 10
_RATE = 0.01


def training_step(device: torch.device) -> Callable[[], float]:
    """Return a step of a real training: forward, backward, descent, and the loss as a number."""
    layers = nn.Linear(_WIDTH, _WIDTH), nn.GELU(), nn.Linear(_WIDTH, _WIDTH), nn.GELU()
    model = nn.Sequential(*layers, nn.Linear(_WIDTH, _CLASSES)).to(device)
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


def steps_for(step: Callable[[], object], seconds: float) -> list[float]:
    """Take steps for some time; returns what each took, in seconds."""
    end = time.perf_counter() + seconds
    return steps_while(step, lambda: time.perf_counter() < end)


def steps_while(step: Callable[[], object], going: Callable[[], bool]) -> list[float]:
    """Take steps, at least one, while `going` returns true; returns what each took, in seconds.

    They run on one thread, as the host side of a GPU job does; torch's others rest.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        last = time.perf_counter()
        while True:
            step()
            now = time.perf_counter()
            times.append(now - last)
            last = now
            if not going():
                return times
    finally:
        torch.set_num_threads(threads)


class PlainCopy:
    """Copies each storage of a state once, into warm host buffers, which are pinned for those of a GPU.

    Attributes:
        pairs: the buffer and the source of each.
    """

    def __init__(self, state: Any) -> None:
        self.pairs = [
            (torch.empty_like(source, device="cpu", pin_memory=source.is_cuda), source)
            for source in distinct_tensors(state)
        ]
        self.run()

    def run(self) -> float:
        """Copy everything; returns seconds."""
        began = time.perf_counter()
        for target, source in self.pairs:
            target.copy_(source, non_blocking=source.is_cuda)
        if any(source.is_cuda for _, source in self.pairs):
            torch.cuda.synchronize()
        return time.perf_counter() - began
