"""States that are not sharded, on several ranks: one writes the files, all know what became of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from process_groups import MODULES, on_ranks
from programs import Interpreter

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks sees of each case."""
    path: Path = tmp_path_factory.mktemp("files")
    body = "from one_writer_cases import told_of\ntold.append(told_of(directory))"
    with Interpreter(*MODULES) as interpreter:
        return [seen for (seen,) in on_ranks(interpreter, path, body, 3, store="tcp")]


def test_all_ranks_get_the_results_of_rank_0_and_restore_its_files(told: list[dict[str, Any]]) -> None:
    expected = [[[step, 1.0, step] for step in range(1, 8)], [0.0] * 3, 7]
    assert [seen["results"] for seen in told] == [expected] * 3


def test_all_ranks_hear_of_failures_and_the_next_save_works(told: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(told):
        (written, second, raised, fourth), listed = seen["failures"]
        assert written[0] == raised[0] == "SaveError" if rank else raised[0] == "UnpicklableStateError"
        assert "No space left on device" in written[1]
        assert 'state["w"]: cannot pickle' in raised[1]
        assert [second, fourth] == [2, 4]
        assert listed == [2, 4]


def test_what_the_writer_skips_is_skipped_on_all_ranks(told: list[dict[str, Any]]) -> None:
    assert [seen["skips"] for seen in told] == [[[1, 3], True]] * 3


def test_the_only_rank_with_a_checkpointer_writes(told: list[dict[str, Any]]) -> None:
    assert [seen["alone"] for seen in told] == [None, [[1, 2], [1.0] * 3], None]


def test_ranks_with_names_of_their_own_save_for_themselves(told: list[dict[str, Any]]) -> None:
    assert [seen["apart"] for seen in told] == [[[float(rank)] * 3, [2 + rank]] for rank in range(3)]


def test_a_rank_whose_tensors_are_not_in_the_file_raises(told: list[dict[str, Any]]) -> None:
    assert [seen["lacking"] for seen in told[:2]] == [1, 1]
    kind, message = told[2]["lacking"]
    assert kind == "RankError"
    assert "its state lacks state['more']['only0']" in message
    assert "and 2 more of rank 2" in message
    assert "sharded=True" in message


def test_steps_that_differ_and_saves_without_the_writer_are_errors(told: list[dict[str, Any]]) -> None:
    assert told[0]["differing"] == [1]
    assert told[1]["differing"][0] == 1
    assert (
        "rank 2 saved step 2 where rank 0, which writes the files, saved step 1" in told[2]["differing"][0][1]
    )
    for seen in told[1:]:
        kind, message = seen["differing"][1]
        assert kind == "RankError"
        assert (
            "rank 0, which writes the files of this series, has told nothing of its save of step 3" in message
        )
