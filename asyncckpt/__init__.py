"""Save PyTorch checkpoints in the background: training stops only while tensors are copied to host memory."""

from __future__ import annotations

import logging

from asyncckpt._saving.engine import Statistics, release, set_memory_limit, statistics
from asyncckpt._saving.save import Save
from asyncckpt._version import __version__
from asyncckpt.checkpointer import Checkpointer
from asyncckpt.errors import (
    AsyncCkptError,
    BusyError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    PartialRestoreError,
    SaveError,
    SaveSkipped,
    ShardedStateError,
    SignalError,
    StateMismatchError,
    StoreError,
    UnloadableStateError,
    UnpicklableStateError,
    UnsafeStateError,
)
from asyncckpt.functions import load, save, wait
from asyncckpt.random_state import RandomState
from asyncckpt.retention import BestK, EveryN, KeepAll, LastN, Policy
from asyncckpt.signals import StopOnSignal
from asyncckpt.types import Checkpoint, SaveStats

__all__ = [
    "AsyncCkptError",
    "BestK",
    "BusyError",
    "Checkpoint",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "Checkpointer",
    "CorruptCheckpointError",
    "EveryN",
    "KeepAll",
    "LastN",
    "PartialRestoreError",
    "Policy",
    "RandomState",
    "Save",
    "SaveError",
    "SaveSkipped",
    "SaveStats",
    "ShardedStateError",
    "SignalError",
    "StateMismatchError",
    "Statistics",
    "StopOnSignal",
    "StoreError",
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

logging.getLogger("asyncckpt").addHandler(logging.NullHandler())
