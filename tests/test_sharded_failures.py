"""Saves of all ranks of which one fails, hangs or does something else: all hear of it, nothing is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from process_groups import MODULES, on_ranks
from programs import Interpreter

if TYPE_CHECKING:
    from pathlib import Path

FULL = "No space left on device"
# The rank that raises an error of its own, and what all of them say.
EXPECTED = {
    **{f"rank {rank} raises": (rank, "broken") for rank in range(3)},
    "rank 1 cannot pickle": (1, "rank_state.1.x: state: cannot pickle"),
    "list fails on rank 0": (0, FULL),
    "folder_draft fails on rank 0": (0, FULL),
    "write fails on rank 0": (0, FULL),
    "commit_folder fails on rank 0": (0, FULL),
    "join_folder fails on rank 1": (1, FULL),
    "draft fails on rank 1": (1, FULL),
    "write fails on rank 2": (2, FULL),
    "commit fails on rank 2": (2, FULL),
    "the disk of rank 1 is full": (1, "the file is larger than"),
    "rank 2 has no memory": (2, "exceeds the limit of 1 bytes"),
    "the directory is not shared": (None, "the directory is not shared by the hosts"),
    "rank 1 saves another step": (None, "rank 1 save(9) as step-00000009"),
    "rank 1 lacks a shard": (0, "own is a sharded tensor of shape (9, 5)"),
    "rank 2 has another shape": (0, "but a tensor of shape (3,) and torch.float32 on rank 2"),
    "rank 0 has another type": (0, "x is a tensor of shape (2,) and torch.float32 on rank 0, but"),
    "rank 1 has an object": (0, "x is a tensor of shape (2,) and torch.float32 on rank 0, but an object"),
    "a failure is not asked for": (None, FULL),
    "rank 1 hangs": (None, "rank 1 had not written its part when rank"),
    "rank 0 hangs": (None, "rank 0 had not begun to write when rank"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks sees of each case."""
    path: Path = tmp_path_factory.mktemp("failures")
    body = "from sharded_failures import told_of\ntold.append(told_of(directory))"
    with Interpreter(*MODULES) as interpreter:
        return [seen for (seen,) in on_ranks(interpreter, path, body, 3, store="tcp")]


@pytest.mark.parametrize("case", EXPECTED)
def test_all_ranks_raise_what_failed_at_once(told: list[dict[str, Any]], case: str) -> None:
    own, text = EXPECTED[case]
    for rank, seen in enumerate(told):
        kind, message = seen[case]["error"]
        assert text in message
        if own is not None and rank != own:
            assert kind == "RankError"
            assert f"rank {own}: " in message or f"rank {own} gave up (" in message
        assert seen[case]["seconds"] < 30  # and not the minute that ranks wait for one that is silent


@pytest.mark.parametrize("rank", [0, 2])
def test_ranks_that_save_name_the_one_that_does_not(told: list[dict[str, Any]], rank: int) -> None:
    for other, cases in enumerate(told):
        seen = cases[f"rank {rank} does not call"]
        if other == rank:
            assert seen["error"] is None
        else:
            assert seen["error"][0] == "RankError"
            assert seen["error"][1].startswith(f"rank {rank} did not take part in save(2)")


def test_a_rank_may_be_slow_until_the_deadline(told: list[dict[str, Any]]) -> None:
    assert [seen["rank 1 is slow"]["error"] for seen in told] == [None] * 3


def test_checkpoints_stay_and_the_next_save_works_and_nothing_leaks(told: list[dict[str, Any]]) -> None:
    assert len(told[0]) == len(EXPECTED) + 3
    for cases in told:
        assert {case: seen["wrong"] for case, seen in cases.items() if seen["wrong"]} == {}
