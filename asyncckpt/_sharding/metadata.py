"""Pickle the metadata of a checkpoint as DCP does, and read such a pickle without running anything of it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from asyncckpt.errors import CorruptCheckpointError, UnsafeStateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex


def complete(
    metadata: Metadata,
    indices: Sequence[Sequence[MetadataIndex]],
    names: Sequence[str],
    extents: Sequence[np.ndarray[Any, Any]],
) -> Metadata:
    """Return metadata with what DCP's FileSystemWriter adds to them: where each item is.

    Args:
        metadata: of the planner.
        indices: for each rank, of its items.
        names: of each rank's file.
        extents: for each rank, offset and length of each item in bytes.
    """
    from torch.distributed.checkpoint import filesystem  # noqa: PLC0415 - see __init__
    from torch.distributed.checkpoint.metadata import StorageMeta  # noqa: PLC0415 - the same

    where = {
        index: filesystem._StorageInfo(name, offset, length)
        for items, name, rows in zip(indices, names, extents, strict=True)
        for index, (offset, length) in zip(items, rows.tolist(), strict=True)
    }
    added: dict[str, Any] = {
        "storage_data": where,
        "storage_meta": StorageMeta(),  # no path, which a checkpoint that is moved would belie
    }
    if version := getattr(filesystem, "CURRENT_DCP_VERSION", None):  # from torch 2.9 on
        added["version"] = version
    return replace(metadata, **added)


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
    from asyncckpt._sharding.metadata_reader import UnknownNamesError, read_metadata  # noqa: PLC0415 - see __init__

    try:
        return read_metadata(data)
    except UnknownNamesError as error:
        raise UnsafeStateError(
            f"{path}: its .metadata names what no checkpoint of torch.distributed.checkpoint has, and was not"
            f" loaded: {error}"
        ) from error
    except ValueError as error:
        raise CorruptCheckpointError(f"{path}: its .metadata is damaged: {error}") from error
