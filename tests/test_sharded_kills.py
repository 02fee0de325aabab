"""Ranks that are killed while all save: the others name them, and the next run has a whole checkpoint."""

from __future__ import annotations

import json
import random
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from process_groups import MODULES, start_ranks
from programs import Interpreter
from rank_threads import tcp_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RANKS = 3
TIMEOUT = 4.0  # seconds that ranks wait for each other


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter(*MODULES) as interpreter:
        yield interpreter


class Run:
    """A run of several ranks that save until one of them is killed.

    Args:
        interpreter: starts the ranks.
        tmp_path: where the checkpoints are.
        seed: chooses the rank, the moment, and where the store of the group is.
    """

    def __init__(self, interpreter: Interpreter, tmp_path: Path, seed: int) -> None:
        chance = random.Random(seed)
        self.seed = seed
        self.victim, self.seconds = chance.randrange(RANKS), chance.uniform(0, 0.4)
        self.kind = chance.choice(["file", "tcp", "elsewhere"])
        self.hosted = tcp_store()
        tmp_path.mkdir(exist_ok=True)
        (tmp_path / "run-group").unlink(missing_ok=True)
        body = f"from sharded_kills import train\ntrain(directory, {seed}, {TIMEOUT})"
        store = str(self.hosted.port) if self.kind == "elsewhere" else self.kind
        self.ranks = start_ranks(interpreter, tmp_path, body, RANKS, store=store)

    def kill(self, last: int) -> None:
        """Kill a rank, at any moment; `last` is the last step that is known to be committed."""
        began = [int(rank.line()) for rank in self.ranks]
        assert len(set(began)) == 1
        assert began[0] >= last
        threading.Event().wait(self.seconds)
        self.ranks[self.victim].kill()

    def end(self) -> int:
        """Wait for the other ranks; return the last step that one of them knows to be committed."""
        ends = [rank.end() for rank in self.ranks]
        assert ends.pop(self.victim)[0] == -signal.SIGKILL
        last = 0
        for status, output, errors in ends:
            assert status == 0, errors
            error, text, waited, committed = json.loads(output)
            hosted_store = self.kind == "tcp" and self.victim == 0 and "the store of the process" in text
            assert f"rank {self.victim} " in text or hosted_store, (self.seed, self.victim, text)
            assert error == "RankError"
            assert waited < 5 * TIMEOUT
            last = max(last, committed)
        return last


def kill_again_and_again(interpreter: Interpreter, tmp_path: Path, times: int, beside: int) -> None:
    """Let run after run go on from what the one before has left; so many of them go on side by side."""
    lasts = [0] * beside
    for number in range(times):
        runs = [Run(interpreter, tmp_path / f"{one}", times * one + number) for one in range(beside)]
        for run, last in zip(runs, lasts, strict=True):
            run.kill(last)
        lasts = [max(run.end(), last) for run, last in zip(runs, lasts, strict=True)]
    assert min(lasts) > 0


def test_killed_ranks_are_named_and_committed_steps_stay(interpreter: Interpreter, tmp_path: Path) -> None:
    kill_again_and_again(interpreter, tmp_path, 2, 3)


@pytest.mark.soak
def test_ranks_killed_a_hundred_times(interpreter: Interpreter, tmp_path: Path) -> None:
    kill_again_and_again(interpreter, tmp_path, 20, 5)
