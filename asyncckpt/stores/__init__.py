"""Stores: where the bytes of checkpoints go."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fsspec.core import split_protocol

from asyncckpt.errors import StoreError
from asyncckpt.stores.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncckpt.stores.base import Store


def open_store(directory: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Store:
    """Return the store of a directory: a local path, or a `file://` URL.

    Raises:
        StoreError: the URL names a protocol that has no store.
        ValueError: options are given for a local path, which takes none.
    """
    given = os.fspath(directory)
    protocol, path = split_protocol(given)
    if protocol not in {None, "file", "local"}:
        msg = f"{given}: there is no store for {protocol}:// here; use a local path or a file:// URL"
        raise StoreError(msg)
    if options:
        raise ValueError(
            f"{given} is a local path, which takes no storage_options; given were {sorted(options)}"
        )
    return LocalStore(path)
