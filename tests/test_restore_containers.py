"""Dicts, lists and tuples: what is matched entry by entry, and what is replaced as a whole."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from asyncckpt import Checkpointer, StateMismatchError
from asyncckpt._loading.restore import restore
from asyncckpt._stateful import collect, is_plain, remake
from restoring import Counter, meaning
from sameness import assert_same

if TYPE_CHECKING:
    from pathlib import Path


class Nets(NamedTuple):
    generator: Any
    critic: Any


class Tagged(tuple):  # type: ignore[type-arg]  # noqa: SLOT001 - it is to have attributes
    """A tuple with an attribute, whose constructor takes its items one by one."""

    tag: str

    def __new__(cls, *items: Any) -> Tagged:  # noqa: PYI034 - no Self before Python 3.11
        made = super().__new__(cls, items)
        made.tag = "kept"
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)


@pytest.mark.parametrize(
    ("live", "saved"),
    [
        ([], [1, 2]),
        ([1, 2, 3], []),
        ({}, {"a": [1], "b": {"c": 2}}),
        ({"a": 1, "gone": 2}, {"b": 3}),
        (defaultdict(list, {"a": [1]}), {"b": [2]}),
        (OrderedDict(a=1, b=2), OrderedDict(b=1, a=2)),
        ([], [torch.ones(2), {"x": torch.zeros(1)}]),
        ({}, {"x": torch.ones(2)}),
    ],
)
def test_a_plain_list_or_dict_becomes_the_saved_one_in_place(tmp_path: Path, live: Any, saved: Any) -> None:
    state: Any = {"deep": [{"history": live}], "x": torch.zeros(1)}
    kind = type(live)
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, {"deep": [{"history": saved}], "x": torch.ones(1)})
        ckpt.restore(state)
    assert state["deep"][0]["history"] is live
    assert type(live) is kind
    plain = list if isinstance(live, list) else dict
    assert_same(plain(live), plain(saved))


@pytest.mark.parametrize(
    ("live", "saved"),
    [
        ([], None),
        ({}, [1]),
        (None, {"x": torch.ones(1)}),
        ((1, 2), (3, 4, 5)),
        (1, [2]),
        ([1], 1),
        ({1: 2}, (3,)),
    ],
)
def test_a_plain_value_of_another_kind_is_replaced(live: Any, saved: Any) -> None:
    state: Any = {"value": live, "list": [live, torch.zeros(1)]}
    restore(state, {"value": saved, "list": [saved, torch.ones(1)]}, "file.pt")
    assert state["value"] is state["list"][0] is saved


def test_plain_lists_in_plain_containers_are_changed_in_place() -> None:
    train, epochs = [1], [{"epoch": 1}]
    live: Any = {"logs": {"train": train, "other": 1}, "epochs": epochs}
    first = epochs[0]
    restore(live, {"logs": {"train": [1, 2], "new": []}, "epochs": [{"epoch": 2}, {"epoch": 3}]}, "file.pt")
    assert live == {"logs": {"train": [1, 2], "new": []}, "epochs": [{"epoch": 2}, {"epoch": 3}]}
    assert train == [1, 2]
    assert first == {"epoch": 2}


def test_one_list_in_two_places_becomes_two_where_the_saved_ones_differ() -> None:
    shared: list[int] = []
    live: Any = {"a": shared, "b": shared, "in": {"c": shared, "d": shared}, "x": torch.zeros(1)}
    one = [1]
    content = {"a": one, "b": [2], "in": {"c": one, "d": [4]}, "x": torch.ones(1)}
    restore(live, content, "file.pt")
    assert live == content
    assert live["a"] is live["in"]["c"] is shared


def test_a_plain_cycle_is_restored() -> None:
    live: dict[str, Any] = {"loop": {"n": 0}}
    live["loop"]["self"] = live["loop"]
    content: dict[str, Any] = {"loop": {"n": 1}}
    content["loop"]["self"] = content["loop"]
    loop = live["loop"]
    restore(live, content, "file.pt")
    assert live["loop"] is loop["self"] is loop
    assert loop["n"] == 1


def test_a_numpy_array_is_replaced() -> None:
    live, saved = np.zeros(2), np.ones(3)
    state: Any = {"array": live, "history": [live]}
    restore(state, {"array": saved, "history": [saved]}, "file.pt")
    assert state["array"] is state["history"][0] is saved
    assert live.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("live", "saved", "told"),
    [
        ([torch.zeros(1)], [1], "[0]: a tensor is expected, the checkpoint has a int"),
        ([torch.zeros(1)], [], ": a list of 1 is expected, the checkpoint has one of 0"),
        ({"x": torch.zeros(1)}, 3, ": a dict is expected, the checkpoint has a int"),
        ((Counter(1),), [{"count": 2}], ": a tuple of 1 is expected, the checkpoint has a list"),
        ((Counter(1), 1), ({"count": 2},), ": a tuple of 2 is expected, the checkpoint has one of 1"),
    ],
)
def test_a_plain_value_for_a_container_of_tensors_is_a_mismatch(live: Any, saved: Any, told: str) -> None:
    state = {"n": 0, "x": live}
    before = meaning(state)
    with pytest.raises(StateMismatchError) as error:
        restore(state, {"n": 1, "x": saved}, "file.pt")
    assert str(error.value).split("\n  ")[1:] == [f'state["x"]{told}']
    assert_same(meaning(state), before)


@pytest.mark.parametrize("make", [lambda *items: items, Nets, Tagged])
def test_objects_in_tuples_are_saved_and_restored(tmp_path: Path, make: Any) -> None:
    def state(value: float, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        nested = (nn.Linear(2, 2), [torch.full((2,), value), (Counter(int(value)), value)])
        return {"nets": make(nn.Linear(1, 1), nested), "plain": (value, "a")}

    saved, live = state(2, 0), state(1, 1)
    model, nested = live["nets"]
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, saved)
        stored = ckpt.load(weights_only=False)
        ckpt.restore(live, weights_only=False)
    assert type(stored["nets"]) is type(live["nets"]) is type(saved["nets"])
    assert isinstance(stored["nets"][0], dict)
    assert_same(meaning(live), meaning(saved))
    assert live["nets"][0] is model
    assert live["nets"][1] is nested
    assert nested[1][1][0].count == nested[1][1][1] == 2
    assert getattr(stored["nets"], "tag", "kept") == getattr(live["nets"], "tag", "kept") == "kept"


def test_a_plain_entry_of_a_tuple_makes_a_new_tuple() -> None:
    model, tensor = nn.Linear(1, 1), torch.zeros(1)
    live: Any = {"pair": Nets(model, (tensor, 1))}
    content = {"pair": ({"weight": torch.ones(1, 1), "bias": torch.ones(1)}, (torch.ones(1), 2))}
    restore(live, content, "file.pt")
    assert live["pair"] == Nets(model, (tensor, 2))
    assert type(live["pair"]) is Nets
    assert tensor.item() == model.bias.item() == 1


def test_a_tuple_is_restored_unless_an_item_would_be_replaced() -> None:
    counter, history = Counter(1), [1]
    state = (counter, history, 2.5, ("a", None))
    restore(state, ({"count": 2}, [1, 2], float("2.5"), ("a", None)), "file.pt")
    assert counter.count == 2
    assert history == [1, 2]
    for value in (3.5, 2, None):
        with pytest.raises(
            StateMismatchError, match=r"^file.pt .*nothing was changed:\n  state: a tuple cannot"
        ):
            restore(state, ({"count": 3}, [], value, ("a", None)), "file.pt")
    assert counter.count == 2
    assert history == [1, 2]


@pytest.mark.parametrize(("live", "saved"), [([1], {"a": 1}), (1, 2), ((1, 2), (1, 3)), ("a", None)])
def test_a_state_that_cannot_change_in_place_is_a_mismatch(live: Any, saved: Any) -> None:
    with pytest.raises(StateMismatchError, match=r"state: a .* cannot be changed in place"):
        restore(live, saved, "file.pt")


def test_keys_of_the_outermost_dict_must_match() -> None:
    live = {"epoch": 0, "history": [0]}
    with pytest.raises(StateMismatchError, match=r'state."lr".: unexpected'):
        restore(live, {"epoch": 1, "history": [], "lr": 0.1}, "file.pt")
    assert live == {"epoch": 0, "history": [0]}
    history = [0]
    restore(history, [1, 2], "file.pt")
    assert history == [1, 2]


def test_a_state_with_cycles_is_restored() -> None:
    live: dict[str, Any] = {"x": torch.zeros(1), "list": []}
    live["list"] += [live, Counter(1)]
    content: dict[str, Any] = {"x": torch.ones(1), "list": []}
    content["list"] += [content, {"count": 2}]
    restore(live, content, "file.pt")
    assert live["list"][0] is live
    assert live["list"][1].count == 2
    assert live["x"].item() == 1


def test_collect_returns_containers_without_stateful_objects_uncopied() -> None:
    pair = (torch.ones(1), [1])
    state = {"pair": pair, "nets": (pair, Counter(3))}
    collected = collect(state)
    assert collected["nets"] == (pair, {"count": 3})
    assert collected["pair"] is collected["nets"][0] is pair
    shared = (Counter(1),)
    both = collect([shared, shared])
    assert both[0] is both[1]


def test_remake_supports_structseq_tuples() -> None:
    pair = torch.ones(2, 2).max(0)
    made = remake(pair, [Counter(1), 2])
    assert type(made) is type(pair)
    assert list(made)[1] == 2


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (1, True),
        ([], True),
        ({"a": [(1, "b"), None, np.zeros(1)]}, True),
        (torch.zeros(1), False),
        ([[1, 2], {"a": (1, torch.zeros(1))}], False),
        ((1, Counter(1)), False),
        ({"a": nn.Linear(1, 1)}, False),
    ],
)
def test_is_plain(value: Any, plain: bool) -> None:  # noqa: FBT001 - parametrized
    assert is_plain(value) is plain
    assert is_plain([1, (value,)]) is plain
