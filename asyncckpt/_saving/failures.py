"""What failed in the background: said in a way that a user can act on, and heard once."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from asyncckpt.errors import CheckpointExistsError, SaveError

if TYPE_CHECKING:
    from asyncckpt._saving.save import Outcome, Save
    from asyncckpt.types import Checkpoint


class Failures:
    """The failures that nobody may have heard of yet."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may save in the middle of it
        self._failures: list[tuple[Outcome[Checkpoint] | None, SaveError]] = []

    def add(self, failure: SaveError, outcome: Outcome[Checkpoint] | None = None) -> None:
        """Note a failure; whoever asks the outcome before has heard it."""
        with self._lock:
            self._failures.append((outcome, failure))

    def raise_unheard(self, hint: str = "") -> None:
        """Raise what failed since the last time and nobody was told, once.

        Raises:
            SaveError: with the first failure as its cause; the message tells of all.
        """
        with self._lock:
            unheard = [error for outcome, error in self._failures if outcome is None or not outcome.heard]
            self._failures.clear()
        if unheard:
            raise SaveError("; ".join(map(str, unheard)) + hint) from unheard[0]


def failure_of(save: Save, error: BaseException) -> SaveError:
    """Return what the user is told of a save that failed."""
    if isinstance(error, CheckpointExistsError):
        return error
    what = save.path if save.step is None else f"step {save.step} to {save.path}"
    failure = SaveError(f"saving {what} failed: {error}")
    failure.__cause__ = error
    return failure


def eviction_failure(checkpoint: Checkpoint, error: BaseException) -> SaveError:
    """Return what the user is told where a checkpoint is saved, but none could be removed for it."""
    failure = SaveError(f"{checkpoint.path} is saved, but older checkpoints were not evicted: {error}")
    failure.__cause__ = error
    return failure
