"""Flattened states: the same as by the installed DCP, and a fingerprint that tells layouts apart."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from asyncckpt._sharding.fingerprint import fingerprint
from asyncckpt._sharding.flatten import flatten
from asyncckpt._sharding.planning import LocalPlan
from asyncckpt.errors import SaveError

_TENSOR = torch.ones(2)
_KEYS = st.sampled_from(["a", "b", "a.b", "0", 0, 1, None])
_VALUES: list[Any] = [_TENSOR, 1, "x", None, np.ones(1), (1, _TENSOR), ({},), {1}, torch.Size([1]), b""]
_LEAVES = st.sampled_from(_VALUES)


def _containers(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.dictionaries(_KEYS, parts, max_size=4),
        st.dictionaries(_KEYS, parts, max_size=2).map(OrderedDict),
        st.lists(parts, max_size=4),
        st.lists(parts, max_size=2).map(tuple),
    )


@settings(max_examples=400)
@given(st.dictionaries(_KEYS, st.recursive(_LEAVES, _containers, max_leaves=12), max_size=5))
def test_flattening_is_that_of_dcp(state: dict[Any, Any]) -> None:
    planner = DefaultSavePlanner()
    ours = flatten(state)
    try:
        planner.set_up_planner(state)
    except ValueError:  # two entries with the same key
        assert ours is None
        return
    assert ours is not None
    flat, paths = ours
    assert list(flat) == list(planner.state_dict)
    assert all(flat[key] is value for key, value in planner.state_dict.items())
    assert list(paths.items()) == list(planner.mappings.items())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.b": 1, "a": {"b": 2}}, 'state["a.b"] and state["a"]["b"] have the same key \'a.b\''),
        ({1: 1, "1": 2}, "state[1] and state[\"1\"] have the same key '1'"),
        ({"a": [_TENSOR, _TENSOR], "a.1": 3}, 'state["a"][1] and state["a.1"] have the same key \'a.1\''),
    ],
)
def test_entries_with_the_same_key_are_refused(state: dict[Any, Any], message: str) -> None:
    with pytest.raises(SaveError) as caught:
        LocalPlan(state)
    assert message in str(caught.value)


def test_fingerprint_tells_layouts_apart_and_is_equal_otherwise() -> None:
    def of(state: dict[str, Any]) -> Any:
        return LocalPlan(state).fingerprint

    base = {"a": torch.ones(2, 3), "b": 1, "c": {"d": torch.ones(1)}}
    others: list[dict[str, Any]] = [
        {**base, "a": torch.ones(3, 2)},
        {**base, "a": torch.ones(2, 3).double()},
        {**base, "a": 1},
        {**base, "b": torch.ones(())},
        {**base, "e": 1},
        {"a": base["a"], "b": 1},
        {"b": 1, "a": base["a"], "c": base["c"]},
        {"a": base["a"], "b": 1, "c.d": torch.ones(1)},
    ]
    prints = [of(base), *map(of, others)]
    assert all(prints[i] != prints[j] for i in range(len(prints)) for j in range(i))
    same = {"a": torch.zeros(2, 3).requires_grad_(), "b": "x", "c": {"d": torch.nn.Parameter(torch.zeros(1))}}
    assert of(same) == of(base)


def test_fingerprint_of_a_tensor_that_plans_itself_has_its_chunks() -> None:
    class Chunked(torch.Tensor):
        at = 0

        def __create_write_items__(self, fqn: str, value: object) -> list[Any]:
            raise NotImplementedError

        def __create_chunk_list__(self) -> list[Any]:
            from torch.distributed.checkpoint.metadata import ChunkStorageMetadata  # noqa: PLC0415

            return [ChunkStorageMetadata(torch.Size([self.at]), torch.Size([2]))]

    def at(offset: int) -> Any:
        chunked = torch.ones(2).as_subclass(Chunked)
        chunked.at = offset
        return fingerprint({"a": chunked}, {})

    assert at(0) == at(0)
    assert at(0) != at(2)
