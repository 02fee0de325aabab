"""Processes of one process group that would write the same checkpoints."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from asyncckpt.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Callable


def claim(directory: str, filename: str) -> Callable[[], object]:
    """Take a file, or all that a template names, for this rank; harmless if it has it already.

    This is one exchange with the store of the process group, if there is one of several ranks. No other rank
    has to take part.

    Args:
        directory: path or URL of the directory.
        filename: name or template.

    Returns:
        What gives it back.

    Raises:
        SaveError: another rank has it.
    """
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return _nothing
    rank = str(dist.get_rank())
    # Local disks of several hosts may have the same paths. One that they share is taken once on each host.
    where = directory if "://" in directory else f"{socket.gethostname()}:{os.path.realpath(directory)}"
    store, key = dist.distributed_c10d._get_default_store(), f"asyncckpt/{where}/{filename}"
    owner = store.compare_set(key, "", rank).decode()
    if owner != rank:
        raise SaveError(
            f"rank {rank} saves to {directory} under {filename!r}, as rank {owner} does: they would replace"
            " and evict each other's checkpoints; let one rank save, or give each rank a filename of its own"
            f' (filename=f"rank{rank}-{{step}}.pt")'
        )
    return partial(_give_back, store, key, rank)


def _give_back(store: Any, key: str, rank: str) -> None:
    # The process that keeps the store may have ended; then nobody asks any more.
    with suppress(RuntimeError):
        store.compare_set(key, rank, "")


def _nothing() -> None:
    pass
