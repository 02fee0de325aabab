"""List a directory: what each checkpoint says of itself, and which of them belong to one series."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from asyncckpt._naming import SUFFIXES
from asyncckpt._threads import for_each
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StoreError
from asyncckpt.layout.description import checkpoint_of
from asyncckpt.layout.folder_mark import read_mark
from asyncckpt.layout.zip_reader import read_description
from asyncckpt.retention import rank
from asyncckpt.stores.base import FOLDER_MARK

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from asyncckpt._naming import NameTemplate
    from asyncckpt.layout.description import Description
    from asyncckpt.retention import Mode
    from asyncckpt.stores.base import OpenFile, Store, StoredFile
    from asyncckpt.types import Checkpoint

    # What a caller asks for: the checkpoint committed last, the best by a metric, or that of a step.
    Wanted = Literal["latest"] | tuple[str, Mode] | int

# Descriptions are small reads: more of them at once than of bulk reads.
READERS = 8
_LISTED = 3  # names of other files in a message

logger = logging.getLogger("asyncckpt")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a directory, or a folder with the files of many ranks.

    Attributes:
        file: as it was listed; size and time of a folder are those of its mark.
        checkpoint: what its description says; None without a description, or without a step in it.
        error: why it is not a whole checkpoint, or could not be read this time; names the file.
        is_folder: whether it is a folder.
    """

    file: StoredFile
    checkpoint: Checkpoint | None = None
    error: CorruptCheckpointError | StoreError | None = None
    is_folder: bool = False


_Key = tuple[str, bool]  # name, and whether it is a folder: an object store may have both


class Catalog:
    """The files and folders of a store, with their descriptions.

    There is no index that could disagree with the directory: each call lists it. A file is read (its end, in
    two small reads at most) only when its version is new.

    Args:
        store: the directory.
        names: template of the series whose damaged files are logged as warnings.
    """

    def __init__(self, store: Store, names: NameTemplate | None = None) -> None:
        self._store = store
        self._names = names
        self._known: dict[_Key, Entry] = {}

    async def entries(self) -> list[Entry]:
        """Return all files and folders, the checkpoints in order of commit."""
        vanished: set[tuple[_Key, str]] = set()
        while True:
            files = [Entry(file) for file in await self._store.list()]
            folders = [Entry(file, is_folder=True) for file in await self._store.list_folders()]
            listed = {_key(entry): entry for entry in (*files, *folders)}
            listed = {key: e for key, e in listed.items() if (key, e.file.version) not in vanished}
            new = [entry for entry in listed.values() if not self._is_known(entry)]
            found = {key: self._known[key] for key, entry in listed.items() if self._is_known(entry)}
            found |= {_key(entry): entry for entry in await for_each(self._read, new, READERS) if entry}
            # What could not be read is tried again the next time.
            self._known = {key: e for key, e in found.items() if not isinstance(e.error, StoreError)}
            gone = {(_key(entry), entry.file.version) for entry in new if _key(entry) not in found}
            if not gone:
                return sorted(found.values(), key=_order)
            # They were removed after the listing, which may lack their replacements: list again.
            vanished |= gone

    def _is_known(self, entry: Entry) -> bool:
        known = self._known.get(_key(entry))
        return known is not None and known.file.version == entry.file.version

    async def _read(self, listed: Entry) -> Entry | None:
        """Return an entry with its description; None if the file or folder is gone."""
        file = listed.file
        path = self._store.path_of(file.name)
        try:
            file, description, nbytes = await (
                self._described_folder(file) if listed.is_folder else self._described_file(file)
            )
        except FileNotFoundError:
            return None
        except CorruptCheckpointError as error:
            is_own = self._names is not None and self._names.matches(file.name)
            level = logging.WARNING if is_own else logging.DEBUG
            logger.log(level, "%s is not a whole checkpoint: %s", path, error)
            return replace(listed, error=CorruptCheckpointError(f"{path}: {error}"))
        except StoreError as error:
            logger.warning("%s cannot be read and is not listed: %s", path, error)
            return replace(listed, error=error)
        if description is None or description.step is None:
            return replace(listed, file=file)
        return replace(listed, file=file, checkpoint=checkpoint_of(path, description, nbytes))

    async def _described_file(self, file: StoredFile) -> tuple[StoredFile, Description | None, int]:
        """Return a file as it was opened, its description and its size."""
        async with self._store.open(file.name) as opened:
            return opened.file, await read_described(opened), opened.file.nbytes

    async def _described_folder(self, folder: StoredFile) -> tuple[StoredFile, Description | None, int]:
        """Return a folder as it was opened, its description and the size of its files."""
        async with self._store.folder(folder.name).open(FOLDER_MARK) as mark:
            description = await mark.answer(read_mark(mark.file.nbytes))
        nbytes = description.nbytes or 0 if description else 0
        return replace(mark.file, name=folder.name), description, nbytes


async def read_described(file: OpenFile) -> Description | None:
    """Return the description of a file; None if asyncckpt did not write it."""
    return await file.answer(read_description(file.file.nbytes))


@dataclass(frozen=True)
class Series:
    """A directory as seen from one series: the checkpoints that one `filename` template names.

    Attributes:
        directory: its path or URL.
        names: the template.
        entries: all files of the directory, the checkpoints in order of commit.
    """

    directory: str
    names: NameTemplate
    entries: Sequence[Entry]

    @cached_property
    def own(self) -> list[Entry]:
        """The checkpoints of the series, in order of commit."""
        return [entry for entry in self.entries if entry.checkpoint and self.names.owns(entry.checkpoint)]

    @cached_property
    def damaged(self) -> list[Entry]:
        """Files with a name of the series that are not whole or cannot be read, newest first."""
        found = [entry for entry in self.entries if entry.error and self.names.matches(entry.file.name)]
        return sorted(found, key=lambda entry: entry.file.modified, reverse=True)

    @cached_property
    def others(self) -> list[Entry]:
        """Checkpoints of other series, other files with the suffix of one, and other writers' folders."""
        mine = {_key(entry) for entry in (*self.own, *self.damaged)}
        return [
            entry
            for entry in self.entries
            if _key(entry) not in mine
            and (entry.checkpoint or entry.is_folder or PurePosixPath(entry.file.name).suffix in SUFFIXES)
        ]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints of the series, in order of commit."""
        return [entry.checkpoint for entry in self.own if entry.checkpoint]

    @property
    def all_checkpoints(self) -> list[Checkpoint]:
        """The checkpoints of every series, in order of commit."""
        return [entry.checkpoint for entry in self.entries if entry.checkpoint]

    def find(self, wanted: Wanted) -> list[Entry]:
        """Return what answers to `wanted`, the best answer first.

        Damaged files that would precede it, were they whole, come before it.

        Raises:
            CheckpointNotFoundError: nothing does; the message says what else there is.
        """
        damaged: list[Entry]
        if wanted == "latest":
            whole = self.own[::-1]
            damaged = [entry for entry in self.damaged if not whole or not _is_older(entry, whole[0])]
        elif isinstance(wanted, int):
            whole = [
                entry for entry in self.own[::-1] if entry.checkpoint and entry.checkpoint.step == wanted
            ]
            damaged = [entry for entry in self.damaged if self.names.step_of(entry.file.name) == wanted]
            damaged = [] if whole else damaged
        else:
            by_path = {entry.checkpoint.path: entry for entry in self.own if entry.checkpoint}
            whole = [by_path[checkpoint.path] for checkpoint in rank(self.checkpoints, *wanted)]
            damaged = [] if whole else self.damaged
        if not whole and not damaged:
            raise CheckpointNotFoundError(f"{self.directory} holds no {_text(wanted)}{self._aside()}")
        return [*damaged, *whole]

    def _aside(self) -> str:
        """Return what else the directory holds, to be appended to a message."""
        if not self.others:
            return ""
        names = ", ".join(entry.file.name for entry in self.others[-_LISTED:])
        more = f" and {len(self.others) - _LISTED} more" if len(self.others) > _LISTED else ""
        is_foreign = any(entry.checkpoint is None and not entry.is_folder for entry in self.others)
        advice = "; `asyncckpt adopt` describes files of torch.save" if is_foreign else ""
        return (
            f" named {self.names.template!r}; it also holds {names}{more}, which are not of this series: give"
            f" the path of one, or the filename of its series{advice}"
        )


def _is_older(damaged: Entry, whole: Entry) -> bool:
    """Return whether a damaged file was written before a whole one, as far as the store says."""
    return 0.0 < damaged.file.modified < whole.file.modified


def _text(wanted: Wanted) -> str:
    if isinstance(wanted, int):
        return f"step {wanted}"
    return "latest checkpoint" if wanted == "latest" else f"best checkpoint by {wanted[0]!r}"


def _key(entry: Entry) -> _Key:
    return entry.file.name, entry.is_folder


def _order(entry: Entry) -> tuple[int, float, str]:
    checkpoint = entry.checkpoint
    if checkpoint is None:
        return 0, 0.0, entry.file.name
    return checkpoint.sequence, checkpoint.created, checkpoint.path
