"""Report how saves ended: to their futures, to callbacks, and each failure once."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Literal

from asyncckpt.errors import AsyncCkptError, CheckpointExistsError, SaveError

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._saving.save import Outcome, Save
    from asyncckpt.types import Checkpoint

    OnError = Literal["raise"] | Callable[[Save, AsyncCkptError], object]
    OnCommit = Callable[[Checkpoint], object]

logger = logging.getLogger("asyncckpt")


class Reports:
    """Reports commits and failures, and keeps the failures that nobody has been given yet.

    Args:
        on_error: "raise" from whichever call comes next, or a callable that is given the `Save` and its
            error.
        on_commit: called with each checkpoint, or None.
    """

    def __init__(self, on_error: OnError, on_commit: OnCommit | None) -> None:
        self._on_error = on_error
        self._on_commit = on_commit
        self._lock = threading.RLock()  # a signal handler may save in the middle of it
        self._failures: list[tuple[Outcome[Checkpoint] | None, SaveError]] = []

    def committed(self, save: Save, checkpoint: Checkpoint) -> None:
        """Resolve a save with its checkpoint, and call back."""
        stats = save.stats
        logger.info(
            "%s is durable: %d bytes, training stood still for %.3f s, durable after %.3f s",
            checkpoint.path, stats.nbytes, stats.stall, stats.durable,
        )  # fmt: skip
        _guarded(save.committed.set_result, checkpoint)
        if self._on_commit is not None:
            _guarded(self._on_commit, checkpoint)

    def failed(self, save: Save, error: BaseException) -> None:
        """Resolve a save with its failure, and call back or keep the failure for the next call."""
        failure = _failure_of(save, error)
        logger.error("%s", failure, exc_info=error)
        if callable(self._on_error):
            save.committed.heard = True
            _guarded(save.committed.set_exception, failure)
            _guarded(self._on_error, save, failure)
        else:
            self._keep(failure, save.committed)
            _guarded(save.committed.set_exception, failure)

    def not_evicted(self, checkpoint: Checkpoint, error: BaseException) -> None:
        """Keep for the next call that a checkpoint is saved, and none could be removed for it."""
        logger.error("%s is saved, but eviction failed", checkpoint.path, exc_info=error)
        failure = SaveError(f"{checkpoint.path} is saved, but older checkpoints were not evicted: {error}")
        failure.__cause__ = error
        self._keep(failure, None)

    def raise_unheard(self, hint: str = "") -> None:
        """Raise what failed since the last time and nobody was given, once.

        Raises:
            SaveError: with the first failure as its cause; the message tells of all.
        """
        with self._lock:
            unheard = [error for outcome, error in self._failures if outcome is None or not outcome.heard]
            self._failures.clear()
        if unheard:
            raise SaveError("; ".join(map(str, unheard)) + hint) from unheard[0]

    def _keep(self, failure: SaveError, outcome: Outcome[Checkpoint] | None) -> None:
        with self._lock:
            self._failures.append((outcome, failure))


def _failure_of(save: Save, error: BaseException) -> SaveError:
    if isinstance(error, CheckpointExistsError):
        return error
    what = save.path if save.step is None else f"step {save.step} to {save.path}"
    failure = SaveError(f"saving {what} failed: {error}")
    failure.__cause__ = error
    return failure


def _guarded(func: Callable[..., object], *args: object) -> None:
    """Call what is the user's; whatever it raises, SystemExit included, must not end the engine."""
    try:
        func(*args)
    except BaseException:
        logger.exception("a callback of a save failed")
