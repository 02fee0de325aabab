"""Where a benchmark writes: a folder of its own on the disk or the store that is measured."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import torch
from fsspec.core import url_to_fs

from asyncckpt.checkpointer import Checkpointer
from asyncckpt.errors import CheckpointNotFoundError, StoreError
from asyncckpt.retention import LastN
from asyncckpt.stores.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from asyncckpt.stores.base import Store

_PAUSE = 0.5


class Place:
    """A folder of a store.

    Attributes:
        is_local: whether it is on a disk of this machine.
        url: the path or the URL of the folder.
    """

    def __init__(self, store: Store, name: str, options: Mapping[str, Any]) -> None:
        self.is_local = isinstance(store, LocalStore)
        self.url = store.path_of(name)
        self._options = dict(options)

    def require(self, nbytes: int) -> None:
        """Raise StoreError unless so many bytes are free, where that can be known."""
        free = shutil.disk_usage(self.url).free if self.is_local else nbytes
        if free < nbytes:
            msg = f"{self.url} has {free / 1e9:.1f} GB free; the measurement needs {nbytes / 1e9:.1f} GB"
            raise StoreError(f"{msg}; make room, or give a smaller --state")

    def settle(self) -> None:
        """Let the disk come to rest: what was removed before is forgotten, discards included."""
        if self.is_local:
            sync(self.url)
        time.sleep(_PAUSE)

    def checkpointer(self) -> Checkpointer:
        """Make a Checkpointer that keeps one checkpoint in this folder."""
        return Checkpointer(self.url, keep=LastN(1), storage_options=self._options or None)

    def torch_save(self, state: Any, name: str) -> None:
        """Save with torch.save, durably: synced and renamed on a disk, closed on a store."""
        path = f"{self.url}/{name}"
        if not self.is_local:
            files, path = url_to_fs(path, **self._options)
            with files.open(path, "wb") as file:
                torch.save(state, file)
            return
        with open(f"{path}.tmp", "wb") as file:  # noqa: PTH123 - as users of torch.save write it
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)  # noqa: PTH105 - the same
        sync(self.url)


@contextmanager
def new_place(store: Store, options: Mapping[str, Any]) -> Iterator[Place]:
    """Make a folder for the length of a `with` block.

    Args:
        store: of a local directory, which has to exist, or of any other one.
        options: those that the store was opened with.
    """
    name = f"asyncckpt-bench-{uuid.uuid4().hex}"
    place = Place(store, name, options)
    if place.is_local:
        if not Path(place.url).parent.is_dir():
            directory = Path(place.url).parent
            raise CheckpointNotFoundError(f"there is no directory {directory}; make it, or name another")
        Path(place.url).mkdir()
    try:
        yield place
    finally:
        anyio.run(store.remove, name)


def exit_on_signals() -> None:
    """Let SIGTERM and SIGHUP raise SystemExit, so that processes end and files are removed."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # and not ignored, as under nohup
            signal.signal(number, leave)


def sync(path: str | Path) -> None:
    """Sync a file, or what a directory lists, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
