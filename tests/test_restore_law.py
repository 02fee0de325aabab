"""Laws of a restore, over states of any shape."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from asyncckpt import StateMismatchError
from asyncckpt._loading.restore import restore
from asyncckpt._stateful import collect
from restoring import Counter, meaning
from sameness import assert_same
from support import torch_round_trip

if TYPE_CHECKING:
    from collections.abc import Callable


class Pair(NamedTuple):
    first: Any
    second: Any


def optimizer(value: int) -> torch.optim.Optimizer:
    made = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1 + value, momentum=0.9)
    if value:
        made.param_groups[0]["params"][0].grad = torch.full((2,), float(value))
        made.step()
    return made


def hooked(value: int) -> nn.Module:
    module = linear(value)
    module.register_load_state_dict_post_hook(lambda *_: None)
    return module


def linear(value: int) -> nn.Module:
    module = nn.Linear(2, 1)
    nn.init.constant_(module.weight, value)
    nn.init.constant_(module.bias, value)
    return module


OBJECTS: list[Callable[[int], Any]] = [
    Counter,
    linear,
    hooked,
    optimizer,
    lambda value: torch.full((2,), float(value)),
    lambda value: torch.full((2, 3), value).t(),
    lambda value: torch.full((2,), float(value)).to(torch.float8_e5m2),
]
keys = st.text(max_size=2) | st.integers(0, 3)
plain_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3) | st.tuples(inner),
    max_leaves=5,
)


# The first step of an optimizer imports much of torch.
law = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)


@st.composite
def two_states(draw: st.DrawFn) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Make a live and a saved state: the same objects in the same places, other values."""

    def entry(depth: int) -> tuple[Any, Any]:
        kind = draw(
            st.sampled_from(
                ["plain", "object", "object", "dict", "list", "tuple", "pair"][: 7 if depth else 3]
            )
        )
        if kind == "plain":
            return draw(plain_values), draw(plain_values)
        if kind == "object":
            make = draw(st.sampled_from(OBJECTS))
            return make(draw(st.integers(0, 3))), make(draw(st.integers(4, 6)))
        entries = [entry(depth - 1) for _ in range(2 if kind == "pair" else draw(st.integers(1, 3)))]
        entries.append((Counter(1), Counter(2)))  # else it may be plain
        live, saved = zip(*entries, strict=True)
        if kind == "dict":
            names = draw(st.lists(keys, min_size=len(live), max_size=len(live), unique=True))
            return dict(zip(names, live, strict=True)), dict(zip(names, saved, strict=True))
        kinds: dict[str, Any] = {
            "list": list,
            "tuple": tuple,
            "pair": lambda items: Pair(items[0], items[1:]),
        }
        return kinds[kind](live), kinds[kind](saved)

    names = draw(st.lists(keys, min_size=1, max_size=4, unique=True))
    entries = [entry(2) for _ in names]
    return (
        {name: live for name, (live, _) in zip(names, entries, strict=True)},
        {name: saved for name, (_, saved) in zip(names, entries, strict=True)},
    )


@law
@given(two_states())
def test_saving_a_restored_state_gives_the_same_checkpoint(states: tuple[Any, Any]) -> None:
    live, saved = states
    stored = torch_round_trip(collect(saved))
    restore(live, copy.deepcopy(stored), "file.pt")
    assert_same(meaning(torch_round_trip(collect(live))), meaning(stored))


@law
@given(two_states(), st.booleans())
def test_a_failed_restore_leaves_the_state_unchanged(states: tuple[Any, Any], strict: bool) -> None:  # noqa: FBT001 - drawn
    live, saved = states
    live["refusing"], saved["refusing"] = Counter(0, refuses=1), Counter(1)
    live["missing"] = 1
    if strict:
        del live["missing"]
    before, entries = meaning(live), dict(live)
    with pytest.raises(StateMismatchError):
        restore(live, torch_round_trip(collect(saved)), "file.pt", strict=strict)
    assert_same(meaning(live), before)
    assert all(live[key] is value for key, value in entries.items())


@law
@given(two_states())
def test_a_partial_restore_changes_all_common_entries_and_no_others(states: tuple[Any, Any]) -> None:
    live, saved = states
    stored = torch_round_trip(collect(saved))
    partial = {**live, "kept": 1}
    with pytest.warns(UserWarning, match="restored in part"):
        restore(partial, {**copy.deepcopy(stored), "more": 2}, "file.pt", strict=False)
    assert partial.pop("kept") == 1
    assert_same(meaning(torch_round_trip(collect(partial))), meaning(stored))
