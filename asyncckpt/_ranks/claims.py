"""Refuse saves of several ranks to the same file."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from asyncckpt._ranks.group import process_group
from asyncckpt.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Callable


def claim(directory: str, filename: str) -> Callable[[], object]:
    """Claim a file for this rank; idempotent.

    With several ranks, this is one request to the store of the process group; no other rank takes part.

    Args:
        directory: path or URL of the directory.
        filename: its name.

    Returns:
        A function that releases the claim.

    Raises:
        SaveError: another rank has claimed it.
    """
    group = process_group()
    if group is None:
        return _nothing
    rank = str(group.rank)
    # Hosts may have local disks under the same path, so a path on a shared disk can be claimed once per host.
    where = directory if "://" in directory else f"{socket.gethostname()}:{os.path.realpath(directory)}"
    key = f"asyncckpt/{where}/{filename}"
    owner = group.store.compare_set(key, "", rank).decode()
    if owner != rank:
        raise SaveError(
            f"rank {rank} saves to {directory} under {filename!r}, as rank {owner} does: they would replace"
            " each other's file; let one rank save, or give each rank a path of its own"
        )
    return partial(_release, group.store, key, rank)


def _release(store: Any, key: str, rank: str) -> None:
    # The process that hosts the store may have ended.
    with suppress(RuntimeError):
        store.compare_set(key, rank, "")


def _nothing() -> None:
    pass
