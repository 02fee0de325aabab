"""Report commits and failures of saves to their futures and callbacks, each failure once."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Literal

from asyncckpt.errors import AsyncCkptError, CheckpointExistsError, RankError, SaveError, TornSnapshotError

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._saving.save import Outcome, Save
    from asyncckpt.types import Checkpoint

    OnError = Literal["raise"] | Callable[[Save, AsyncCkptError], object]
    OnCommit = Callable[[Checkpoint], object]

logger = logging.getLogger("asyncckpt")


class Reports:
    """Report commits and failures, and keep failures until they are raised.

    Args:
        on_error: "raise" from the next call, or a callable that is called with the `Save` and the error.
        on_commit: called with each checkpoint, or None.
    """

    def __init__(self, on_error: OnError, on_commit: OnCommit | None) -> None:
        self._on_error = on_error
        self._on_commit = on_commit
        self._lock = threading.RLock()  # a signal handler that saves may interrupt its holder
        self._failures: list[tuple[Outcome[Checkpoint] | None, SaveError]] = []

    def committed(self, save: Save, checkpoint: Checkpoint) -> None:
        """Resolve a save with its checkpoint, and call `on_commit`."""
        stats = save.stats
        _guarded(
            logger.info,
            "%s is durable: %d bytes, stall %.3f s, durable after %.3f s",
            checkpoint.path, stats.nbytes, stats.stall, stats.durable,
        )  # fmt: skip
        _guarded(save.committed.set_result, checkpoint)
        if self._on_commit is not None:
            _guarded(self._on_commit, checkpoint)

    def failed(self, save: Save, error: BaseException) -> None:
        """Resolve a save with its failure, and call `on_error` or keep the failure for the next call."""
        failure = _failure_of(save, error)
        _guarded(partial(logger.error, "%s", failure, exc_info=error))
        if callable(self._on_error):
            save.committed.retrieved = True
            _guarded(save.committed.set_exception, failure)
            _guarded(self._on_error, save, failure)
        else:
            self._keep(failure, save.committed)
            _guarded(save.committed.set_exception, failure)

    def not_evicted(self, checkpoint: Checkpoint, error: BaseException) -> None:
        """Keep a failed eviction after a commit for the next call."""
        _guarded(partial(logger.error, "%s is saved, but eviction failed", checkpoint.path, exc_info=error))
        failure = SaveError(f"{checkpoint.path} is saved, but evicting older checkpoints failed: {error}")
        failure.__cause__ = error
        self._keep(failure, None)

    def has_failures(self) -> bool:
        """Return whether `raise_failures` would raise."""
        with self._lock:
            return any(outcome is None or not outcome.retrieved for outcome, _ in self._failures)

    def raise_failures(self, hint: str = "") -> None:
        """Raise the failures that were neither raised nor retrieved yet, once.

        Raises:
            SaveError: its cause is the first failure, its message lists all of them.
        """
        with self._lock:
            failures = [
                error for outcome, error in self._failures if outcome is None or not outcome.retrieved
            ]
            self._failures.clear()
        if failures:
            raise SaveError("; ".join(map(str, failures)) + hint) from failures[0]

    def _keep(self, failure: SaveError, outcome: Outcome[Checkpoint] | None) -> None:
        with self._lock:
            self._failures.append((outcome, failure))


def _failure_of(save: Save, error: BaseException) -> SaveError:
    if isinstance(error, CheckpointExistsError):
        return error
    what = save.path if save.step is None else f"step {save.step} to {save.path}"
    kind = next((kind for kind in (TornSnapshotError, RankError) if isinstance(error, kind)), SaveError)
    failure = kind(f"saving {what} failed: {error}")
    failure.__cause__ = error
    return failure


def _guarded(func: Callable[..., object], *args: object) -> None:
    """Call a callback, a logging handler or the like; what it raises, SystemExit included, is logged."""
    try:
        func(*args)
    except BaseException:
        with suppress(BaseException):
            logger.exception("a callback of a save failed")
