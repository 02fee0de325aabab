"""torchsnapshot's Snapshot.async_take."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from peers.base import Peer, empty_like


class AsyncTake(Peer):
    """Returns when the state is in host memory; writes a directory with a file for each tensor."""

    name = "torchsnapshot async_take"
    package = "torchsnapshot"
    module = "torchsnapshot"
    key = "torchsnapshot"
    blocks = False
    _pending: Any = None
    _package: Any

    def start(self, state: Any) -> None:  # noqa: ARG002 - it is not warmed up
        """Import the package."""
        self._package = import_module("torchsnapshot")

    def save(self, state: Any, name: str) -> None:
        """Wait for the save before, and take a snapshot."""
        self.wait()
        taken = {"state": self._package.StateDict(**state)}
        self._pending = self._package.Snapshot.async_take(str(self.path(name)), taken)

    def wait(self) -> None:
        """Wait for the snapshot under way, if there is one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def load(self, name: str, like: Any) -> Any:
        """Fill fresh tensors."""
        state = self._package.StateDict(**empty_like(like))
        self._package.Snapshot(str(self.path(name))).restore({"state": state})
        return dict(state)

    def close(self) -> None:
        """Do nothing."""
