"""Stores: where the bytes of checkpoints go."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fsspec.core import split_protocol

from asyncckpt.stores.base import Draft, OpenFile, Store, StoredFile
from asyncckpt.stores.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Draft", "LocalStore", "OpenFile", "Store", "StoredFile", "open_store"]


def open_store(directory: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Store:
    """Return the store of a directory: a local path, a `file://` URL, or one of any fsspec file system.

    Raises:
        StoreError: the URL names a protocol that is not known, or whose package is not installed.
        ValueError: options are given for a local path, which takes none.
    """
    given = os.fspath(directory)
    protocol, path = split_protocol(given)
    if protocol in {None, "file", "local"}:
        if options:
            raise ValueError(
                f"{given} is a local path, which takes no storage_options; given were {sorted(options)}"
            )
        return LocalStore(path)
    # Imported when needed: its clients take a while.
    from asyncckpt.stores.remote_open import open_remote  # noqa: PLC0415

    return open_remote(given, protocol, dict(options or {}))
