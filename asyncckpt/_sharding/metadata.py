"""Pickle the metadata of a checkpoint as DCP does, and read such a pickle without running anything of it."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata


def dump_metadata(metadata: Metadata) -> bytes:
    """Return the pickle that stock DCP writes to `.metadata`."""
    return pickle.dumps(metadata)


def load_metadata(data: bytes, path: str) -> Metadata:
    """Return the metadata in a pickle that DCP of torch 2.3 or newer wrote; what follows it is ignored.

    Args:
        data: the content of `.metadata`.
        path: of the checkpoint, for errors.

    Raises:
        CorruptCheckpointError: it is damaged, or is no such metadata.
        UnsafeStateError: it names classes or functions that no metadata of DCP has; none of it was run.
    """
    raise NotImplementedError
