"""Ranks that are killed while all save: the others name them, and the next run has a whole checkpoint."""

from __future__ import annotations

import json
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from process_groups import MODULES, start_ranks
from programs import Interpreter
from rank_threads import tcp_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RANKS = 3
TIMEOUT = 3.0  # seconds that ranks wait for each other


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter(*MODULES) as interpreter:
        yield interpreter


def run_until_killed(interpreter: Interpreter, tmp_path: Path, seed: int, last: int) -> int:
    """Kill a rank of a run that saves; return the last step that one of the others knows to be committed.

    Args:
        interpreter: starts the ranks.
        tmp_path: where the checkpoints are.
        seed: chooses the rank, the moment, and where the store of the group is.
        last: the last step that is known to be committed.
    """
    chance = random.Random(seed)
    victim, seconds, kind = (
        chance.randrange(RANKS),
        chance.uniform(0, 0.4),
        chance.choice(["file", "tcp", ""]),
    )
    hosted = None if kind else tcp_store()
    (tmp_path / "run-group").unlink(missing_ok=True)
    body = f"from sharded_kills import train\ntrain(directory, {seed}, {TIMEOUT})"
    ranks = start_ranks(interpreter, tmp_path, body, RANKS, store=kind or str(hosted.port))
    began = [int(rank.line()) for rank in ranks]
    assert len(set(began)) == 1
    assert began[0] >= last
    threading.Event().wait(seconds)  # the moment is any
    ranks[victim].kill()
    ends = [rank.end() for rank in ranks]
    assert ends[victim][0] == -signal.SIGKILL
    for other, (status, output, errors) in enumerate(ends):
        if other == victim:
            continue
        assert status == 0, errors
        error, text, waited, committed = json.loads(output)
        assert error == "RankError", (seed, text)
        named = f"rank {victim} " in text or ("the store" in text and kind == "tcp" and victim == 0)
        assert named, (seed, victim, text)
        assert waited < 5 * TIMEOUT
        last = max(last, committed)
    return last


def chain(interpreter: Interpreter, tmp_path: Path, seeds: range) -> None:
    """Let run after run go on from what the one before has left."""
    tmp_path.mkdir(exist_ok=True)
    last = 0
    for seed in seeds:
        last = run_until_killed(interpreter, tmp_path, seed, last)
    assert last > 0


def test_killed_ranks_are_named_and_committed_steps_stay(interpreter: Interpreter, tmp_path: Path) -> None:
    chain(interpreter, tmp_path, range(4))


@pytest.mark.slow
def test_killed_ranks_many_times(interpreter: Interpreter, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        chains = [
            threads.submit(chain, interpreter, tmp_path / f"{start}", range(start, start + 25))
            for start in range(1000, 1100, 25)
        ]
        for future in chains:
            future.result()
