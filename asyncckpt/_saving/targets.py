"""Destinations of saves."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncckpt._saving.transfer import Transfer
from asyncckpt._threads import in_thread
from asyncckpt.layout.description import checkpoint_of

if TYPE_CHECKING:
    from asyncckpt._saving.series_writer import SeriesWriter
    from asyncckpt._saving.staging import Snapshot
    from asyncckpt.layout.description import Description
    from asyncckpt.layout.plan import FilePlan
    from asyncckpt.stores.base import Store
    from asyncckpt.types import Checkpoint, SaveStats


class Target(ABC):
    """Destination of a save.

    Attributes:
        path: path or URL, as users see it.
        overlaps: whether writing may begin during the copy of the snapshot.
    """

    path: str
    overlaps: bool = False

    @abstractmethod
    async def write(self, snapshot: Snapshot, stats: SaveStats) -> Checkpoint:
        """Write a snapshot durably; its copy may still be running, and the caller releases its lease."""

    def confirm(self) -> None:  # noqa: B027 - most targets have nothing to wait for
        """Return once the snapshot may be written; called on the training thread, behind the copy.

        It raises if the snapshot is to be dropped.
        """

    async def evict(self, committed: Checkpoint) -> None:  # noqa: B027 - most targets have nothing to evict
        """Remove older checkpoints after a commit."""


@dataclass(slots=True, eq=False)
class FileTarget(Target):
    """A file of a store.

    Attributes:
        store, name: the file.
        description: the metadata in the file; a series adds the sequence number.
        series: the series that numbers and evicts files; None for a single file.
    """

    store: Store
    name: str
    description: Description
    series: SeriesWriter | None = None

    @property
    def path(self) -> str:  # type: ignore[override]
        return self.store.path_of(self.name)

    @property
    def overlaps(self) -> bool:  # type: ignore[override]
        """Whether writes of the store do not slow the training thread down."""
        return self.store.overlaps

    async def write(self, snapshot: Snapshot, stats: SaveStats) -> Checkpoint:
        """Plan, write and commit the file."""
        if self.series is None:
            await self.store.prepare()
            description = self.description
        else:
            description = await self.series.number(self.name, self.description)
        plan = await in_thread(snapshot.plan, description.encode())
        await write_plan(plan, snapshot, self.store, self.name, stats)
        return checkpoint_of(self.path, description, plan.size)

    async def evict(self, committed: Checkpoint) -> None:
        if self.series is not None:
            await self.series.evict(committed)


async def write_plan(plan: FilePlan, snapshot: Snapshot, store: Store, name: str, stats: SaveStats) -> None:
    """Write the planned file of a snapshot, and commit it; the copy of the snapshot may still be running."""
    transfer = Transfer(plan, snapshot.lease.view, snapshot.filled, stats)
    async with store.draft(name, plan.size) as draft:
        await transfer.into(draft)
        await in_thread(snapshot.settle)
        written = time.perf_counter()
        await draft.commit()
    stats.commit = time.perf_counter() - written
    stats.sync = draft.sync_seconds
