"""Optimizers of torch are restored as by load_state_dict, and keep the state tensors that they have."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from asyncckpt import StateMismatchError
from asyncckpt._loading.restore import restore
from restoring import Counter
from sameness import assert_same
from support import torch_round_trip

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params, foreach=True),
    "fused AdamW": lambda params: torch.optim.AdamW(params, fused=True),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": lambda params: torch.optim.RMSprop(params, centered=True, momentum=0.9),
    "Rprop": torch.optim.Rprop,
    "ASGD": torch.optim.ASGD,
    "LBFGS": torch.optim.LBFGS,
}


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(300, 90), nn.Tanh(), nn.Linear(90, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(torch.ones(3, 300)).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)  # type: ignore[arg-type]


def trained(make: Make, seed: int, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = model_of(seed)
    optimizer = make(model.parameters())
    train(model, optimizer, steps)
    return model, optimizer


def tensors_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_training_goes_on_as_after_load_state_dict(make: Make, steps: int) -> None:
    source, trainer = trained(make, seed=1, steps=3)
    content = torch_round_trip({"model": source.state_dict(), "opt": trainer.state_dict()})
    (model, optimizer), (other, by_torch) = (trained(make, seed=2, steps=steps) for _ in range(2))
    restore({"model": model, "opt": optimizer}, copy.deepcopy(content), "file.pt")
    other.load_state_dict(content["model"])
    by_torch.load_state_dict(content["opt"])
    for _ in range(2):
        assert_same(optimizer.state_dict(), by_torch.state_dict())
        assert_same(dict(model.state_dict()), dict(other.state_dict()))
        train(model, optimizer, 1)
        train(other, by_torch, 1)


@pytest.mark.parametrize("name", ["momentum", "Adam", "AdamW", "fused AdamW", "Adagrad", "RMSprop"])
def test_state_tensors_stay_and_take_the_values(name: str) -> None:
    make = OPTIMIZERS[name]
    content = torch_round_trip(trained(make, seed=1, steps=3)[1].state_dict())
    _, optimizer = trained(make, seed=2, steps=2)
    before = tensors_of(optimizer)
    restore({"opt": optimizer}, {"opt": content}, "file.pt")
    assert before
    assert all(one is other for one, other in zip(tensors_of(optimizer), before, strict=True))
    assert_same(optimizer.state_dict(), content)


def test_a_tensor_that_does_not_fit_is_replaced() -> None:
    adam = OPTIMIZERS["Adam"]
    content = torch_round_trip(trained(adam, seed=1, steps=3)[1].state_dict())
    model, optimizer = trained(adam, seed=2, steps=2)
    content["state"][0]["exp_avg"] = torch.ones(5)  # which load_state_dict takes
    content["state"][1]["exp_avg"] = content["state"][1]["exp_avg"].double()
    content["state"][2]["step"] = 3
    first, second, third = list(model.parameters())[:3]
    old = optimizer.state[first]["exp_avg"]
    kept = old.clone()
    by_torch = copy.deepcopy(optimizer)
    by_torch.load_state_dict(content)
    restore({"opt": optimizer}, {"opt": content}, "file.pt")
    assert_same(optimizer.state_dict(), by_torch.state_dict())
    assert torch.equal(old, kept)
    assert optimizer.state[second]["exp_avg"].dtype is torch.float32
    assert optimizer.state[third]["step"] == 3


@pytest.mark.parametrize("tied", ["live", "saved"])
def test_tensors_that_share_memory_are_replaced(tied: str) -> None:
    adam = OPTIMIZERS["Adam"]
    saved, (_, optimizer) = trained(adam, seed=1, steps=3)[1], trained(adam, seed=2, steps=2)
    for state in (optimizer if tied == "live" else saved).state.values():
        state["exp_avg_sq"] = state["exp_avg"]
    content = torch_round_trip(saved.state_dict())
    by_torch = copy.deepcopy(optimizer)
    by_torch.load_state_dict(content)
    restore({"opt": optimizer}, {"opt": content}, "file.pt")
    assert_same(optimizer.state_dict(), by_torch.state_dict())


def test_nothing_is_written_if_a_later_entry_fails() -> None:
    adam = OPTIMIZERS["Adam"]
    content = torch_round_trip(trained(adam, seed=1, steps=3)[1].state_dict())
    _, optimizer = trained(adam, seed=2, steps=2)
    before, tensors = copy.deepcopy(optimizer.state_dict()), tensors_of(optimizer)
    live = {"opt": optimizer, "counter": Counter(0, refuses=3)}
    with pytest.raises(StateMismatchError, match="not today"):
        restore(live, {"opt": content, "counter": {"count": 3}}, "file.pt")
    assert_same(optimizer.state_dict(), before)
    assert all(one is other for one, other in zip(tensors_of(optimizer), tensors, strict=True))
