"""What every saver that is compared can do."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path


class Peer(ABC):
    """One way to save checkpoints into a directory.

    Args:
        directory: an existing, empty one.

    Attributes:
        name: as shown in tables.
        package: the distribution whose version is told.
        module: what has to be imported of it.
        key: for the command line.
        blocks: whether `save` returns only when the file is complete.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    module: ClassVar[str]
    key: ClassVar[str]
    blocks: ClassVar[bool]

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @abstractmethod
    def start(self, state: Any) -> None:
        """Import the package, and do what its documentation says to do before the first save."""

    @abstractmethod
    def save(self, state: Any, name: str) -> None:
        """Save one checkpoint; returns when a training loop may change `state` again."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until what was saved is complete, as far as the package tells; raises what failed."""

    @abstractmethod
    def load(self, name: str, like: Any) -> Any:
        """Return the state of a checkpoint; `like` is one of the same structure, and is not changed."""

    @abstractmethod
    def close(self) -> None:
        """End what `start` has begun."""

    def path(self, name: str) -> Path:
        """Return the file or the directory of a checkpoint."""
        return self.directory / name

    def remove(self, name: str) -> None:
        """Delete a checkpoint."""
        path = self.path(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


class FuturePeer(Peer):
    """A peer whose saves are futures, at most one at a time."""

    blocks = False
    pending: Future[Any] | None = None

    def wait(self) -> None:
        """Wait for the save under way, if there is one."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def share_by_name() -> None:
    """Let tensors go to other processes without a descriptor each: 10,000 would be more than may be open."""
    torch.multiprocessing.set_sharing_strategy("file_system")


def empty_like(state: Any) -> Any:
    """Return the nested dicts and lists of `state` with fresh tensors; those that were one are one again."""
    made: dict[Any, torch.Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            place = value.data_ptr(), value.shape, value.stride(), value.dtype
            if place not in made:
                made[place] = torch.empty_like(value, requires_grad=False)
            return made[place]
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, list):
            return [copy(item) for item in value]
        return value

    return copy(state)
