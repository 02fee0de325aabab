"""Save PyTorch checkpoints in the background: training stops only while tensors are copied to host memory."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from asyncckpt import _at_exit  # noqa: F401 - registers a hook
from asyncckpt._version import __version__
from asyncckpt.errors import (
    AsyncCkptError,
    BusyError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    PartialRestoreError,
    RankError,
    SaveError,
    SaveSkipped,
    ShardedStateError,
    SignalError,
    StateMismatchError,
    StoreError,
    TornSnapshotError,
    UnloadableStateError,
    UnpicklableStateError,
    UnsafeStateError,
)
from asyncckpt.retention import BestK, EveryN, KeepAll, LastN, Policy
from asyncckpt.schedule import Budget, Every, Schedule
from asyncckpt.signals import StopOnSignal
from asyncckpt.types import Checkpoint, SaveStats, Statistics

if TYPE_CHECKING:
    from asyncckpt._saving.engine import release, set_memory_limit, statistics
    from asyncckpt._saving.save import Save
    from asyncckpt.checkpointer import Checkpointer
    from asyncckpt.functions import load, save, wait
    from asyncckpt.random_state import RandomState

__all__ = [
    "AsyncCkptError",
    "BestK",
    "Budget",
    "BusyError",
    "Checkpoint",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "Checkpointer",
    "CorruptCheckpointError",
    "Every",
    "EveryN",
    "KeepAll",
    "LastN",
    "PartialRestoreError",
    "Policy",
    "RandomState",
    "RankError",
    "Save",
    "SaveError",
    "SaveSkipped",
    "SaveStats",
    "Schedule",
    "ShardedStateError",
    "SignalError",
    "StateMismatchError",
    "Statistics",
    "StopOnSignal",
    "StoreError",
    "TornSnapshotError",
    "UnloadableStateError",
    "UnpicklableStateError",
    "UnsafeStateError",
    "__version__",
    "load",
    "release",
    "save",
    "set_memory_limit",
    "statistics",
    "wait",
]

# Imported on first use: the import of torch takes a second, and most shell commands do without it.
_NEED_TORCH = {
    "Checkpointer": "checkpointer",
    "RandomState": "random_state",
    "Save": "_saving.save",
    "load": "functions",
    "release": "_saving.engine",
    "save": "functions",
    "set_memory_limit": "_saving.engine",
    "statistics": "_saving.engine",
    "wait": "functions",
}


_MODULES = frozenset({"checkpointer", "functions", "random_state", "stores"})

if not TYPE_CHECKING:  # for a type checker, every name would exist

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name not in _NEED_TORCH:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NEED_TORCH, *_MODULES})


logging.getLogger("asyncckpt").addHandler(logging.NullHandler())
