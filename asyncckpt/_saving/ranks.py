"""Find the process group of this rank, and refuse saves of several ranks to the same files."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from asyncckpt.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Callable


class ProcessGroup(NamedTuple):
    """The default process group.

    Attributes:
        store: its key-value store.
        rank: of this process.
        size: number of ranks, at least 2.
    """

    store: Any
    rank: int
    size: int


def process_group() -> ProcessGroup | None:
    """Return the default process group, if there is one of several ranks; does not import it."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return ProcessGroup(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size())


def claim(directory: str, filename: str) -> Callable[[], object]:
    """Claim a file, or all names of a template, for this rank; idempotent.

    With several ranks, this is one request to the store of the process group; no other rank takes part.

    Args:
        directory: path or URL of the directory.
        filename: name or template.

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
            " and evict each other's checkpoints; let one rank save, or give each rank a filename of its own"
            f' (filename=f"rank{rank}-{{step}}.pt")'
        )
    return partial(_release, group.store, key, rank)


def _release(store: Any, key: str, rank: str) -> None:
    # The process that hosts the store may have ended.
    with suppress(RuntimeError):
        store.compare_set(key, rank, "")


def _nothing() -> None:
    pass
