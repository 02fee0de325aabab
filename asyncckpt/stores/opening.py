"""From the path or the URL of a directory to its store."""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING, Any

from fsspec.core import split_protocol, url_to_fs

from asyncckpt.errors import StoreError
from asyncckpt.stores.errors import remote_errors
from asyncckpt.stores.local import LocalStore
from asyncckpt.stores.remote import RemoteStore
from asyncckpt.stores.s3 import S3Store, client_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fsspec.spec import AbstractFileSystem

    from asyncckpt.stores.base import Store

_S3 = frozenset({"s3", "s3a"})
# The package that a protocol needs; fsspec names those of other protocols.
_PACKAGES = {
    **dict.fromkeys(_S3, "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "abfss", "az"), "adlfs"),
}
# Clients take what is not in the options from these variables, once.
_ENVIRONMENT = ("AWS_", "AZURE_", "GOOGLE_", "GCSFS_", "FSSPEC_")

_opened: dict[tuple[str, str], AbstractFileSystem] = {}


def open_store(directory: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Store:
    """Return the store of a directory: a local path, a `file://` URL, or one of any fsspec file system.

    Args:
        directory: its path or URL; it need not exist.
        options: `storage_options` of the file system behind a URL, as fsspec takes them.

    Raises:
        StoreError: the URL names a protocol that is not known, or whose package is not installed, or the file
            system refuses the options.
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
    try:
        with remote_errors("opening it", given):
            fs = _file_system(given, protocol, dict(options or {}))
            root = fs._strip_protocol(given)
    except StoreError as error:
        if isinstance(error.__cause__, ImportError) and protocol in _PACKAGES:
            message = f"{given} needs a package: pip install {_PACKAGES[protocol]}"
            raise StoreError(errno.ENOSYS, message, given) from error.__cause__
        raise
    return (S3Store if protocol in _S3 else RemoteStore)(fs, given, root)


def _file_system(url: str, protocol: str, options: dict[str, Any]) -> AbstractFileSystem:
    if protocol in _S3:
        options = client_options(options)
    surroundings = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
    key = (protocol, json.dumps([options, surroundings], sort_keys=True, default=repr))
    if key not in _opened:
        fs, _ = url_to_fs(url, **options, skip_instance_cache=True)
        if protocol in _S3:
            fs.retries = 1  # the client's own are enough, and are with jitter
        return _opened.setdefault(key, fs)
    return _opened[key]


# In a forked child, connections and the thread that serves them are the parent's.
os.register_at_fork(after_in_child=_opened.clear)
