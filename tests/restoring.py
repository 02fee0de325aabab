"""Live states to restore into, and what they mean."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from asyncckpt._stateful import remake


class Counter:
    """An object of the user's with a state of its own."""

    def __init__(self, count: int, refuses: object = None) -> None:
        self.count = count
        self.refuses = refuses

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        if state["count"] == self.refuses:
            raise RuntimeError("not today")


def trained(steps: int = 2, seed: int = 0) -> dict[str, Any]:
    """Return a state like that of a real run, some steps old."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(steps):
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return {"model": model, "opt": optimizer, "sched": scheduler, "step": steps}


def meaning(state: Any) -> Any:
    """Return a deep copy in which stateful objects are their state dicts."""
    if isinstance(state, dict):
        return {key: meaning(value) for key, value in state.items()}
    if isinstance(state, list):
        return [meaning(value) for value in state]
    if isinstance(state, tuple):
        return remake(state, map(meaning, state))
    return copy.deepcopy(state.state_dict() if hasattr(state, "state_dict") else state)
