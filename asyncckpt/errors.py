"""Errors; each derives from the built-in class that a caller would catch."""

from __future__ import annotations

import inspect
import logging
import warnings
from pickle import UnpicklingError

logger = logging.getLogger("asyncckpt")


class AsyncCkptError(Exception):
    """Base class of the errors of asyncckpt."""


class SaveError(AsyncCkptError):
    """A save did not become a checkpoint; the cause is chained."""


class SaveSkipped(SaveError):  # noqa: N818 - a public name; it reports a decision, not an error
    """A save was skipped, or replaced while it was queued, because earlier saves were pending."""


class UnpicklableStateError(SaveError, TypeError):
    """An entry of the state cannot be pickled; the message gives its path."""


class ShardedStateError(SaveError, TypeError):
    """An entry of the state is sharded over several ranks; the message gives its path."""


class TornSnapshotError(SaveError, RuntimeError):
    """A tensor changed before its overlapped copy was finished; the message names it and the remedy."""


class RankError(SaveError, RuntimeError):
    """A rank failed, or did not answer in time, so that a save of many ranks was given up; names the rank."""


class CorruptCheckpointError(AsyncCkptError, ValueError):
    """A file is not a whole checkpoint: it has a damaged record, is truncated, or has another format."""


class UnsafeStateError(AsyncCkptError, UnpicklingError):
    """`weights_only=True` refuses entries of a file; the message names them and their classes."""


class UnloadableStateError(AsyncCkptError, UnpicklingError):
    """A file is whole, but its state cannot be built here; the cause is chained."""


class StateMismatchError(AsyncCkptError, ValueError):
    """A checkpoint does not fit the live state; the message lists every mismatch, nothing was changed."""


class PartialRestoreError(AsyncCkptError, RuntimeError):
    """A restore failed and was not undone completely; the message lists the inconsistent entries."""


class CheckpointNotFoundError(AsyncCkptError, FileNotFoundError):
    """There is no such committed checkpoint."""


class CheckpointExistsError(SaveError, FileExistsError):
    """A checkpoint of another step already has this name."""


class BusyError(AsyncCkptError, TimeoutError):
    """Pending work did not end in time, and continues; or a call would wait for itself."""


class StoreError(AsyncCkptError, OSError):
    """A store refused or failed an operation; the cause is chained."""


class SignalError(AsyncCkptError, ValueError):
    """A signal is unknown, or its handler cannot be set on this thread."""


def add_note(error: BaseException, failure: AsyncCkptError) -> None:
    """Log a failure, and add it as a note to the caller's exception, which is the one raised."""
    logger.error("while %s was raised: %s", type(error).__name__, failure)
    if hasattr(error, "add_note"):
        error.add_note(f"asyncckpt: {failure}")


def warn_caller(message: str) -> None:
    """Warn with the stack level of the first line outside asyncckpt."""
    level, frame = 2, inspect.currentframe()
    while (frame := frame.f_back if frame else None) and frame.f_globals["__name__"].startswith("asyncckpt."):
        level += 1
    warnings.warn(message, stacklevel=level)
