"""Each option of a Checkpointer with saves of all ranks: all ranks stay in step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from process_groups import MODULES, on_ranks
from programs import Interpreter

if TYPE_CHECKING:
    from pathlib import Path

# What both ranks return.
EXPECTED: dict[str, Any] = {
    "skips": [[False, True, False], [1, 3]],
    "waits": [[False, False], [1, 2, 3]],
    "policies": [[1, 2, 4], 1, ["step-00000001", "step-00000002", "step-00000004"]],
    "due": [[4, 8], True],
    "awaited": [1, 2],
    "forked": [0, [1]],
    "changing": [[True] * 5, [0, 1, 2, 3, 4], ["None", "text"]],
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks returns of each case."""
    path: Path = tmp_path_factory.mktemp("options")
    body = "from sharded_options import told_of\ntold.append(told_of(directory))"
    with Interpreter(*MODULES) as interpreter:
        return [seen for (seen,) in on_ranks(interpreter, path, body, store="tcp")]


@pytest.mark.parametrize("case", EXPECTED)
def test_all_ranks_do_the_same(told: list[dict[str, Any]], case: str) -> None:
    assert [seen[case] for seen in told] == [EXPECTED[case]] * 2


def test_a_step_is_replaced_by_itself_and_by_another_if_allowed(told: list[dict[str, Any]]) -> None:
    for seen, kind in zip(told, ["CheckpointExistsError", "RankError"], strict=True):
        assert seen["again"] == [[2], kind, True, [3], ["last"]]


def test_overlapped_saves_have_the_state_of_their_instant_and_all_hear_of_a_torn_one(
    told: list[dict[str, Any]],
) -> None:
    for seen, torn in zip(told, [["RankError", True], ["TornSnapshotError", False]], strict=True):
        assert seen["overlapped"] == [[True] * 3, [True] * 4, torn, [0, 1, 2, 3]]
