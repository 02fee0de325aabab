"""What can go wrong, each error also being the built-in one that a caller would catch."""

from __future__ import annotations

import inspect
import logging
import warnings
from pickle import UnpicklingError

logger = logging.getLogger("asyncckpt")


class AsyncCkptError(Exception):
    """Base of every error that asyncckpt raises itself."""


class SaveError(AsyncCkptError):
    """A save did not become a checkpoint; the cause is chained."""


class SaveSkipped(SaveError):  # noqa: N818 - the contract's name: a decision, not a defect
    """A save was not taken, or was replaced while it was queued, because the writer was busy."""


class UnpicklableStateError(SaveError, TypeError):
    """An entry of the state cannot be pickled; the message gives its path."""


class ShardedStateError(SaveError, TypeError):
    """An entry of the state is spread over several ranks; the message gives its path."""


class CorruptCheckpointError(AsyncCkptError, ValueError):
    """A file is not a whole checkpoint: a damaged record, a cut end, or another format."""


class UnsafeStateError(AsyncCkptError, UnpicklingError):
    """`weights_only=True` refuses what a file holds; the message names the entries and their classes."""


class UnloadableStateError(AsyncCkptError, UnpicklingError):
    """A file is whole, but its state cannot be built here; the cause is chained."""


class StateMismatchError(AsyncCkptError, ValueError):
    """A checkpoint does not fit the live state; every misfit is listed and nothing was applied."""


class PartialRestoreError(AsyncCkptError, RuntimeError):
    """A restore failed, and not all could be put back; the message lists what is neither old nor new."""


class CheckpointNotFoundError(AsyncCkptError, FileNotFoundError):
    """No committed checkpoint answers to what was asked for."""


class CheckpointExistsError(SaveError, FileExistsError):
    """A checkpoint of another step already has this name."""


class BusyError(AsyncCkptError, TimeoutError):
    """Pending work did not end within the given time; it goes on."""


class StoreError(AsyncCkptError, OSError):
    """A store refused or failed an operation; the cause is chained."""


class SignalError(AsyncCkptError, ValueError):
    """A signal is not known, or its handler cannot be set here."""


def add_note(error: BaseException, failure: AsyncCkptError) -> None:
    """Log a failure beside an exception of the caller's, which matters more, and note it there."""
    logger.error("while %s was raised: %s", type(error).__name__, failure)
    if hasattr(error, "add_note"):
        error.add_note(f"asyncckpt: {failure}")


def warn_caller(message: str) -> None:
    """Warn with the stack level of the first line outside asyncckpt."""
    level, frame = 2, inspect.currentframe()
    while (frame := frame.f_back if frame else None) and frame.f_globals["__name__"].startswith("asyncckpt."):
        level += 1
    warnings.warn(message, stacklevel=level)
