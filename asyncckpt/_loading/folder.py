"""A folder with the files of many ranks: first its metadata are read, then the items that are needed."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from asyncckpt._checksum import crc32
from asyncckpt._loading.folder_index import Index, index_of
from asyncckpt._loading.item_reader import read_items, verify_items
from asyncckpt._loading.item_run import named
from asyncckpt._loading.reader import ATTEMPTS
from asyncckpt._sharding.metadata import load_metadata
from asyncckpt._threads import in_thread
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StoreError
from asyncckpt.layout.description import checkpoint_of
from asyncckpt.layout.folder_mark import read_mark, unseal
from asyncckpt.stores.base import FOLDER_MARK
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from asyncckpt._loading.item_run import Place
    from asyncckpt._loading.reader import Image
    from asyncckpt.layout.description import Description
    from asyncckpt.stores.base import Store

R = TypeVar("R")

# A state of a million tensors on thousands of ranks has less.
_MAX_MARK = 2 << 30


@dataclass(frozen=True, slots=True, eq=False)
class Folder:
    """A committed folder, of which the metadata was read.

    Attributes:
        path: its path or URL.
        store: its files.
        version: of its mark: the folder is still the same as long as that is.
        description: of itself; None if stock DCP wrote it.
        checkpoint: what its description says; without a description, what is known of it.
        index: its entries.
    """

    path: str
    store: Store
    version: str
    description: Description | None
    checkpoint: Checkpoint
    index: Index

    async def read(self, places: Sequence[Place]) -> dict[Place, Image]:
        """Read items, every byte of them checked.

        Raises:
            CorruptCheckpointError: the folder is damaged; the message names file and entry.
            StoreError: a file could not be read, or the folder was replaced meanwhile.
        """
        images = await self._unchanged(read_items(self.store, places))
        return dict(zip(places, images, strict=True))

    async def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read every item and every other file, and drop it again; raises as `read` does.

        Args:
            progress: called with how many more bytes were checked, on any thread.
        """
        await self._unchanged(verify_items(self.store, self.index.items, progress))
        for name, (nbytes, checksum) in (self.description.extras if self.description else {}).items():
            await self._unchanged(self._verify_file(name, nbytes, checksum))
            if progress is not None:
                progress(nbytes)

    async def _verify_file(self, name: str, nbytes: int, checksum: int) -> None:
        async with self.store.open(name) as file:
            found = 0
            for start in range(0, file.file.nbytes, file.chunk):
                piece = memoryview(bytearray(min(file.chunk, file.file.nbytes - start)))
                await file.read(start, piece)
                found = await in_thread(crc32, piece, found)
        if (file.file.nbytes, found) != (nbytes, checksum):
            raise CorruptCheckpointError(
                f"its file {name} ({nbytes:,} bytes) is damaged; use another checkpoint"
            )

    async def _unchanged(self, reading: Awaitable[R]) -> R:
        """Return what was read, all of it of this folder and not of one that has replaced it."""
        try:
            result = await reading
        except (CorruptCheckpointError, FileNotFoundError) as error:
            await self.refuse_replaced()
            if isinstance(error, CorruptCheckpointError):
                raise named(error, self.path) from error
            lost = error.filename or error
            raise CorruptCheckpointError(
                f"{self.path}: its file {lost} is missing; use another checkpoint"
            ) from error
        await self.refuse_replaced()
        return result

    async def refuse_replaced(self) -> None:
        """Raise CheckpointNotFoundError if another folder has taken the name, or none has it any more."""
        try:
            version = (await self.store.stat(FOLDER_MARK)).version
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(f"{self.path} was removed while it was read") from error
        if version != self.version:
            raise FolderReplacedError(f"{self.path} was replaced while it was read; read it again")


class FolderReplacedError(CheckpointNotFoundError):
    """A folder was replaced while it was read: the one that was opened is gone."""


async def open_folder(store: Store, name: str) -> Folder:
    """Read the metadata of a folder, unpickled without running anything of it.

    Raises:
        CheckpointNotFoundError: there is no such folder.
        FolderReplacedError: it was replaced meanwhile.
        CorruptCheckpointError: its metadata is damaged.
        StoreError: it could not be read.
    """
    where = store.path_of(name)
    files = store.folder(name)
    try:
        async with files.open(FOLDER_MARK) as mark:
            size = mark.file.nbytes
            description = await mark.answer(read_mark(size))
            data = bytearray(_checked(size))
            await mark.read(0, memoryview(data))
        return await in_thread(_opened, where, files, mark.file.version, description, bytes(data))
    except CorruptCheckpointError as error:
        raise named(error, where) from error
    except FileNotFoundError as error:
        try:
            await files.stat(FOLDER_MARK)
        except FileNotFoundError:
            raise CheckpointNotFoundError(f"there is no checkpoint {where}") from error
        raise FolderReplacedError(f"{where} was replaced while it was read; read it again") from error


def _checked(size: int) -> int:
    if size > _MAX_MARK:
        raise CorruptCheckpointError(f"its .metadata has {size:,} bytes, more than any state needs")
    return size


def _opened(where: str, files: Store, version: str, description: Description | None, data: bytes) -> Folder:
    index = index_of(load_metadata(unseal(data), where))
    nbytes = len(data) + sum(place.length for place in index.items)
    if description is None:
        checkpoint = Checkpoint(None, where, {}, nbytes)
    else:
        checkpoint = checkpoint_of(where, description, description.nbytes or 0)  # as it is listed
    return Folder(where, files, version, description, checkpoint, index)


async def with_folder(read: Callable[[Folder], Awaitable[R]], store: Store, name: str) -> R:
    """Open a folder for `read`, again if it is replaced meanwhile.

    Raises:
        StoreError: it was replaced again and again.
        CheckpointNotFoundError, CorruptCheckpointError: what `open_folder` and `read` raise.
    """
    for _ in range(ATTEMPTS):
        try:
            return await read(await open_folder(store, name))
        except FolderReplacedError:
            continue
    raise replaced_error(store.path_of(name))


def replaced_error(where: str) -> StoreError:
    """Return the error for a checkpoint that is replaced whenever it is read."""
    return StoreError(errno.EAGAIN, f"{where} was replaced in each of {ATTEMPTS} attempts to read it", where)
