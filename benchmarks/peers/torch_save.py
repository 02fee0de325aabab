"""torch.save, as it is and with fsync."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from asyncckpt._bench.place import sync
from peers.base import Peer


class TorchSave(Peer):
    """torch.save to a temporary name, and then a rename, so that no name ever leads to half a file."""

    name = "torch.save"
    package = "torch"
    module = "torch"
    key = "torch_save"
    blocks = True
    synced: ClassVar[bool] = False

    def start(self, state: Any) -> None:
        """Do nothing."""

    def save(self, state: Any, name: str) -> None:
        """Write the file; nothing is synced unless `synced` is set."""
        path = self.path(name)
        temporary = path.with_name(f"{name}.tmp")
        torch.save(state, temporary)
        if self.synced:
            sync(temporary)
        temporary.replace(path)
        if self.synced:
            sync(self.directory)

    def wait(self) -> None:
        """Do nothing: the file is there."""

    def load(self, name: str, like: Any) -> Any:  # noqa: ARG002 - a file of torch.save needs no pattern
        """Read the file."""
        return torch.load(self.path(name), weights_only=True)

    def close(self) -> None:
        """Do nothing."""


class SyncedTorchSave(TorchSave):
    """The same, and the file and its directory are synced before `save` returns."""

    name = "torch.save + fsync"
    key = "torch_save_fsync"
    synced = True
