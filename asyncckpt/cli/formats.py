"""Identify checkpoint files and foreign formats by name and first bytes."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from asyncckpt._naming import SUFFIXES
from asyncckpt.errors import StoreError
from asyncckpt.layout.other_formats import HEAD, recognize

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asyncckpt.stores.base import Store, StoredFile

# The header of the first record of a file by torch.save or asyncckpt: data.pkl, or a storage.
_BEGINNING = re.compile(rb"PK\x03\x04.{26}[^/]+/data(\.pkl|/\d)", re.DOTALL)
_SAFETENSORS = ".safetensors"
_DATA_FILE = ".distcp"
DCP = "torch.distributed.checkpoint"
# What a folder with data files and without FOLDER_MARK is.
INCOMPLETE = "the folder of a sharded save without .metadata: it is under way, or was not completed"


async def looks_like_checkpoint(store: Store, file: StoredFile) -> bool:
    """Return whether a file, possibly damaged, looks like one of torch.save by suffix and first bytes."""
    suffix = PurePosixPath(file.name).suffix
    if suffix in {_SAFETENSORS, _DATA_FILE}:
        return False
    return suffix in SUFFIXES or _BEGINNING.match(await _head(store, file)) is not None


def is_safetensors(name: str) -> bool:
    """Return whether a file is one of safetensors, by its name."""
    return PurePosixPath(name).suffix == _SAFETENSORS


def is_data_file(name: str) -> bool:
    """Return whether a file is one of a rank in a folder of many, by its name."""
    return PurePosixPath(name).suffix == _DATA_FILE


def has_data_files(files: Iterable[StoredFile]) -> bool:
    """Return whether the files of ranks are among these."""
    return any(is_data_file(file.name) for file in files)


async def foreign_format(store: Store, file: StoredFile) -> str | None:
    """Return the name of the format of a foreign file, or None if it is not known."""
    head = await _head(store, file)
    meaning = recognize(head) if head else None
    return None if meaning is None else re.split("[:,]", meaning)[0]


async def _head(store: Store, file: StoredFile) -> bytes:
    """Return the first bytes of a file; none if it cannot be read."""
    head = bytearray(min(file.nbytes, HEAD))
    try:
        await store.read(file.name, 0, memoryview(head))
    except (StoreError, FileNotFoundError):
        return b""
    return bytes(head)
