"""The destination of a save of many ranks: a folder in the format of DCP, with one data file a rank."""

from __future__ import annotations

import json
import struct
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncckpt._checksum import crc32
from asyncckpt._saving.targets import Target, write_plan
from asyncckpt._threads import in_thread
from asyncckpt.errors import RankError
from asyncckpt.layout.description import checkpoint_of
from asyncckpt.layout.folder_mark import seal
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from asyncckpt._ranks.round import Round
    from asyncckpt._saving.series_writer import SeriesWriter
    from asyncckpt._saving.staging import Snapshot
    from asyncckpt._sharding.planning import GlobalPlan, Kept
    from asyncckpt.layout.description import Description
    from asyncckpt.layout.item_file import ItemPlan
    from asyncckpt.stores.base import FolderDraft, Store
    from asyncckpt.types import Offsets, SaveStats

# Size of the file, number of tensors or -1 if rank 0 knows where they lie.
_REPORT = struct.Struct("<qq")
# Seconds in which the other ranks learn the outcome before this process, which may host the store, goes on.
_LINGERS = 10.0


@dataclass(slots=True, eq=False)
class SharedPlan:
    """What the ranks have agreed that each of them writes; it serves as long as the state stays alike.

    Attributes:
        fingerprint: of this rank's state.
        kept: what this rank writes.
        final: on rank 0: what all ranks write.
        extents: on rank 0: offset and length of the tensors in each rank's file.
        told: the extents of this rank's tensors that rank 0 knows; None if it may know others.
    """

    fingerprint: Any
    kept: Kept
    final: GlobalPlan | None = None
    extents: dict[int, Offsets] = field(default_factory=dict)
    told: Offsets | None = None
    _sent: Offsets | None = None

    def report(self, plan: ItemPlan | None) -> bytes:
        """Return what rank 0 has to know of this rank's file; None if it has none."""
        if plan is None:
            return _REPORT.pack(0, 0)
        count = len(plan.body.starts)
        self._sent = plan.extents[:count]
        # A tensor with other strides has another record, which may be longer.
        if is_known := self.told is not None and np.array_equal(self.told, self._sent):
            extents = plan.extents[count:]
        else:
            self.told, extents = None, plan.extents
        return _REPORT.pack(plan.size, -1 if is_known else count) + extents.astype("<i8").tobytes()

    def note_commit(self) -> None:
        """Note that rank 0 knows the extents that were reported last."""
        self.told = self._sent

    def note_reports(self, reports: Sequence[bytes]) -> tuple[list[Offsets], int]:
        """Return the extents of all items in each rank's file, and the size of all files; on rank 0."""
        found, total = [], 0
        for rank, report in enumerate(reports):
            size, count = _REPORT.unpack_from(report)
            extents = np.frombuffer(report, "<i8", offset=_REPORT.size).reshape(-1, 2)
            if count >= 0:
                self.extents[rank], extents = extents[:count], extents[count:]
            found.append(np.concatenate((self.extents[rank], extents)))
            total += size
        return found, total


@dataclass(slots=True, eq=False)
class ShardedTarget(Target):
    """A folder that all ranks write together, and rank 0 commits.

    Attributes:
        store, name: the folder.
        description: what it says of itself; a series adds the sequence number.
        agree: waits until all ranks take part; returns what they tell each other of this save.
        rank: of this process.
        plan: what each rank writes.
        series: the series that numbers and evicts; None for a single folder, and on other ranks than 0.
        extras: other files of the folder, by name; written by rank 0.
    """

    store: Store
    name: str
    description: Description
    agree: Callable[[], Round]
    rank: int
    plan: SharedPlan
    series: SeriesWriter | None = None
    extras: Mapping[str, bytes] = field(default_factory=dict)
    round: Round = field(init=False)

    @property
    def path(self) -> str:  # type: ignore[override]
        return self.store.path_of(self.name)

    def confirm(self) -> None:
        self.round = self.agree()

    async def write(self, snapshot: Snapshot, stats: SaveStats) -> Checkpoint:
        """Write this rank's file, and wait until the folder is committed.

        Raises:
            RankError: the save has failed on another rank.
        """
        async with self._failing():
            if self.rank == 0:
                return await self._lead(snapshot, stats)
            return await self._follow(snapshot, stats)

    @asynccontextmanager
    async def _failing(self) -> AsyncIterator[None]:
        """Fail the save on all ranks if this rank fails; raise what has failed first."""
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
            await in_thread(self.round.fail, why)
            first = self.round.error
            if (
                first is None
                or not isinstance(error, Exception)
                or str(first).startswith(f"rank {self.rank}: ")
            ):
                raise
            raise first from error  # the folder may have been removed for that reason

    async def evict(self, committed: Checkpoint) -> None:
        """Remove older checkpoints, once all ranks know of this one."""
        if self.rank == 0:
            await in_thread(self.round.linger, _LINGERS)
        if self.series is not None:
            await self.series.evict(committed)

    async def _lead(self, snapshot: Snapshot, stats: SaveStats) -> Checkpoint:
        description = self.description
        if self.series is None:
            await self.store.prepare()
        else:
            description = await self.series.number(self.name, description)
        # The other ranks learn of a failure before the folder is removed, in which they write.
        async with self.store.folder_draft(self.name) as folder, self._failing():
            await in_thread(self.round.begin, folder.attempt)
            for name, data in self.extras.items():
                await _write_file(folder, folder.member(name), data)
            report = await self._write_part(folder, snapshot, stats)
            await in_thread(self.round.report, report)
            reports = await in_thread(self.round.reports)
            written = time.perf_counter()
            description, mark = await in_thread(self._mark, folder, reports, description)
            await folder.commit(mark)
            stats.commit += time.perf_counter() - written
        self.plan.note_commit()
        checkpoint = checkpoint_of(self.path, description, description.nbytes or 0)
        with suppress(RankError):  # it is committed, whether the others learn of it or not
            await in_thread(self.round.end, json.dumps(asdict(checkpoint)))
        return checkpoint

    async def _follow(self, snapshot: Snapshot, stats: SaveStats) -> Checkpoint:
        attempt = await in_thread(self.round.begun)
        async with self.store.join_folder(self.name, attempt) as folder:
            report = await self._write_part(folder, snapshot, stats)
        await in_thread(self.round.report, report)
        outcome = json.loads(await in_thread(self.round.outcome))
        self.plan.note_commit()
        return Checkpoint(**outcome | {"path": self.path})

    async def _write_part(self, folder: FolderDraft, snapshot: Snapshot, stats: SaveStats) -> bytes:
        """Write the file of this rank durably; return its report."""
        plan: Any = await in_thread(snapshot.plan, b"")
        if not plan.size:
            await in_thread(snapshot.settle)
            return self.plan.report(None)
        await write_plan(plan, snapshot, folder.store, folder.member(data_file(self.rank)), stats)
        return self.plan.report(plan)

    def _mark(
        self, folder: FolderDraft, reports: Sequence[bytes], description: Description
    ) -> tuple[Description, bytes]:
        """Return the description of the folder, and the content of its mark."""
        final = self.plan.final
        assert final is not None  # noqa: S101 - this is rank 0
        extents, nbytes = self.plan.note_reports(reports)
        files = [data_file(rank) for rank in range(len(reports))]
        prefix = folder.member(files[0]).removesuffix(files[0])
        extras = {folder.member(name): (len(data), crc32(data)) for name, data in self.extras.items()}
        nbytes += sum(map(len, self.extras.values()))
        description = replace(description, nbytes=nbytes, ranks=len(reports), extras=extras)
        return description, seal(final.write(prefix, files, extents), description.encode())


def data_file(rank: int) -> str:
    """Return the name of a rank's data file, as stock DCP calls it."""
    return f"__{rank}_0.distcp"


async def _write_file(folder: FolderDraft, name: str, data: bytes) -> None:
    """Write a small file into a folder, durably."""
    async with folder.store.draft(name, len(data)) as draft:
        for offset in range(0, len(data), draft.chunk):
            await draft.write(offset, memoryview(data)[offset : offset + draft.chunk])
        await draft.commit()
