"""Where a save goes, and how it gets there."""

from __future__ import annotations

import posixpath
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncckpt._saving.transfer import Transfer
from asyncckpt._threads import in_thread
from asyncckpt.layout.description import checkpoint_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asyncckpt._saving.save import Save
    from asyncckpt._saving.staging import Snapshot, Stager
    from asyncckpt.layout.description import Description
    from asyncckpt.stores.base import Store
    from asyncckpt.types import Checkpoint, SaveStats


class Target(ABC):
    """Where a save goes.

    Attributes:
        path: what the user calls it.
        after: awaited after the commit, once the caller has been told; for evictions.
        overlaps: whether writing may begin while the snapshot is still being copied.
    """

    path: str
    overlaps: bool = False
    after: Callable[[Checkpoint], Awaitable[None]] | None = None

    @abstractmethod
    async def write(self, stager: Stager, snapshot: Snapshot, stats: SaveStats) -> Checkpoint:
        """Write a snapshot, which may still be filling, and make it durable; the lease stays the caller's."""

    def copying(self, earlier: Target) -> Callable[[], Awaitable[Checkpoint]] | None:
        """Return what makes this a copy of a target that is written by then; None if that cannot be done."""
        del earlier
        return None


@dataclass(slots=True, eq=False)
class FileTarget(Target):
    """A file of a store.

    Attributes:
        store, name: the file.
        describe: awaited before anything is written, in the order of commits; returns what the file says of
            itself, or raises to refuse the save.
    """

    store: Store
    name: str
    describe: Callable[[], Awaitable[Description]]
    after: Callable[[Checkpoint], Awaitable[None]] | None = None

    @property
    def path(self) -> str:  # type: ignore[override]
        """The path or URL of the file."""
        return self.store.path_of(self.name)

    @property
    def overlaps(self) -> bool:  # type: ignore[override]
        """Whether the store's writes leave the training thread alone."""
        return self.store.overlaps

    async def write(self, stager: Stager, snapshot: Snapshot, stats: SaveStats) -> Checkpoint:
        """Plan the file and carry the plan out."""
        description = await self.describe()
        plan = await in_thread(stager.plan, snapshot, description.encode())
        transfer = Transfer(plan, snapshot.lease.view, snapshot.filled)
        async with self.store.draft(self.name, plan.size) as draft:
            await transfer.into(draft)
            written = time.perf_counter()
            await draft.commit()
        stats.commit = time.perf_counter() - written
        stats.sync = draft.sync_seconds
        stats.checksum, stats.write = transfer.checksum_seconds, transfer.write_seconds
        return checkpoint_of(self.path, description, plan.size)

    def copying(self, earlier: Target) -> Callable[[], Awaitable[Checkpoint]] | None:
        """Let the store copy the file, which costs no bytes where it has links."""
        if not isinstance(earlier, FileTarget) or type(earlier.store) is not type(self.store):
            return None
        source = posixpath.relpath(earlier.path, posixpath.dirname(self.path))

        async def copy() -> Checkpoint:
            description = await self.describe()
            await self.store.copy(source, self.name)
            nbytes = (await self.store.stat(self.name)).nbytes
            return checkpoint_of(self.path, description, nbytes)

        return copy


async def copy_or_write(
    source: Save,
    copy: Callable[[], Awaitable[Checkpoint]],
    write: Callable[[], Awaitable[Checkpoint]],
) -> Checkpoint:
    """Copy the file of a save that was carried out before, or write it anew if that is not there."""
    if source.committed.failed():
        return await write()
    try:
        return await copy()
    except FileNotFoundError:
        return await write()
