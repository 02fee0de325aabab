"""Adopt folders of stock DCP into a series: the metadata of each get a description behind them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from asyncckpt._inspection.memory_file import MemoryFile
from asyncckpt._loading.folder import with_folder
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.layout.description import Description
from asyncckpt.layout.folder_mark import seal
from asyncckpt.stores.base import FOLDER_MARK, copy_into

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._loading.folder import Folder
    from asyncckpt.stores.base import Store
    from asyncckpt.types import Checkpoint

_UNKNOWN = {"torch": "unknown", "python": "unknown"}  # versions that wrote a folder without a description
_RANK = re.compile(r"__(\d+)_\d+\.distcp")  # how DCP names the files of a rank


async def adopt_folder(
    store: Store,
    found: Checkpoint,
    progress: Callable[[int], None] | None = None,
    *,
    dry_run: bool = False,
) -> None:
    """Give a folder a description, atomically: until the commit the folder is as it was.

    Every item is read and checked; then the metadata file is replaced, and nothing else.

    Args:
        store: where the folder is.
        found: the step, metrics and sequence number that its description gets.
        progress: called with how many more bytes were read, on any thread.
        dry_run: do all but writing.

    Raises:
        CheckpointNotFoundError: it was removed or replaced meanwhile.
        CorruptCheckpointError: it is damaged, has no checksums, or has a description.
        StoreError: it could not be read or written.
    """

    async def adopt(folder: Folder) -> None:
        if folder.description is not None:
            raise CorruptCheckpointError(f"{folder.path}: it has a description already")
        await folder.verify(progress)
        if not dry_run:
            await _describe(folder, found)

    await with_folder(adopt, store, found.path.rpartition("/")[2])


async def _describe(folder: Folder, found: Checkpoint) -> None:
    files = [file for file in await folder.store.list() if file.name != FOLDER_MARK]
    names = {place.file for place in folder.index.items}
    ranks = {match[1] if (match := _RANK.search(name)) else name for name in names}
    description = Description(
        found.sequence, found.step, found.metrics, found.created, _UNKNOWN, found.filename,
        nbytes=sum(file.nbytes for file in files), ranks=len(ranks),
    )  # fmt: skip
    async with folder.store.open(FOLDER_MARK) as mark:
        data = bytearray(mark.file.nbytes)
        await mark.read(0, memoryview(data))
    sealed = seal(bytes(data), description.encode())
    async with folder.store.draft(FOLDER_MARK, len(sealed)) as draft:
        await copy_into(draft, MemoryFile(folder.path, memoryview(sealed)))
        if (await folder.store.stat(FOLDER_MARK)).version != folder.version:
            raise CheckpointNotFoundError(f"{folder.path} was replaced while it was read")
        await draft.commit()
