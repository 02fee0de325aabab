"""Which checkpoints a directory holds: its listing, and what each file says of itself."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from asyncckpt._loading.reader import answer
from asyncckpt._threads import for_each
from asyncckpt.errors import CorruptCheckpointError, StoreError
from asyncckpt.layout.description import Description, checkpoint_of
from asyncckpt.layout.zip_reader import read_description

if TYPE_CHECKING:
    from asyncckpt.stores.base import OpenFile, Store, StoredFile
    from asyncckpt.types import Checkpoint

logger = logging.getLogger("asyncckpt")

# Descriptions are small reads: more of them at once than of bulk reads.
READERS = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a directory.

    Attributes:
        file: as it was listed.
        checkpoint: what it says that it is; None if it has no description, or none with a step.
        error: why it cannot be a whole checkpoint, or why it could not be read this time.
    """

    file: StoredFile
    checkpoint: Checkpoint | None = None
    error: CorruptCheckpointError | StoreError | None = None


class Catalog:
    """The committed checkpoints of a store.

    There is no index that could disagree with the directory: each call lists it. A file is read (its end, in
    two small reads at most) only when its version is new.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, Entry] = {}

    async def checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints in order of commit. Files without our description are none."""
        return [entry.checkpoint for entry in await self.entries() if entry.checkpoint is not None]

    async def entries(self) -> list[Entry]:
        """Return all files, the checkpoints in order of commit."""
        vanished: set[tuple[str, str]] = set()
        while True:
            listed = await self._store.list()
            files = [file for file in listed if (file.name, file.version) not in vanished]
            found = {file.name: self._known[file.name] for file in files if self._is_known(file)}
            read = partial(self._read, found)
            await for_each(read, [file for file in files if file.name not in found], READERS)
            gone = {(file.name, file.version) for file in files if file.name not in found}
            if not gone:
                break
            # They were removed since they were listed. What took their place may not have been seen.
            vanished |= gone
        # What could not be read is tried again the next time.
        self._known = {name: e for name, e in found.items() if not isinstance(e.error, StoreError)}
        return sorted(found.values(), key=_order)

    async def _read(self, found: dict[str, Entry], file: StoredFile) -> None:
        with contextlib.suppress(FileNotFoundError):
            found[file.name] = await self._entry(file)

    def _is_known(self, file: StoredFile) -> bool:
        known = self._known.get(file.name)
        return known is not None and known.file.version == file.version

    async def _entry(self, file: StoredFile) -> Entry:
        path = self._store.path_of(file.name)
        try:
            async with self._store.open(file.name) as opened:
                description = await read_described(opened)
        except CorruptCheckpointError as error:
            logger.debug("%s is not listed: %s", path, error)
            return Entry(file, error=error)
        except StoreError as error:
            logger.warning("%s cannot be read and is not listed: %s", path, error)
            return Entry(file, error=error)
        if description is None or description.step is None:
            return Entry(opened.file)
        return Entry(opened.file, checkpoint_of(path, description, opened.file.nbytes))


async def read_described(file: OpenFile) -> Description | None:
    """Return what a file says of itself; None if it was not written by asyncckpt."""
    record = await answer(read_description(file.file.nbytes), file)
    return None if record is None else Description.decode(record)


def _order(entry: Entry) -> tuple[int, float, str]:
    checkpoint = entry.checkpoint
    return (
        (0, 0.0, entry.file.name)
        if checkpoint is None
        else (checkpoint.sequence, checkpoint.created, checkpoint.path)
    )
