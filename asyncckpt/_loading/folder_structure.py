"""Check the structure of a folder: its metadata, and the sizes of its files, without their content."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncckpt._loading.folder import with_folder
from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from asyncckpt._loading.folder import Folder
    from asyncckpt.stores.base import Store


async def check_folder_structure(store: Store, name: str) -> None:
    """Read the metadata of a folder, and compare it with the sizes of the files.

    Raises:
        CheckpointNotFoundError: there is no such folder.
        CorruptCheckpointError: the metadata is damaged, a file is missing or too short, or a part of a tensor
            is not there.
        StoreError: it could not be read.
    """
    await with_folder(check_files, store, name)


async def check_files(folder: Folder) -> None:
    """Compare metadata with the sizes of files; raises what `check_folder_structure` does."""
    sizes = {file.name: file.nbytes for file in await folder.store.list()}
    for place in folder.index.items:
        size = sizes.get(place.file)
        if size is None or place.offset < 0 or place.length <= 0 or place.end > size:
            await folder.refuse_replaced()
            problem = (
                "is missing"
                if size is None
                else f"has {size:,} bytes, and the item {place.entry} is said to lie at {place.offset:,} to"
                f" {place.end:,}; it was cut off, or is of another checkpoint"
            )
            raise CorruptCheckpointError(f"{folder.path}: its file {place.file} {problem}")
