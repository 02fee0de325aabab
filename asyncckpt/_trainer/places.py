"""Where checkpoints of a Trainer go: files of our own, or whatever somebody else's CheckpointIO makes."""

from __future__ import annotations

import os
import posixpath
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.core import split_protocol

from asyncckpt._loading.catalog import read_described
from asyncckpt._loading.load import load_image
from asyncckpt._loading.planned import load_plan
from asyncckpt._loading.reader import read_file, read_image
from asyncckpt._saving import operations
from asyncckpt._saving.engine import get_engine
from asyncckpt._saving.targets import FileTarget, Target
from asyncckpt._threads import in_thread
from asyncckpt.errors import AsyncCkptError
from asyncckpt.layout.description import Description
from asyncckpt.stores import open_store
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._saving.operations import Causes
    from asyncckpt._saving.save import Outcome
    from asyncckpt._saving.staging import Snapshot
    from asyncckpt.stores.base import Store
    from asyncckpt.types import SaveStats

    OpenStore = Callable[[str], Store]


class Place:
    """A path that checkpoints are saved to.

    Attributes:
        path: absolute, with the links of its directory resolved, if it is local; else as given.
        name: of the file in its directory.
        is_local: whether it is a path of a mounted file system.
    """

    def __init__(self, path: str | os.PathLike[str], open_store: OpenStore = open_store) -> None:
        protocol, local = split_protocol(os.fspath(path))
        self._open_store = open_store
        self.is_local = protocol in {None, "file", "local"}
        self._is_address = protocol in {"http", "https"}
        if self.is_local:
            full = Path(local).expanduser().absolute()
            self._directory, self.name = str(full.parent.resolve()), full.name
        else:
            self._directory, _, self.name = os.fspath(path).rpartition("/")
        self.path = posixpath.join(self._directory, self.name)

    @cached_property
    def store(self) -> Store:
        """The store of the directory.

        Raises:
            StoreError: the protocol is not known, or its package is not installed.
        """
        return self._open_store(self._directory)

    def file_target(self, step: int | None) -> FileTarget:
        """Return what a save of ours goes to."""
        return FileTarget(self.store, self.name, Description(0, step, {}, time.time()))

    def load(self, map_location: Any = "cpu", *, weights_only: bool | None) -> Any:
        """Load a file of ours, every byte checked."""
        image = get_engine().call(read_image, self.store, self.name)
        return load_image(image, map_location, weights_only=weights_only).state

    def is_ours(self) -> bool:
        """Return whether a file that asyncckpt wrote is here; what a web server has is left to others."""
        if self._is_address:
            return False
        try:
            return get_engine().call(read_file, read_described, self.store, self.name) is not None
        except (OSError, AsyncCkptError):
            return False

    def exists(self) -> bool:
        """Return whether something is here, or will be once all is carried out."""
        pending = get_engine().pending(self.path)
        if pending is not None:
            return pending
        return Path(self.path).exists() if self.is_local else get_engine().call(self._is_there)

    def remove(self, causes: Causes) -> Outcome[None]:
        """Remove what is here, a directory too."""
        return operations.remove(self.store, self.name, causes=causes)

    def copy(self, source: Place, causes: Causes) -> Outcome[None]:
        """Make this an independent copy of the file at `source`."""
        return operations.copy(self.store, self._relative(source), self.name, causes=causes)

    def link(self, source: Place, causes: Causes) -> Outcome[None]:
        """Make this a relative link to `source`, or a copy where there are none."""
        return operations.link(self.store, self._relative(source), self.name, causes=causes)

    async def _is_there(self) -> bool:
        try:
            await self.store.stat(self.name)
        except FileNotFoundError:
            return False
        return True

    def _relative(self, source: Place) -> str:
        return posixpath.relpath(source.path, self._directory)


@dataclass(slots=True, eq=False)
class StateTarget(Target):
    """What somebody else's writer makes of the state in host memory.

    Attributes:
        path: what the user calls it.
        save: called with the state, whose tensors are only valid until it returns.
    """

    path: str
    save: Callable[[Any], object]

    async def write(self, snapshot: Snapshot, stats: SaveStats) -> Checkpoint:
        """Wait for the copy and hand the state over."""
        await in_thread(snapshot.filled.wait, snapshot.body.nbytes)
        began = time.perf_counter()
        await in_thread(self._write, snapshot)
        stats.write = time.perf_counter() - began
        return Checkpoint(None, self.path, {}, snapshot.body.nbytes, time.time())

    def _write(self, snapshot: Snapshot) -> None:
        self.save(load_plan(snapshot.plan(b"{}"), snapshot.lease.view))
