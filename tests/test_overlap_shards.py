"""Overlapped copies of shards: what a rank has of DTensors holds still until its optimizer steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from process_groups import on_ranks
from programs import Interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


@pytest.fixture(scope="module", params=["foreach=True", "fused=True", "foreach=False"])
def told(
    interpreter: Interpreter, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> list[dict[str, Any]]:
    """What each of two ranks reports of saves during a training with FSDP2."""
    path: Path = tmp_path_factory.mktemp("shards")
    body = f"from sharded_trainings import report\ntold.append(report({request.param}))"
    return [one for (one,) in on_ranks(interpreter, path, body)]


def test_all_large_shards_are_deferred_also_padded_ones(told: list[dict[str, Any]]) -> None:
    assert [one["deferred"] == one["large"] > 0 for one in told] == [True, True]
    assert told[1]["padded"] > 0  # or the test shows less than it says
    assert [one["nothing"] for one in told] == ["True", "True"]


@pytest.mark.parametrize("step", ["step", "step, checksums", "step after all"])
def test_a_step_waits_for_the_copy(told: list[dict[str, Any]], step: str) -> None:
    for one in told:
        assert one[step] == "True"
        assert one[f"{step} fenced"]
        assert one[f"{step} changed"]


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        ("parameter", "0.weight"),
        ("local", "0.weight"),
        ("momentum", "0.weight.exp_avg"),
        ("foreach, checksums", "0.weight"),
    ],
)
def test_a_change_by_hand_tears_the_snapshot(told: list[dict[str, Any]], change: str, entry: str) -> None:
    for one in told:
        assert one[change].startswith(f'state["{entry}"] ')
        assert "call fence() before other changes" in one[change]


def test_versions_do_not_see_operations_on_lists_of_dtensors(told: list[dict[str, Any]]) -> None:
    """If this fails, the documentation of the guard promises too little."""
    for one in told:
        assert one["foreach changed"]
        assert "state[" not in one["foreach"]
