"""States of objects under full names: collected without a trace, and given back."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from asyncckpt._sharding.states import apply, collect_sharded, fit_optimizers, misfits, with_rank_state
from asyncckpt.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [  # of stock DCP
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    inputs = torch.arange(15.0).reshape(5, 3)
    model(inputs).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def values(value: Any) -> Any:
    """Return a state in a form that compares."""
    if isinstance(value, torch.Tensor):
        return value.tolist(), value.dtype
    if isinstance(value, dict):
        return {key: values(item) for key, item in value.items()}
    return [values(item) for item in value] if isinstance(value, list) else value


def save(state: Any, path: Path) -> Any:
    """Save a state as stock DCP does; return its metadata."""
    dcp_save(collect_sharded(state)[0], checkpoint_id=path, no_dist=True)
    return pickle.loads((path / ".metadata").read_bytes())


def restore(state: Any, path: Path) -> None:
    """Restore a state that `save` has saved, with the loading by stock DCP."""
    collected, _ = collect_sharded(state)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    assert fit_optimizers(state, collected, metadata) == []
    dcp_load(collected, checkpoint_id=path, no_dist=True)
    assert misfits(state, collected) == []
    apply(state, collected)


def test_tensors_are_the_live_ones_and_the_objects_are_returned() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    loose = torch.ones(2)
    collected, objects = collect_sharded({"m": model, "o": [optimizer, scheduler], "loose": loose})
    assert objects == [model, optimizer, scheduler]
    assert collected["m"]["0.weight"] is model[0].weight
    assert collected["m"]["1.running_mean"] is model[1].running_mean
    assert (
        collected["o"][0]["state"]["2.bias"]["exp_avg"]
        is optimizer.state[list(model.parameters())[-1]]["exp_avg"]
    )
    assert collected["o"][0]["param_groups"][0]["params"] == [name for name, _ in model.named_parameters()]
    assert collected["o"][1] == scheduler.state_dict()
    assert collected["loose"] is loose


def test_an_optimizer_that_has_not_stepped_is_only_looked_at() -> None:
    def train(look: Callable[[Any], Any]) -> Any:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        steps: list[int] = []
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        state = {"model": model, "opt": optimizer, "scheduler": scheduler}
        look(state)
        assert not steps
        assert not optimizer.state
        step(model)
        look(state)  # with gradients that a fake step would clear
        optimizer.step()
        scheduler.step()
        look(state)
        assert len(steps) == 1
        return values([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])

    assert train(collect_sharded) == train(lambda _: None)


def optimizers_of(model: Any) -> list[torch.optim.Optimizer]:
    """Return optimizers with groups, a tensor as learning rate, momentum, and frozen parameters."""
    model[2].bias.requires_grad = False
    groups: list[dict[str, Any]] = [
        {"params": [model[0].bias, model[0].weight], "lr": torch.tensor(0.2)},
        {"params": [model[2].bias]},
    ]
    adam = torch.optim.Adam(groups, lr=0.1, amsgrad=True, foreach=False, capturable=False)
    return [adam, torch.optim.SGD([model[2].weight, *model[1].parameters()], lr=0.1, momentum=0.9)]


@pytest.mark.parametrize("stepped", [False, True])
def test_a_state_is_restored_into_fresh_objects_and_into_used_ones(tmp_path: Path, *, stepped: bool) -> None:
    def made() -> dict[str, Any]:
        model = net()
        optimizers = optimizers_of(model)
        return {
            "model": model,
            "optimizers": optimizers,
            "scheduler": torch.optim.lr_scheduler.StepLR(optimizers[1], 2),
            "plain": {"step": 0, "w": torch.zeros(2)},
        }

    def train(state: dict[str, Any], count: int) -> Any:
        for _ in range(count):
            step(state["model"], *state["optimizers"])
            state["scheduler"].step()
        return values(collect_sharded(state)[0])

    first = made()
    first["plain"] = {"step": 7, "w": torch.ones(2)}
    train(first, 3)
    save(first, tmp_path / "saved")
    expected = train(first, 2)
    second = made()
    if stepped:
        train(second, 1)
    restore(second, tmp_path / "saved")
    second["plain"]["step"] = 7  # it is no part of an object
    assert train(second, 2) == expected


def test_a_used_optimizer_is_as_fresh_as_the_saved_one(tmp_path: Path) -> None:
    model = net()
    save({"m": model, "o": torch.optim.AdamW(model.parameters())}, tmp_path / "saved")
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    restore({"m": model, "o": optimizer}, tmp_path / "saved")
    assert not optimizer.state


def test_parameters_in_another_order_get_their_own_state(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    save({"m": model, "o": optimizer}, tmp_path / "saved")
    other = net()
    turned = torch.optim.AdamW(reversed(list(other.parameters())))
    restore({"m": other, "o": turned}, tmp_path / "saved")
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert values(optimizer.state[one]) == values(turned.state[two])


def test_groups_with_other_parameters_are_told(tmp_path: Path) -> None:
    model = net()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    save({"m": model, "o": torch.optim.SGD(groups, lr=1.0)}, tmp_path / "saved")
    state = {"m": model, "o": torch.optim.SGD(list(reversed(groups)), lr=1.0)}
    collected, _ = collect_sharded(state)
    dcp_load(collected, checkpoint_id=tmp_path / "saved", no_dist=True)
    first, second = misfits(state, collected)
    assert first == (
        "o.param_groups.0: other parameters are in this group: only in the state 2.bias, 2.weight, only in"
        " the checkpoint 0.bias, 0.weight"
    )
    assert second.startswith("o.param_groups.1: ")


def test_an_optimizer_of_several_modules_has_names_with_their_paths() -> None:
    left, right = net(), net()
    optimizer = torch.optim.AdamW([*left.parameters(), *right.parameters()])
    step(nn.Sequential(left, nn.Linear(2, 3), right), optimizer)
    state = {"nets": [left, right], "opt": optimizer}
    collected, _ = collect_sharded(state)
    names = collected["opt"]["param_groups"][0]["params"]
    assert names[:1] == ["nets.0.0.weight"]
    assert names[-1:] == ["nets.1.2.bias"]
    assert list(collected["opt"]["state"]) == names
    before = values(optimizer.state_dict())
    apply(state, collected)
    assert values(optimizer.state_dict()) == before


def test_an_optimizer_without_its_modules_keeps_numbers(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    collected, _ = collect_sharded({"o": optimizer})
    assert list(collected["o"]["state"]) == list(range(6))
    save({"o": optimizer}, tmp_path / "saved")
    fresh = torch.optim.AdamW(model.parameters())
    restore({"o": fresh}, tmp_path / "saved")
    assert values(fresh.state_dict()) == values(optimizer.state_dict())


def test_entries_that_cannot_be_made_are_told(tmp_path: Path) -> None:
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.state[model.weight] = {"parts": [torch.ones(1), torch.ones(2)], "row": torch.ones(3)}
    metadata = save({"m": model, "o": optimizer}, tmp_path / "saved")
    state = {"m": model, "o": torch.optim.SGD(model.parameters(), lr=1.0)}
    collected, _ = collect_sharded(state)
    assert fit_optimizers(state, collected, metadata) == [
        "o.state.weight.parts: it holds several values; let the optimizer step once before it is restored"
    ]
    assert collected["o"]["state"]["weight"]["row"].shape == (3,)


class Odd(nn.Module):
    """A module with extra state, a key from a hook, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.extra = {"a": 1}
        self.register_buffer("scratch", torch.ones(1), persistent=False)
        hooked: Any = self
        hooked.register_state_dict_post_hook(lambda _, state, key, __: state.update({f"{key}of.hook": 3}))
        hooked.register_load_state_dict_pre_hook(lambda _, state, key, *__: state.pop(f"{key}of.hook"))

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


class Own(nn.Linear):
    """A module with a state dict of its own, which takes no arguments."""

    def state_dict(self) -> Any:  # type: ignore[override]
        return {"w": self.weight.detach()}

    def load_state_dict(self, state: Any) -> None:  # type: ignore[override]
        assert list(state) == ["w"]
        self.loaded = True


def test_modules_with_states_of_their_own_are_collected_and_loaded() -> None:
    odd, own = Odd(), Own(2, 2)
    state = {"odd": odd, "own": own, "wrapped": torch.compile(Odd(), backend="eager")}
    collected, _ = collect_sharded(state)
    keys = ["_extra_state", "inner.weight", "inner.bias", "of.hook"]
    assert list(collected["odd"]) == keys
    assert set(collected["wrapped"]) == {*keys[:3], "_orig_mod.of.hook"}
    assert list(collected["own"]) == ["w"]
    collected["odd"] = {**collected["odd"], "inner.bias": torch.zeros(2), "_extra_state": {"a": 2}}
    apply(state, collected)
    assert odd.extra == {"a": 2}
    assert odd.inner.bias.tolist() == [0, 0]
    assert own.loaded


def test_rank_states_have_a_path_of_their_own() -> None:
    model = nn.Linear(1, 1)
    state = with_rank_state({"a": 1}, 3, {"rng": torch.ones(1), "m": model})
    assert list(state) == ["a", "rank_state"]
    assert list(state["rank_state"]) == ["3"]
    assert list(state["rank_state"]["3"]["m"]) == ["weight", "bias"]
    with pytest.raises(SaveError, match="'rank_state'"):
        with_rank_state({"rank_state": 1}, 0, {})


def test_a_state_has_to_be_a_dict() -> None:
    with pytest.raises(SaveError, match="not of a list"):
        collect_sharded([torch.ones(1)])
    assert list(collect_sharded(nn.Linear(1, 1))[0]) == ["weight", "bias"]
