"""Where a save goes, and how it gets there."""

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
    from asyncckpt.stores.base import Store
    from asyncckpt.types import Checkpoint, SaveStats


class Target(ABC):
    """Where a save goes.

    Attributes:
        path: what the user calls it.
        overlaps: whether writing may begin while the snapshot is still being copied.
    """

    path: str
    overlaps: bool = False

    @abstractmethod
    async def write(self, snapshot: Snapshot, stats: SaveStats) -> Checkpoint:
        """Write a snapshot, which may still be filling, and make it durable; the lease stays the caller's."""

    async def evict(self, committed: Checkpoint) -> None:  # noqa: B027 - most targets make room for nothing
        """Remove what the checkpoint that was just committed makes room for."""


@dataclass(slots=True, eq=False)
class FileTarget(Target):
    """A file of a store.

    Attributes:
        store, name: the file.
        description: what it says of itself.
        series: numbers it and evicts others, if it is one of a series.
    """

    store: Store
    name: str
    description: Description
    series: SeriesWriter | None = None

    @property
    def path(self) -> str:  # type: ignore[override]
        """The path or URL of the file."""
        return self.store.path_of(self.name)

    @property
    def overlaps(self) -> bool:  # type: ignore[override]
        """Whether the store's writes leave the training thread alone."""
        return self.store.overlaps

    async def write(self, snapshot: Snapshot, stats: SaveStats) -> Checkpoint:
        """Plan the file, carry the plan out, and commit it."""
        if self.series is None:
            await self.store.prepare()
            description = self.description
        else:
            description = await self.series.number(self.name, self.description)
        plan = await in_thread(snapshot.plan, description.encode())
        transfer = Transfer(plan, snapshot.lease.view, snapshot.filled, stats)
        async with self.store.draft(self.name, plan.size) as draft:
            await transfer.into(draft)
            written = time.perf_counter()
            await draft.commit()
        stats.commit = time.perf_counter() - written
        stats.sync = draft.sync_seconds
        return checkpoint_of(self.path, description, plan.size)

    async def evict(self, committed: Checkpoint) -> None:
        """Remove what the policy of the series does not keep."""
        if self.series is not None:
            await self.series.evict(committed)
