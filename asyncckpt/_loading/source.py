"""Read a checkpoint that is a file or a folder, whichever has the name."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from asyncckpt._loading.folder import Folder, open_folder, with_folder
from asyncckpt._loading.folder_load import FolderImage, load_folder, read_folder_image
from asyncckpt._loading.load import load_image
from asyncckpt._loading.reader import read_image, verify_file
from asyncckpt.errors import CheckpointNotFoundError, StoreError
from asyncckpt.stores.base import FOLDER_MARK

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._loading.load import Loaded
    from asyncckpt._loading.reader import Image
    from asyncckpt._loading.unpickle import MapLocation
    from asyncckpt.stores.base import Store


# A store without folders; a file of that name, made meanwhile.
_NO_FOLDER = frozenset({errno.ENOTSUP, errno.ENOTDIR})


async def read_checkpoint(store: Store, name: str) -> Image | FolderImage:
    """Read a whole checkpoint into memory, every byte checked.

    Raises:
        CheckpointNotFoundError: there is neither a file nor a folder of this name.
        CorruptCheckpointError: it is damaged.
        StoreError: it could not be read, or was replaced again and again.
    """
    try:
        return await read_image(store, name)
    except CheckpointNotFoundError:
        if not await has_folder(store, name):
            raise
    return await with_folder(read_folder_image, store, name)


async def open_checkpoint(store: Store, name: str) -> Image | Folder:
    """Read all of a file, or the metadata of a folder; raises what `read_checkpoint` does."""
    try:
        return await read_image(store, name)
    except CheckpointNotFoundError:
        if not await has_folder(store, name):
            raise
    return await open_folder(store, name)


async def verify_checkpoint(store: Store, name: str, progress: Callable[[int], None] | None = None) -> None:
    """Read every byte of a checkpoint and compare every checksum; raises what `read_checkpoint` does.

    Args:
        store: where it is.
        name: which file or folder.
        progress: called with how many more bytes were checked, on any thread.
    """
    try:
        await verify_file(store, name, progress)
    except CheckpointNotFoundError:
        if not await has_folder(store, name):
            raise

        async def verify(folder: Folder) -> None:
            await folder.verify(progress)

        await with_folder(verify, store, name)


def load_checkpoint(
    image: Image | FolderImage, map_location: MapLocation = "cpu", *, weights_only: bool | None
) -> Loaded:
    """Build the state of a checkpoint in memory; see `load_image` and `load_folder`."""
    if isinstance(image, FolderImage):
        return load_folder(image, map_location, weights_only=weights_only)
    return load_image(image, map_location, weights_only=weights_only)


async def has_folder(store: Store, name: str) -> bool:
    """Return whether there is a committed folder of this name.

    Raises:
        StoreError: the store cannot tell.
    """
    try:
        await store.folder(name).stat(FOLDER_MARK)
    except FileNotFoundError:
        return False
    except StoreError as error:
        if error.errno not in _NO_FOLDER:
            raise
        return False
    return True
