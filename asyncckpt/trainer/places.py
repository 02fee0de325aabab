"""Where checkpoints of a Trainer go: files of our own, or whatever somebody else's CheckpointIO makes."""

from __future__ import annotations

import os
import posixpath
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.core import split_protocol

from asyncckpt import operations
from asyncckpt.catalog import describe
from asyncckpt.engine import get_engine
from asyncckpt.errors import AsyncCkptError
from asyncckpt.layout.description import Description
from asyncckpt.restore import load_state
from asyncckpt.stores import open_store
from asyncckpt.targets import FileTarget, Target
from asyncckpt.threads import in_thread
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asyncckpt.operations import Causes
    from asyncckpt.save import Outcome
    from asyncckpt.staging import Snapshot, Stager
    from asyncckpt.stores.base import Store
    from asyncckpt.types import SaveStats

    OpenStore = Callable[[str], Store]


class Place:
    """A path that checkpoints are saved to.

    Attributes:
        path: absolute, with the links of its directory resolved, if it is local; else as given.
        store, name: of the file; no store for addresses that can only be read (http).
    """

    def __init__(self, path: str | os.PathLike[str], open_store: OpenStore = open_store) -> None:
        protocol, local = split_protocol(os.fspath(path))
        self.path = os.fspath(path)
        self.store: Store | None = None
        self.is_local = protocol in {None, "file", "local"}
        if self.is_local:
            full = Path(local).expanduser().absolute()
            directory, self.name = str(full.parent.resolve()), full.name
        else:
            directory, _, self.name = self.path.rpartition("/")
        if protocol not in {"http", "https"}:
            self.store = open_store(directory)
            self.path = self.store.path_of(self.name)

    def file_target(self, step: int | None) -> FileTarget:
        """Return what a save of ours goes to."""
        assert self.store is not None  # noqa: S101 - for the type checker
        store, description = self.store, Description(0, step, {}, time.time())

        async def prepared() -> Description:
            await store.prepare()
            return description

        return FileTarget(store, self.name, prepared)

    def load(self, map_location: Any = "cpu", *, weights_only: bool | None) -> Any:
        """Load a file of ours, every byte checked."""
        assert self.store is not None  # noqa: S101 - for the type checker
        return load_state(get_engine(), self.store, self.name, map_location, weights_only=weights_only)

    def is_ours(self) -> bool:
        """Return whether a file that asyncckpt wrote is here: others do not say when they were made."""
        if self.store is None:
            return False
        try:
            return get_engine().call(describe, self.store, self.name).created > 0
        except (OSError, AsyncCkptError):
            return False

    def remove(self, causes: Causes) -> Outcome[None]:
        """Remove what is here, a directory too."""
        assert self.store is not None  # noqa: S101 - for the type checker
        return operations.remove(self.store, self.name, causes=causes)

    def exists(self) -> bool:
        """Return whether something is here, or will be once all is carried out."""
        pending = get_engine().pending(self.path)
        if pending is not None or self.is_local or self.store is None:
            return Path(self.path).exists() if pending is None else pending
        return get_engine().call(self._is_there, self.store)

    async def _is_there(self, store: Store) -> bool:
        try:
            await store.stat(self.name)
        except FileNotFoundError:
            return False
        return True

    def copy(self, source: Place, causes: Causes) -> Outcome[None]:
        """Make this an independent copy of the file at `source`."""
        assert self.store is not None  # noqa: S101 - for the type checker
        make = partial(self._prepared, self.store.copy, source)
        return operations.submit(make, self.path, exists=True, causes=causes)

    def link(self, source: Place, causes: Causes) -> Outcome[None]:
        """Make this a relative link to `source`, or a copy where there are none."""
        assert self.store is not None  # noqa: S101 - for the type checker
        make = partial(self._prepared, self.store.link, source)
        return operations.submit(make, self.path, exists=True, causes=causes)

    async def _prepared(self, make: Callable[[str, str], Awaitable[None]], source: Place) -> None:
        assert self.store is not None  # noqa: S101 - for the type checker
        await self.store.prepare()
        await make(posixpath.relpath(source.path, posixpath.dirname(self.path)), self.name)


@dataclass(slots=True, eq=False)
class StateTarget(Target):
    """What somebody else's writer makes of the state in host memory.

    Attributes:
        path: what the user calls it.
        save: called with the state, whose tensors are only valid until it returns.
    """

    path: str
    save: Callable[[Any], object]

    async def write(self, stager: Stager, snapshot: Snapshot, stats: SaveStats) -> Checkpoint:
        """Wait for the copy and hand the state over."""
        await in_thread(snapshot.filled.wait, snapshot.body.nbytes)
        began = time.perf_counter()
        await in_thread(self._write, stager, snapshot)
        stats.write = time.perf_counter() - began
        return Checkpoint(None, self.path, {}, snapshot.body.nbytes, time.time())

    def _write(self, stager: Stager, snapshot: Snapshot) -> None:
        self.save(stager.host_state(snapshot))
