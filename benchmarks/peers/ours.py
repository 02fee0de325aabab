"""asyncckpt: its Checkpointer as it comes and otherwise, its functions, and its plugin for Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import asyncckpt
from peers.base import Peer
from peers.lightning_io import TorchCheckpointIO

if TYPE_CHECKING:
    from pathlib import Path

    from asyncckpt.lightning import AsyncCheckpointIO

FILENAME = "step-{step}.pt"


class OneInFlight(Peer):
    """A Checkpointer; each name is a step of its own."""

    name = "asyncckpt Checkpointer"
    package = "asyncckpt"
    module = "asyncckpt"
    key = "ours"
    blocks = False
    max_in_flight: ClassVar[int] = 1
    _checkpointer: asyncckpt.Checkpointer

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._steps: dict[str, int] = {}

    def start(self, state: Any) -> None:  # noqa: ARG002 - it is not warmed up
        """Make the Checkpointer."""
        self._checkpointer = asyncckpt.Checkpointer(
            self.directory, filename=FILENAME, max_in_flight=self.max_in_flight
        )

    def save(self, state: Any, name: str) -> None:
        """Save under the step of that name."""
        self._checkpointer.save(self._steps.setdefault(name, len(self._steps)), state)

    def wait(self) -> None:
        """Wait until all is durable."""
        self._checkpointer.wait()

    def load(self, name: str, like: Any) -> Any:  # noqa: ARG002 - the file needs no pattern
        """Read the file and check every byte."""
        return self._checkpointer.load(self._steps[name])

    def close(self) -> None:
        """Close the Checkpointer."""
        self._checkpointer.close()

    def path(self, name: str) -> Path:
        """Return the file of that step."""
        return self.directory / FILENAME.format(step=self._steps[name])


class TwoInFlight(OneInFlight):
    """The same, with a second snapshot while the first one is written."""

    name = "asyncckpt Checkpointer, max_in_flight=2"
    key = "ours_two"
    max_in_flight = 2


class Reserved(OneInFlight):
    """The same, its memory made ready beforehand."""

    name = "asyncckpt Checkpointer, reserved"
    key = "ours_reserved"

    def start(self, state: Any) -> None:
        """Make the Checkpointer and its memory."""
        super().start(state)
        self._checkpointer.reserve(state)


class Function(Peer):
    """The functions `save`, `wait` and `load`."""

    name = "asyncckpt.save"
    package = "asyncckpt"
    module = "asyncckpt"
    key = "ours_function"
    blocks = False

    def start(self, state: Any) -> None:
        """Do nothing."""

    def save(self, state: Any, name: str) -> None:
        """Save to the file of that name."""
        asyncckpt.save(state, self.path(name))

    def wait(self) -> None:
        """Wait until all is durable."""
        asyncckpt.wait()

    def load(self, name: str, like: Any) -> Any:  # noqa: ARG002 - the file needs no pattern
        """Read the file and check every byte."""
        return asyncckpt.load(self.path(name))

    def close(self) -> None:
        """Do nothing."""


class Plugin(TorchCheckpointIO):
    """The plugin that takes the place of Lightning's AsyncCheckpointIO."""

    name = "asyncckpt AsyncCheckpointIO"
    package = "asyncckpt"
    module = "asyncckpt.lightning"
    key = "ours_plugin"
    blocks = False
    _io: AsyncCheckpointIO

    def start(self, state: Any) -> None:  # noqa: ARG002 - it is not warmed up
        """Make the plugin."""
        self._io = import_module("asyncckpt.lightning").AsyncCheckpointIO()

    def wait(self) -> None:
        """Wait until all is durable."""
        self._io.wait()
