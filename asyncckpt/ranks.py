"""Processes of one process group that would write the same checkpoints."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

from asyncckpt.errors import SaveError


def claim(directory: str, filename: str) -> None:
    """Take a series for this rank, if the process belongs to a process group of several.

    One exchange with the group's store; no other rank has to take part.

    Args:
        directory: path or URL of the directory.
        filename: template of the series.

    Raises:
        SaveError: another rank has taken it.
    """
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:  # noqa: PLR2004
        return
    rank = str(dist.get_rank())
    # Local disks of several hosts may have the same paths. A shared one is claimed once for each host.
    where = directory if "://" in directory else f"{socket.gethostname()}:{os.path.realpath(directory)}"
    store = dist.distributed_c10d._get_default_store()
    owner = store.compare_set(f"asyncckpt/{where}/{filename}", "", rank).decode()
    if owner != rank:
        raise SaveError(
            f"rank {rank} saves to {directory} under {filename!r}, as rank {owner} does: they would replace and"
            f" evict each other's checkpoints; let one rank save, or give each rank a filename of its own"
            f' (filename=f"rank{rank}-{{step}}.pt")'
        )
