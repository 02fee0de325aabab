"""The law: what loads is what torch.save had written at the moment of the save, whatever changes after it."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import asyncckpt
from asyncckpt import Checkpointer, SaveError
from sameness import assert_same
from states import change_all, states
from support import torch_round_trip

if TYPE_CHECKING:
    from pathlib import Path

# torch's own, when a state holds such things.
pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*ComplexHalf support is experimental:UserWarning"),
]


def law(examples: int) -> settings:
    lenient = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, suppress_health_check=lenient)


def expected_of(state: object) -> Any:
    """Return what torch makes of a state, or its refusal of two dtypes on one storage."""
    try:
        return torch_round_trip(state)
    except RuntimeError as error:
        assert "view the same data as different types" in str(error)  # noqa: PT017 - anything else is a bug of the test
        return error


@law(200)
@given(state=states())
def test_what_loads_is_what_torch_save_would_have_written(state: Any, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    expected = expected_of(state)
    if isinstance(expected, RuntimeError):
        with pytest.raises(SaveError, match="view the same storage"):
            asyncckpt.save(state, path)
        return
    save = asyncckpt.save(state, path)
    change_all(state)
    save.committed.result()
    assert_same(torch.load(path, weights_only=False), expected)
    assert_same(asyncckpt.load(path, weights_only=False), expected)


@law(40)
@given(
    made=st.lists(states(), min_size=2, max_size=4), order=st.lists(st.integers(0, 3), min_size=3, max_size=6)
)
def test_it_holds_for_each_of_several_saves_one_after_the_other(
    made: list[Any], order: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    # What is kept from one save to the next must never show, also where a state comes back.
    with Checkpointer(tmp_path_factory.mktemp("run"), max_in_flight=2) as checkpointer:
        expected = {}
        for step, index in enumerate(order):
            state = [made[index % len(made)]]
            expected[step] = expected_of(state)
            if isinstance(expected[step], RuntimeError):
                del expected[step]
            else:
                checkpointer.save(step, state)
        for state in made:
            change_all(state)
        for step, state in expected.items():
            assert_same(checkpointer.load(step, weights_only=False), state)


def test_the_comparison_sees_differences() -> None:
    base = torch.arange(6.0)
    shared = [base, base[1:]]
    for other in (
        [base, base[1:].clone()],
        [base, base[2:]],
        [base.double(), base.double()[1:]],
        [base, base[1:], None],
        [torch.nn.Parameter(base), base[1:]],
    ):
        with pytest.raises(AssertionError):
            assert_same(other, shared)
    one: list[int] = []
    with pytest.raises(AssertionError, match="is two in the other"):
        assert_same([one, one], [[], []])
    with pytest.raises(AssertionError, match="are one in the other"):
        assert_same([[], []], [one, one])
    assert_same(pickle.loads(pickle.dumps([one, one])), [one, one])


def test_changing_all_changes_all() -> None:
    base = torch.arange(4.0)
    state = {"a": base, "b": [base[1:], {"c": {1}}], "d": torch.nn.Parameter(torch.ones(2))}
    before, parameter, inner = base.clone(), state["d"], state["b"]
    change_all(state)
    assert not state
    assert isinstance(inner, list)
    assert inner[1] == {}
    assert isinstance(parameter, torch.nn.Parameter)
    assert not torch.equal(parameter.detach(), torch.ones(2))
    assert base.numel() == 3
    assert before.numel() == 4
