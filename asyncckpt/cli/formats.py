"""Which files are checkpoints, and of which kind, as far as their names and first bytes tell."""

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
_DCP_FILE, _DCP_METADATA = ".distcp", ".metadata"
DCP = (
    "of torch.distributed.checkpoint, whose files verify cannot check; `python -m"
    " torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE` makes one file of them that it can"
)


async def looks_like_checkpoint(store: Store, file: StoredFile) -> bool:
    """Tell by its suffix and its first bytes whether a file, which may be damaged, is one of torch.save."""
    suffix = PurePosixPath(file.name).suffix
    if suffix in {_SAFETENSORS, _DCP_FILE}:
        return False
    return suffix in SUFFIXES or _BEGINNING.match(await _head(store, file)) is not None


def is_safetensors(name: str) -> bool:
    """Tell by its name whether a file is one of safetensors."""
    return PurePosixPath(name).suffix == _SAFETENSORS


def is_dcp(name: str) -> bool:
    """Tell by its name whether a file holds tensors of a checkpoint of torch.distributed.checkpoint."""
    return PurePosixPath(name).suffix == _DCP_FILE


def dcp_files(files: Iterable[StoredFile]) -> list[StoredFile]:
    """Return the files of the DCP checkpoint that a directory is; none if it is no such checkpoint."""
    found = [file for file in files if is_dcp(file.name) or file.name == _DCP_METADATA]
    return found if {_DCP_METADATA} < {file.name for file in found} else []


async def foreign_format(store: Store, file: StoredFile) -> str | None:
    """Return what a file is that is in no format of torch.save's since 1.6; None if it does not tell."""
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
