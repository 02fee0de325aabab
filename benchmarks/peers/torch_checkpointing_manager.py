"""torch_checkpointing's CheckpointManager: a pool of shared buffers, and a process that writes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from peers.base import FuturePeer, share_by_name


class Manager(FuturePeer):
    """One save at a time; a checkpoint is a directory with a file of torch.save for each item of the state.

    The process that writes imports the main module again: it has to be guarded by its name.
    """

    name = "torch_checkpointing CheckpointManager"
    package = "torch_checkpointing"
    module = "torch_checkpointing"
    key = "torch_checkpointing"
    _manager: Any

    def start(self, state: Any) -> None:
        """Start the writing process, and make the buffers ready."""
        share_by_name()
        package = import_module("torch_checkpointing")
        storage = import_module("torch_checkpointing.storage.filesystem")
        # Its direct writes come from unaligned memory, which ext4 refuses.
        files = storage.LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = package.CheckpointManager.Config(storage_config=files).build()
        self._manager.prewarm_staging(state)
        # Both are under way, and a training loop would be at its first steps: nothing public waits for them.
        self._manager._prewarm_staging_future.result()
        self._manager._saver._checkpoint_process._creation_future.result()

    def save(self, state: Any, name: str) -> None:
        """Save, and wait where a loop would wait before the next step of its optimizer."""
        self.pending = self._manager.save(str(self.path(name)), state)
        with self._manager.lock():
            pass

    def load(self, name: str, like: Any) -> Any:
        """Read all items of the state as they are."""
        return dict(self._manager.load(str(self.path(name)), dict.fromkeys(like), strict=True))

    def close(self) -> None:
        """End the process."""
        self._manager.close()
