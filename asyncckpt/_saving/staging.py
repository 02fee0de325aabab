"""Take snapshots: freeze a state, lease host memory for it, copy it there."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asyncckpt._saving.weights_only import WeightsOnlyCheck
from asyncckpt._snapshot.copy import Watermark, copy_ranges
from asyncckpt._snapshot.deferred import DeferredCopy, Overlap, defer
from asyncckpt._snapshot.freeze import Freezer
from asyncckpt._snapshot.ranges import Ranges
from asyncckpt.errors import SaveError, warn_caller
from asyncckpt.layout.torch_zip import TorchZip

if TYPE_CHECKING:
    from asyncckpt._snapshot.arena import Arena, Lease
    from asyncckpt._snapshot.frozen import FrozenState
    from asyncckpt.layout.plan import Body, FilePlan, Format
    from asyncckpt.types import SaveStats

    # What the format has to know of a state, and what is to be copied of it.
    Frozen = tuple[Any, Ranges]

# Objects and numpy arrays are pickled on the training thread; from this size on a warning says so.
INLINE_WARNING = 64 << 20


@dataclass(slots=True, eq=False)
class Snapshot:
    """A state at one instant: frozen from the start, in host memory once `copy` has returned.

    Attributes:
        format: format of the file.
        frozen: the state without the bytes of its ranges, as the format needs it.
        body: offsets of the ranges, the same in `lease` and in the file.
        lease: the host buffer; released by the owner of the snapshot.
        stats: `copy` is set.
        ranges: the ranges to copy; empty once the copy has ended.
        overlap: what may be copied after `copy` has returned; None for nothing.
        filled: progress and end of the copy.
        deferred: what is copied after `copy` has returned, if something is.
    """

    format: Format[Any, Any]
    frozen: Any
    body: Body
    lease: Lease
    stats: SaveStats
    ranges: Ranges = field(repr=False)
    overlap: Overlap | None = None
    filled: Watermark = field(default_factory=Watermark)
    deferred: DeferredCopy | None = field(default=None, init=False)

    def copy(self) -> None:
        """Copy the ranges into the lease, but for those that are deferred.

        The state may be changed once this has returned; what is deferred by its optimizers only.

        Raises:
            SaveError: a range could not be copied.
        """
        began = time.perf_counter()
        starts = self.body.starts.tolist()
        try:
            if self.overlap is not None:
                self.deferred = defer(self.ranges, starts, self.lease, self.filled, self.stats, self.overlap)
            if self.deferred is None:
                copy_ranges(self.ranges, starts, self.lease, self.filled)
        except BaseException as error:
            failure = SaveError(f"could not copy the state to host memory: {error}")
            self.filled.end(failure)
            if isinstance(error, Exception):
                raise failure from error
            raise
        self.stats.copy = time.perf_counter() - began
        self.ranges = Ranges([], [], [], [])
        if self.deferred is None:
            self.filled.advance(self.body.nbytes)
            self.end_copy()

    def settle(self) -> None:
        """Raise TornSnapshotError if something changed what was deferred; called once all is copied."""
        if self.deferred is not None:
            self.deferred.settle()

    def end_copy(self) -> None:
        """End the copy, complete or not, and drop the references to the state."""
        if self.deferred is not None:
            self.deferred.cancel()
        self.ranges = Ranges([], [], [], [])
        self.filled.end(SaveError("the copy of the state to host memory was interrupted"))

    def release(self) -> None:
        """Give the host buffer back, and fence nothing any more; called once the copy has ended."""
        if self.deferred is not None:
            self.deferred.cancel()
        self.lease.release()

    def plan(self, description: bytes) -> FilePlan:
        """Plan the file; too slow for the training thread."""
        return self.format.plan(self.frozen, self.body, description)


class Stager(ABC):
    """Take snapshots in one format.

    Args:
        arena: the host memory for the copies.
        layout: the format; it keeps what successive states share.
    """

    def __init__(self, arena: Arena, layout: Format[Any, Any]) -> None:
        self.arena = arena
        self._layout = layout

    @abstractmethod
    def freeze(self, state: Any, stats: SaveStats) -> Frozen:
        """Decide everything about a snapshot but the bytes of its ranges; return that, and the ranges.

        Raises:
            SaveError: the state cannot be saved; the message gives the path of the entry.
        """

    @abstractmethod
    def pins(self, frozen: Any) -> bool:
        """Return whether a part of a frozen state is on a CUDA device."""

    def stage(
        self,
        frozen: tuple[Any, Ranges],
        stats: SaveStats,
        overlap: Overlap | None = None,
        *,
        wait: bool = True,
    ) -> Snapshot:
        """Lease host memory for a frozen state; `Snapshot.copy` fills it.

        Raises:
            SaveError: the state exceeds the memory limit.
            BusyError: the memory is in use, and `wait` is false.
        """
        began = time.perf_counter()
        state, ranges = frozen
        body = self._layout.lay_out(state)
        leasing = time.perf_counter()
        stats.freeze += leasing - began
        lease = self.arena.lease(body.nbytes, pinned=self.pins(state), wait=wait)
        snapshot = Snapshot(self._layout, state, body, lease, stats, ranges, overlap)
        stats.wait += time.perf_counter() - leasing
        return snapshot

    def reserve(self, frozen: Any, count: int) -> int:
        """Allocate host memory for `count` snapshots of a frozen state; return the size of one in bytes."""
        nbytes: int = self._layout.lay_out(frozen).nbytes
        self.arena.reserve(nbytes, count, pinned=self.pins(frozen))
        return nbytes


class FileStager(Stager):
    """Take successive snapshots of one state for torch.load, reusing what did not change.

    Args:
        arena: the host memory for the copies.
        warns: whether to warn of entries that `weights_only=True` will refuse to load.
    """

    def __init__(self, arena: Arena, *, warns: bool = True) -> None:
        super().__init__(arena, TorchZip())
        self._warns = warns
        self._freezer = Freezer()
        self._check = WeightsOnlyCheck()
        self._warned = False

    def freeze(self, state: Any, stats: SaveStats) -> tuple[FrozenState, Ranges]:
        """Pickle everything but the tensors' bytes."""
        began = time.perf_counter()
        frozen = self._freezer.freeze(state)
        stats.freeze += time.perf_counter() - began
        return frozen

    def pins(self, frozen: FrozenState) -> bool:
        return any(location.startswith("cuda") for location in set(frozen.locations))

    def stage(
        self,
        frozen: tuple[Any, Ranges],
        stats: SaveStats,
        overlap: Overlap | None = None,
        *,
        wait: bool = True,
    ) -> Snapshot:
        self._warn(frozen[0])
        return super().stage(frozen, stats, overlap, wait=wait)

    def _warn(self, frozen: FrozenState) -> None:
        nbytes = len(frozen.pickled)
        if nbytes > INLINE_WARNING and not self._warned:
            self._warned = True
            warn_caller(
                f"{nbytes >> 20} MiB of the state are not tensors (numpy arrays, objects) and are pickled on"
                " the training thread at every save; make tensors of them to have them copied"
            )
        if self._warns and (warning := self._check.warning(frozen, self._freezer.kinds)):
            warn_caller(warning)
