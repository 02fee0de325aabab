"""Where a benchmark writes: a folder of its own on the disk or the store that is measured."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fsspec.core import split_protocol, url_to_fs

from asyncckpt.errors import CheckpointNotFoundError, StoreError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from typing_extensions import Self

_PAUSE = 0.5


class Place:
    """A folder that is there for the length of a `with` block.

    Args:
        directory: an existing local directory, or the URL of one of any fsspec file system.
        options: for the file system behind a URL.

    Attributes:
        is_local: whether it is on a disk of this machine.
        url: the path or the URL of the folder, once the block is entered.
    """

    def __init__(self, directory: str, options: Mapping[str, Any]) -> None:
        protocol, path = split_protocol(directory)
        self.is_local = protocol in {None, "file", "local"}
        self._parent = path if self.is_local else directory.rstrip("/")
        self._options = dict(options)
        self.url = ""
        if self.is_local and not Path(self._parent).is_dir():
            raise CheckpointNotFoundError(f"there is no directory {directory}; make it, or name another")

    def __enter__(self) -> Self:
        if self.is_local:
            self.url = tempfile.mkdtemp(prefix="asyncckpt-bench-", dir=self._parent)
        else:
            self.url = f"{self._parent}/asyncckpt-bench-{uuid.uuid4().hex}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.is_local:
            shutil.rmtree(self.url)
            return
        files, path = url_to_fs(self.url, **self._options)
        files.invalidate_cache()
        if files.exists(path):
            files.rm(path, recursive=True)

    def require(self, nbytes: int) -> None:
        """Raise StoreError unless so many bytes are free, where that can be known."""
        free = shutil.disk_usage(self._parent).free if self.is_local else nbytes
        if free < nbytes:
            msg = f"{self._parent} has {free / 1e9:.1f} GB free; the measurement needs {nbytes / 1e9:.1f} GB"
            raise StoreError(f"{msg}; make room, or give a smaller --state")

    def settle(self) -> None:
        """Let the disk come to rest: what was removed before is forgotten, discards included."""
        if self.is_local:
            sync(self.url)
        time.sleep(_PAUSE)

    def torch_save(self, state: Any, name: str) -> None:
        """Save with torch.save, durably: synced and renamed on a disk, closed on a store."""
        if not self.is_local:
            files, path = url_to_fs(f"{self.url}/{name}", **self._options)
            with files.open(path, "wb") as file:
                torch.save(state, file)
            return
        path = f"{self.url}/{name}"
        with open(f"{path}.tmp", "wb") as file:  # noqa: PTH123 - as users of torch.save write it
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)  # noqa: PTH105 - the same
        sync(self.url)

    def local(self, name: str) -> Path:
        """Return the path of a file on a disk."""
        return Path(self.url, name)


def sync(path: str | Path) -> None:
    """Sync a file, or what a directory lists, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
