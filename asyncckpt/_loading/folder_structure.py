"""Check the structure of a folder: its metadata, and the sizes of its files, without their content."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from asyncckpt._loading.folder import Folder


async def check_files(folder: Folder) -> None:
    """Compare the metadata of a folder, which are checked already, with the sizes of its files.

    Raises:
        CheckpointNotFoundError: it was removed or replaced meanwhile.
        CorruptCheckpointError: a file is missing or too short.
        StoreError: its files could not be listed.
    """
    sizes = {file.name: file.nbytes for file in await folder.store.list()}
    for place in folder.index.items:
        size = sizes.get(place.file)
        if size is None or not 0 <= place.offset < place.end <= size:
            await folder.refuse_replaced()
            problem = (
                "is missing"
                if size is None
                else f"has {size:,} bytes, and its item {place.entry} lies at {place.offset:,} to"
                f" {place.end:,}; it was cut off, or is of another checkpoint"
            )
            raise CorruptCheckpointError(f"{folder.path}: its file {place.file} {problem}")
    for name, (nbytes, _) in (folder.description.extras if folder.description else {}).items():
        if sizes.get(name) != nbytes:
            await folder.refuse_replaced()
            raise CorruptCheckpointError(
                f"{folder.path}: its file {name} is missing, or has other than {nbytes:,} bytes"
            )
