"""From a URL to the store of it."""

from __future__ import annotations

import errno
import json
import os
import threading
from typing import TYPE_CHECKING, Any

from fsspec.core import url_to_fs

from asyncckpt.errors import StoreError
from asyncckpt.stores.remote import RemoteStore
from asyncckpt.stores.remote_errors import told
from asyncckpt.stores.s3 import ATTEMPTS, S3Store

if TYPE_CHECKING:
    from fsspec.spec import AbstractFileSystem

_S3 = frozenset({"s3", "s3a"})
# The package that a protocol needs; others are told by fsspec.
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
}

_ENVIRONMENT = ("AWS_", "AZURE_", "GOOGLE_", "GCSFS_", "FSSPEC_")

_opened: dict[tuple[str, str], AbstractFileSystem] = {}
_opening = threading.Lock()


def open_remote(url: str, protocol: str, options: dict[str, Any]) -> RemoteStore:
    """Return the store of a URL.

    Args:
        url: a directory.
        protocol: of the URL.
        options: for the file system, as fsspec takes them.

    Raises:
        StoreError: the protocol is not known, its package is not installed, or it refuses the options.
    """
    if protocol in _S3:
        options = _s3_options(options)
    # Clients take what is not in the options from the environment, once.
    surroundings = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
    key = (protocol, json.dumps([options, surroundings], sort_keys=True, default=repr))
    try:
        with _opening, told("opening it", url):
            fs = _opened.get(key)
            if fs is None:
                fs, _ = url_to_fs(url, **options, skip_instance_cache=True)
                if protocol in _S3:
                    fs.retries = 1  # the client's own are enough, and are with jitter
                _opened[key] = fs
            root = fs._strip_protocol(url)
    except StoreError as error:
        if isinstance(error.__cause__, ImportError) and protocol in _PACKAGES:
            msg = f"{url} needs a package: pip install {_PACKAGES[protocol]}"
            raise StoreError(errno.ENOSYS, msg, url) from error.__cause__
        raise
    return (S3Store if protocol in _S3 else RemoteStore)(fs, url, root)


def _s3_options(options: dict[str, Any]) -> dict[str, Any]:
    config = {
        "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
        "connect_timeout": 10,
        "read_timeout": 60,
        # Each part brings the CRC-32 that we have made of it: another hash would take longer than sending it.
        "request_checksum_calculation": "when_required",
        "s3": {"payload_signing_enabled": False},
    }
    return options | {"config_kwargs": config | options.get("config_kwargs", {}), "use_listings_cache": False}


def _forget_in_child() -> None:
    """Begin anew in a forked child: connections and the thread that serves them are the parent's."""
    global _opening  # noqa: PLW0603
    _opening = threading.Lock()
    _opened.clear()


os.register_at_fork(after_in_child=_forget_in_child)
