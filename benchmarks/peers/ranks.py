"""The savers of many ranks that are compared: each rank has one of its own, all are called together."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import asyncckpt
from peers.base import Peer
from peers.dcp import CachedSaver, ProcessSaver, ThreadSaver

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from torch.optim import Optimizer


class ModelState:
    """A model as DCP saves it: its state dict under fully qualified names.

    Args:
        model: the live one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._functions = import_module("torch.distributed.checkpoint.state_dict")

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict."""
        found: dict[str, Any] = self._functions.get_model_state_dict(self._model)
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the model its state."""
        self._functions.set_model_state_dict(self._model, state)


class OptimizerState(ModelState):
    """An optimizer as DCP saves it: with the names of the parameters.

    Args:
        model, optimizer: the live ones.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(model)
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict."""
        found: dict[str, Any] = self._functions.get_optimizer_state_dict(self._model, self._optimizer)
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the optimizer its state."""
        self._functions.set_optimizer_state_dict(self._model, self._optimizer, state)


class BlockingSaver(ThreadSaver):
    """Writes before it returns."""

    name = "DCP save"
    key = "dcp_save"
    blocks = True

    def save(self, state: Any, name: str) -> None:
        """Write the state."""
        self._checkpoint.save(state, checkpoint_id=self.path(name))


class Ours(Peer):
    """A Checkpointer that keeps one checkpoint; each name is a step of its own.

    Attributes:
        last: the save before.
    """

    name = "asyncckpt Checkpointer"
    package = "asyncckpt"
    module = "asyncckpt"
    key = "ours"
    blocks = False
    sharded: ClassVar[bool | None] = None
    last: asyncckpt.Save
    _checkpointer: asyncckpt.Checkpointer

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._steps: dict[str, int] = {}

    def start(self, state: Any) -> None:  # noqa: ARG002 - it is not warmed up
        """Make the Checkpointer."""
        self._checkpointer = asyncckpt.Checkpointer(
            self.directory, filename=f"{self.key}-{{step}}.pt", keep=asyncckpt.LastN(1), sharded=self.sharded
        )

    def save(self, state: Any, name: str) -> None:
        """Save under the step of that name."""
        self.last = self._checkpointer.save(self._steps.setdefault(name, len(self._steps)), state)

    def wait(self) -> None:
        """Wait until the save before is durable."""
        self.last.committed.result()

    def load(self, name: str, like: Any) -> Any:
        """Give the objects of `like` their state."""
        self._checkpointer.restore(like, self._steps[name])
        return like

    def close(self) -> None:
        """Close the Checkpointer."""
        self._checkpointer.close()

    def path(self, name: str) -> Path:
        """Return the folder of that step."""
        return self.directory / f"{self.key}-{self._steps[name]}"

    def remove(self, name: str) -> None:  # noqa: ARG002 - the next one evicts it
        """Wait for the eviction of the one before."""
        self._checkpointer.wait()


class Divided(Ours):
    """The same for a state that all ranks have alike: each rank saves a part of it."""

    name = "asyncckpt Checkpointer, sharded=True"
    key = "ours_divided"
    sharded = True


class OneRank(Ours):
    """The same, saved by rank 0 alone."""

    name = "asyncckpt Checkpointer, rank 0 alone"
    key = "ours_alone"
    sharded = False


# In the order of tables.
PEERS: dict[str, type[Peer]] = {
    peer.key: peer for peer in (BlockingSaver, ThreadSaver, ProcessSaver, CachedSaver, Ours)
}
REPLICATED: dict[str, type[Peer]] = {peer.key: peer for peer in (CachedSaver, OneRank, Divided)}


def state_for(peer: Peer, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of a training in the form that a peer saves and loads."""
    if isinstance(peer, Ours):
        return {"model": model, "optimizer": optimizer}
    return {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}
