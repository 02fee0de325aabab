"""Training is given other memory, or gives its own away, while that is copied."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from overlaps import Held
from trainings import WIDTH, momentum, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from copier import Copier

OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "SGD with momentum": momentum,
    "AdamW": torch.optim.AdamW,
    "AdamW fused": partial(torch.optim.AdamW, fused=True),
}


def a_new_weight(held: Held) -> nn.Parameter:
    return nn.Parameter(torch.zeros_like(held.model[0].weight))


def move(held: Held) -> None:
    held.model.to(torch.float64).to(torch.float32)


def set_data(held: Held) -> None:
    for parameter in held.model.parameters():
        parameter.data = torch.zeros_like(parameter)


def swap(held: Held) -> None:
    held.model.zero_grad()
    torch.utils.swap_tensors(held.model[0].weight, a_new_weight(held))


def load_optimizer(held: Held) -> None:
    state = copy.deepcopy(held.opt.state_dict())
    for entry in state["state"].values():
        for name, value in entry.items():
            entry[name] = value * 0 if isinstance(value, torch.Tensor) else value
    held.opt.load_state_dict(state)


def add_group(held: Held) -> None:
    held.opt.add_param_group({"params": [nn.Parameter(torch.ones(WIDTH, WIDTH))]})


def assign(held: Held) -> None:
    held.model.load_state_dict({k: v * 0 for k, v in held.model.state_dict().items()}, assign=True)


def replace(held: Held) -> None:
    held.model[0].weight = a_new_weight(held)


CHANGES = [move, set_data, swap, load_optimizer, add_group, assign, replace]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("change", CHANGES)
def test_other_memory_is_given_to_training_while_it_is_copied(
    tmp_path: Path, copier: Copier, change: Callable[[Held], object], name: str
) -> None:
    with Held(copier, tmp_path, partial(train, make_optimizer=OPTIMIZERS[name])) as held:
        save = held.save()
        copier.release()
        change(held)
        held.opt.zero_grad(set_to_none=True)
        copier.release()
        held.backward()
        held.opt.step()
        held.assert_saved(save)


def test_memory_that_is_freed_while_it_is_copied_fails_the_save(tmp_path: Path, copier: Copier) -> None:
    with Held(copier, tmp_path) as held:
        save = held.save()
        weights = [module.weight for module in held.model if isinstance(module, nn.Linear)]
        weights[-1].untyped_storage().resize_(0)
        copier.open()
        error = save.committed.exception(30)
        assert "was freed by resize_()" in str(error)
        assert held.ckpt.checkpoints() == []


def test_a_state_that_is_deleted_while_it_is_copied(tmp_path: Path, copier: Copier) -> None:
    with Held(copier, tmp_path) as held:
        save = held.save()
        opt, weight = weakref.ref(held.opt), held.model[0].weight
        kept = weakref.ref(weight)
        del held.model, held.opt, held.training, weight
        gc.collect()
        assert opt() is None
        assert kept() is None
        held.assert_saved(save)
