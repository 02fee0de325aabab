"""torch.distributed.checkpoint's saves, in the process group there is, or in one of this process alone.

As its tutorial has it, a save waits for the one before. The writer is `FileSystemWriter` as it comes: one
synced file for each rank, written by one thread, since errors of the others would be lost.

What comes back has the structure of the state that it is loaded into: tensors are filled in place, tied ones
were stored twice, and values that are no tensors are replaced by those of the file.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, ClassVar

import torch

from peers.base import FuturePeer, empty_like, share_by_name


def _kept(stager: Any) -> Any:
    """Let a DefaultStager keep its memory from save to save.

    That of torch 2.11 closes its inner stager after each save: its memory is lost, and so is its table of
    types, and the next save fails with `KeyError: <class 'type'>`.
    """
    stager._state_dict_stager.close = lambda: None
    return stager


def _end(stager: Any) -> None:
    """Close what `_kept` has returned."""
    del stager._state_dict_stager.close  # that of its class is back
    stager.close()


class ThreadSaver(FuturePeer):
    """Stages into new memory each time, and writes in a thread: what async_save does if told nothing."""

    name = "DCP async_save, thread"
    package = "torch"
    module = "torch.distributed.checkpoint"
    key = "dcp_thread"
    executor: ClassVar[str] = "THREAD"
    _checkpoint: Any
    _distributed: Any
    _is_alone: bool
    _staging: dict[str, Any]

    def start(self, state: Any) -> None:  # noqa: ARG002 - it is not warmed up
        """Make a group of this process alone, unless there is one."""
        self._checkpoint = import_module("torch.distributed.checkpoint")
        self._distributed = import_module("torch.distributed")
        self._is_alone = not self._distributed.is_initialized()
        if self._is_alone:
            store = self._distributed.HashStore()
            self._distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        self._staging = {}

    def save(self, state: Any, name: str) -> None:
        """Wait for the save before, stage the state, and have it written."""
        self.wait()
        executors = self._checkpoint.state_dict_saver.AsyncCheckpointerType
        self.pending = self._checkpoint.async_save(
            state,
            checkpoint_id=self.path(name),
            async_checkpointer_type=executors[self.executor],
            **self._staging,
        )

    def load(self, name: str, like: Any) -> Any:
        """Fill fresh tensors; objects with a `load_state_dict` are filled themselves."""
        state = empty_like(like)
        self._checkpoint.load(state, checkpoint_id=self.path(name))
        return state

    def close(self) -> None:
        """Give up what stages, and the group that `start` made."""
        for stager in self._staging.values():
            _end(stager)
        if self._is_alone:
            self._distributed.destroy_process_group()


class CachedSaver(ThreadSaver):
    """Stages into memory that is kept, pinned where there is a GPU."""

    name = "DCP async_save, cached stager"
    key = "dcp_cached"
    shared: ClassVar[bool] = False

    def start(self, state: Any) -> None:
        """Make the group if there is none, and the stager that is kept."""
        super().start(state)
        staging = import_module("torch.distributed.checkpoint.staging")
        cuda = torch.cuda.is_available()
        # A loop has to wait for asynchronous staging before its next step: the save itself does so here.
        options = staging.StagingOptions(
            use_pinned_memory=cuda,
            use_shared_memory=self.shared,
            use_async_staging=False,
            use_non_blocking_copy=cuda,
        )
        self._staging = {"async_stager": _kept(staging.DefaultStager(options))}


class ProcessSaver(CachedSaver):
    """Stages into shared memory that is kept, and writes in a process, which the first save starts."""

    name = "DCP async_save, process"
    key = "dcp_process"
    executor = "PROCESS"
    shared = True

    def start(self, state: Any) -> None:
        """Make group and stager, and say where the process finds this one."""
        share_by_name()
        os.environ.setdefault("MASTER_ADDR", "localhost")
        super().start(state)
