"""Which checkpoints a directory holds: its listing, and what each file says of itself."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from asyncckpt.errors import CorruptCheckpointError, StoreError
from asyncckpt.layout.description import Description
from asyncckpt.layout.zip_reader import read_description
from asyncckpt.reader import answer
from asyncckpt.threads import for_each
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from asyncckpt.stores.base import Store, StoredFile

logger = logging.getLogger("asyncckpt")

# Descriptions are small reads: more of them at once than of bulk reads.
READERS = 8


class _UnreadableError(Exception):
    """A file could not be read this time; the next listing tries again."""


class Catalog:
    """The committed checkpoints of a store.

    There is no index that could disagree with the directory: each call lists it. A file is read (its end, in
    two small reads at most) only when its version is new.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[str, Checkpoint | None]] = {}

    async def checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints in order of commit. Files without our description are none."""
        files = await self._store.list()
        found = {file.name: self._known[file.name] for file in files if self._is_known(file)}

        async def read(file: StoredFile) -> None:
            with contextlib.suppress(_UnreadableError):
                found[file.name] = (file.version, await self._listed(file))

        await for_each(read, [file for file in files if file.name not in found], READERS)
        self._known = found
        listed = [checkpoint for _, checkpoint in found.values() if checkpoint is not None]
        return sorted(listed, key=lambda c: (c.sequence, c.created, c.path))

    def _is_known(self, file: StoredFile) -> bool:
        known = self._known.get(file.name)
        return known is not None and known[0] == file.version

    async def _listed(self, file: StoredFile) -> Checkpoint | None:
        try:
            checkpoint = await _read_checkpoint(self._store, file)
        except FileNotFoundError:  # removed since it was listed
            return None
        except CorruptCheckpointError as error:
            logger.debug("%s is not listed: %s", self._store.path_of(file.name), error)
            return None
        except StoreError as error:
            logger.warning("%s cannot be read and is not listed: %s", self._store.path_of(file.name), error)
            raise _UnreadableError from error
        return None if checkpoint is None or checkpoint.step is None else checkpoint


async def describe(store: Store, name: str) -> Checkpoint:
    """Return what one file is; little more than its size if it was not written by asyncckpt."""
    file = await store.stat(name)
    return await _read_checkpoint(store, file) or Checkpoint(None, store.path_of(name), {}, file.nbytes)


async def is_described(store: Store, name: str) -> bool:
    """Return whether a file was written by asyncckpt: whether it says so itself."""
    file = await store.stat(name)
    return await answer(read_description(file.nbytes), store, file.name) is not None


async def read_described(store: Store, file: StoredFile) -> Description | None:
    """Return what a file says of itself; None if it was not written by asyncckpt."""
    record = await answer(read_description(file.nbytes), store, file.name)
    return None if record is None else Description.decode(record)


async def _read_checkpoint(store: Store, file: StoredFile) -> Checkpoint | None:
    description = await read_described(store, file)
    return None if description is None else checkpoint_of(store, file.name, description, file.nbytes)


def checkpoint_of(store: Store, name: str, description: Description, nbytes: int) -> Checkpoint:
    """Return the checkpoint that a file with this description is."""
    return Checkpoint(
        description.step,
        store.path_of(name),
        description.metrics,
        nbytes,
        description.created,
        description.sequence,
    )
