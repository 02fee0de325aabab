"""What a Trainer is doing while it calls a CheckpointIO, which it does not tell it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PACKAGES = ("lightning.pytorch.", "pytorch_lightning.")


def must_be_complete() -> bool:
    """Return whether the save that is being made has to be on disk when the Trainer's call returns.

    It has, outside of a running loop, since nobody waits for it later: programs load what they have just
    saved, and `ddp_spawn` hands its weights over in a file. It has, too, if SLURM is told to requeue the job
    right behind. Saves that come from elsewhere (Fabric, a user's code) go on in the background.
    """
    inside = False
    for function in _callers():
        if function == "_slurm_sigusr_handler_fn":
            return True
        if function == "_run_stage":
            return False
        inside = True
    return inside


def is_requeued() -> bool:
    """Return whether SLURM is told to requeue the job as soon as the save that is being made is done."""
    return "_slurm_sigusr_handler_fn" in _callers()


def is_interrupted() -> bool:
    """Return whether a Trainer is cleaning up behind an exception, which matters more than a failed save."""
    return next((f == "_call_and_handle_interrupt" for f in _callers() if f in _RUNS), False)


def is_preemption(error: BaseException) -> bool:
    """Return whether this is what a Trainer raises in its loop after a SIGTERM."""
    return type(error).__name__ == "SIGTERMException"


_RUNS = {"_run", "_call_and_handle_interrupt"}


def _callers() -> Iterator[str]:
    """Yield the names of the Trainer's own functions that are being called, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_PACKAGES):
            yield frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
