"""Lightning's CheckpointIO plugins, used without a Trainer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peers.base import Peer

if TYPE_CHECKING:
    from lightning.pytorch import plugins


class TorchCheckpointIO(Peer):
    """What a Trainer writes with if it is told nothing else.

    It pickles into memory, writes a file in the system's temporary directory, and moves that.
    """

    name = "Lightning TorchCheckpointIO"
    package = "lightning"
    module = "lightning.pytorch"
    key = "lightning_io"
    blocks = True
    _io: plugins.CheckpointIO

    def start(self, state: Any) -> None:  # noqa: ARG002 - it is not warmed up
        """Make the plugin."""
        self._io = import_module("lightning.pytorch.plugins").TorchCheckpointIO()

    def save(self, state: Any, name: str) -> None:
        """Hand the state to the plugin."""
        self._io.save_checkpoint(state, self.path(name))

    def wait(self) -> None:
        """Do nothing: the file is there."""

    def load(self, name: str, like: Any) -> Any:  # noqa: ARG002 - a file of torch.save needs no pattern
        """Read the file."""
        return self._io.load_checkpoint(self.path(name), weights_only=True)

    def close(self) -> None:
        """End the plugin."""
        self._io.teardown()


class AsyncCheckpointIO(TorchCheckpointIO):
    """The plugin that writes in a thread, around the other one; its queue has no bound."""

    name = "Lightning AsyncCheckpointIO"
    key = "lightning_async"
    blocks = False
    _io: plugins.AsyncCheckpointIO

    def start(self, state: Any) -> None:
        """Make both plugins."""
        super().start(state)
        self._io = import_module("lightning.pytorch.plugins").AsyncCheckpointIO(self._io)

    def wait(self) -> None:
        """Wait for its thread."""
        # To tear it down would wait as well, but cost the next save a new thread. That one thread takes what
        # is submitted in order, so this comes after all that was saved.
        if self._io._executor is not None:
            self._io._executor.submit(int).result()
        if self._io._error is not None:
            raise self._io._error
