"""The checkpoints of one series: those that one `filename` template names in one directory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from asyncckpt._loading.catalog import Catalog, Entry
from asyncckpt._naming import SUFFIXES
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StoreError
from asyncckpt.retention import rank

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from asyncckpt._naming import NameTemplate
    from asyncckpt.retention import Mode
    from asyncckpt.stores.base import Store
    from asyncckpt.types import Checkpoint

    # What a caller asks for: the checkpoint committed last, the best by a metric, or that of a step.
    Wanted = Literal["latest"] | tuple[str, Mode] | int

_NAMED = 3  # of other files, in a message

logger = logging.getLogger("asyncckpt")


@dataclass(frozen=True, slots=True)
class Choice:
    """The checkpoints that answer to what was asked for.

    Attributes:
        entries: the best answer first.
        damaged: files that would have come before it, were they whole; newest first.
    """

    entries: Sequence[Entry]
    damaged: Sequence[Entry]


@dataclass(frozen=True, slots=True)
class View:
    """What a directory holds, as seen from one series.

    Attributes:
        directory: its path or URL.
        names: the template of the series.
        own: the checkpoints of the series, in order of commit.
        damaged: files that have a name of the series, and are not whole or cannot be read.
        others: checkpoints of other series, and files that look like checkpoints.
    """

    directory: str
    names: NameTemplate
    own: Sequence[Entry]
    damaged: Sequence[Entry]
    others: Sequence[Entry]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints of the series, in order of commit."""
        return [entry.checkpoint for entry in self.own if entry.checkpoint is not None]

    def choose(self, wanted: Wanted) -> Choice:
        """Return what answers to `wanted`.

        Raises:
            CheckpointNotFoundError: nothing does; the message says what else there is.
        """
        if wanted == "latest":
            entries = list(reversed(self.own))
            damaged = [entry for entry in self.damaged if not entries or not _is_older(entry, entries[0])]
        elif isinstance(wanted, int):
            entries = [e for e in reversed(self.own) if e.checkpoint and e.checkpoint.step == wanted]
            named = [entry for entry in self.damaged if self.names.step_of(entry.file.name) == wanted]
            damaged = [] if entries else named
        else:
            places = {entry.checkpoint.path: entry for entry in self.own if entry.checkpoint}
            entries = [places[checkpoint.path] for checkpoint in rank(self.checkpoints, *wanted)]
            damaged = [] if entries else list(self.damaged)
        if not entries and not damaged:
            raise CheckpointNotFoundError(f"{self.directory} holds no {_text(wanted)}{self.aside()}")
        return Choice(entries, sorted(damaged, key=lambda entry: entry.file.modified, reverse=True))

    def aside(self) -> str:
        """Return what else the directory holds, to be appended to a message; nothing if it holds nothing."""
        if not self.others:
            return ""
        names = ", ".join(entry.file.name for entry in self.others[-_NAMED:])
        more = f" and {len(self.others) - _NAMED} more" if len(self.others) > _NAMED else ""
        foreign = any(entry.checkpoint is None for entry in self.others)
        advice = "; `asyncckpt adopt` describes files of torch.save" if foreign else ""
        return (
            f" named {self.names.template!r}; it also holds {names}{more}, which are not of this series: give"
            f" the path of one, or the filename of its series{advice}"
        )


class Series:
    """Finds the checkpoints of one template in one store.

    Args:
        store: the directory.
        directory: its path or URL, as the user gave it.
        names: the template.

    Attributes:
        count: how many checkpoints there were when they were last listed.
    """

    def __init__(self, store: Store, directory: str, names: NameTemplate) -> None:
        self.store = store
        self._directory = directory
        self._names = names
        self._catalog = Catalog(store)
        self._warned: set[str] = set()
        self.count = 0

    async def look(self) -> View:
        """List the directory; a damaged file of the series is logged once."""
        own: list[Entry] = []
        damaged: list[Entry] = []
        others: list[Entry] = []
        for entry in await self._catalog.entries():
            if entry.checkpoint is not None:
                (own if self._names.owns(entry.checkpoint) else others).append(entry)
            elif entry.error is not None and self._names.matches(entry.file.name):
                damaged.append(entry)
            elif PurePosixPath(entry.file.name).suffix in SUFFIXES:
                others.append(entry)
        for entry in damaged:
            if entry.file.version not in self._warned:
                self._warned.add(entry.file.version)
                logger.warning("not a whole checkpoint: %s", damage(self._directory, entry))
        self.count = len(own)
        return View(self._directory, self._names, own, damaged, others)

    async def all_checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints of every series in the directory, in order of commit."""
        return await self._catalog.checkpoints()


def damage(directory: str, entry: Entry) -> CorruptCheckpointError | StoreError:
    """Return the error that says which file is damaged or cannot be read, and why."""
    if isinstance(entry.error, StoreError):
        return entry.error
    return CorruptCheckpointError(f"{directory.rstrip('/')}/{entry.file.name}: {entry.error}")


def _is_older(damaged: Entry, whole: Entry) -> bool:
    """Return whether a damaged file was written before a whole one, as far as the store tells."""
    return 0.0 < damaged.file.modified < whole.file.modified


def _text(wanted: Wanted) -> str:
    if isinstance(wanted, int):
        return f"step {wanted}"
    return "latest checkpoint" if wanted == "latest" else f"best checkpoint by {wanted[0]!r}"
