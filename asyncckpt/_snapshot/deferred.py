"""Copy what holds still until a fence in the background, after `save` has returned."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from threading import Thread
from typing import TYPE_CHECKING, Any

from asyncckpt._snapshot import fences
from asyncckpt._snapshot.copy import (
    SMALL,
    Watermark,
    close_on_error,
    copy_ranges,
    gather,
    open_lanes,
    pieces_of,
)
from asyncckpt._snapshot.cuda_lane import CudaLane
from asyncckpt._snapshot.guard import Checksums, Guard, torn_error
from asyncckpt._snapshot.owners import Coverage, changes
from asyncckpt._snapshot.range_copy import RangeCopy
from asyncckpt._threads import Condition, start_threads
from asyncckpt.errors import BusyError, SaveError, TornSnapshotError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from torch.storage import UntypedStorage

    from asyncckpt._snapshot.arena import Lease
    from asyncckpt._snapshot.device_budget import DeviceBudget
    from asyncckpt._snapshot.lanes import Lane, Piece
    from asyncckpt._snapshot.owners import Owners
    from asyncckpt._snapshot.ranges import Ranges
    from asyncckpt.types import SaveStats


@dataclass(slots=True, eq=False)
class Overlap:
    """What the saves of one Checkpointer may defer.

    Attributes:
        owners: the optimizers whose parameters and state hold still until their next step.
        budget: device memory for clones.
        checksums: whether to compare checksums of the sources at the freeze with those of their copies.
        torn: whether a snapshot was torn.
    """

    owners: Owners
    budget: DeviceBudget
    checksums: bool = False
    torn: bool = False


def defer(  # noqa: PLR0913, PLR0917 - what is copied, and where to
    ranges: Ranges,
    starts: Sequence[int],
    lease: Lease,
    filled: Watermark,
    stats: SaveStats,
    overlap: Overlap,
) -> DeferredCopy | None:
    """Copy or clone the ranges that may change at any time, and return the copy of the others.

    Returns:
        A copy that is still to be started; None, and nothing copied, if no range may be deferred.
    """
    any_large = any(size > SMALL for size in ranges.sizes)
    owned = overlap.owners.tensors() if any_large else {}
    coverage = Coverage(owned)
    deferred = [
        index
        for index, (source, offset, size, _) in enumerate(zip(*ranges, strict=True))
        if size > SMALL and _may_wait(source) and coverage.includes(source, offset, size)
    ]
    if not deferred:
        stats.reason = overlap.owners.why_none() if any_large else "all of the state is small"
        return None
    held = ranges.select(deferred)
    checksums = Checksums(held, [starts[index] for index in deferred]) if overlap.checksums else None
    others = sorted(set(range(len(starts))).difference(deferred))
    lanes = open_lanes(ranges, [*deferred, *_on_cuda(ranges, others)], lease, overlap.budget)
    with close_on_error(lanes) as closing:
        clones, rest = _clone(ranges, starts, others, lanes)
        at = [starts[index] for index in rest]
        copy_ranges(ranges.select(rest), at, lease, Watermark(), overlap.budget)
        pieces = [*pieces_of(ranges, starts, deferred), *clones]
        storages = frozenset(source._cdata for source in held.sources)
        tensors = [tensor for storage in storages for tensor in owned[storage]]
        stats.deferred_bytes = sum(held.sizes)
        copy = DeferredCopy(
            RangeCopy(pieces, lanes, filled.advance),
            Guard(tensors),
            checksums,
            storages,
            frozenset(map(id, tensors)),
            lease.view,
            filled,
            stats,
            overlap,
        )
        closing.pop_all()
    return copy


def _may_wait(source: UntypedStorage) -> bool:
    """Return whether the copy of a storage may be deferred: other processes would not wait for it."""
    return source.device.type == "cuda" or (source.device.type == "cpu" and not source.is_shared())


def _on_cuda(ranges: Ranges, indices: Iterable[int]) -> list[int]:
    return [index for index in indices if ranges.sources[index].device.type == "cuda"]


def _clone(
    ranges: Ranges, starts: Sequence[int], indices: Sequence[int], lanes: dict[torch.device, Lane]
) -> tuple[list[Piece], list[int]]:
    """Clone ranges of CUDA devices there; returns what copies the clones, and the ranges without a clone."""
    on_cuda = _on_cuda(ranges, indices)
    small = [index for index in on_cuda if ranges.sizes[index] <= SMALL]
    clones, missing = gather(ranges, starts, small, lanes)
    for device, lane in lanes.items():
        large = [i for i in on_cuda if ranges.sizes[i] > SMALL and ranges.sources[i].device == device]
        if isinstance(lane, CudaLane) and large:
            cloned = lane.clone(pieces_of(ranges, starts, large))
            clones += cloned or []
            missing += large if cloned is None else []
    return clones, sorted(set(indices).difference(on_cuda).union(missing))


@dataclass(slots=True, eq=False)
class DeferredCopy:
    """The part of a copy that continues after `save` has returned.

    Attributes:
        copy: the pieces.
        guard: tells whether a source was changed; None once changes are allowed.
        checksums: the same, of changes that the guard does not see; or None.
        storages: identities of the sources.
        tensors: identities of the tensors that optimizers had in them.
        buffer: what is copied into.
        filled: progress; ended with the copy.
        stats: `deferred`, `fence`, `device_fence` and `spilled_bytes` are set.
        overlap: told if the snapshot is torn.
        state: what the sources are entries of.
        released: called when the sources may be changed.
    """

    copy: RangeCopy
    guard: Guard | None
    checksums: Checksums | None
    storages: frozenset[int]
    tensors: frozenset[int]
    buffer: memoryview
    filled: Watermark
    stats: SaveStats
    overlap: Overlap
    state: Any = None
    released: Callable[[], object] = lambda: None
    _torn: UntypedStorage | None = field(default=None, init=False)
    _error: BaseException | None = field(default=None, init=False)
    _changed: Condition = field(default_factory=Condition, init=False)

    def reads_from(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether a step of `optimizer` changes what is read."""
        # After the first fence steps on other streams still have to be ordered; that costs less than a look.
        return self.guard is None or changes(optimizer, self.storages, self.tensors)

    def start(self) -> None:
        """Copy in the background; where no thread can be started, at once."""
        fences.add(self)
        try:
            start_threads([Thread(target=self._run_in_thread, name="asyncckpt-copy", daemon=True)], [])
        except RuntimeError:
            self._run()
            cause = None if self._error is None else self._error.__cause__
            if cause is not None and not isinstance(cause, Exception):  # a Ctrl-C
                raise cause from None

    def fence(self) -> None:
        """Return once the calling thread may change the sources; a failure is that of the save."""
        began = time.perf_counter()
        try:
            if self.guard is None:
                self.copy.order()
            else:
                self.copy.fence()
        except BusyError:
            raise
        except Exception as error:  # noqa: BLE001 - training continues
            self._fail(error)
        self._allow_changes()
        self.stats.fence += time.perf_counter() - began

    def cancel(self) -> None:
        """Copy no more, and fence nothing; return once nothing is copied."""
        self.guard = None
        fences.remove(self)
        self.copy.cancel()
        self.state = self.checksums = None
        self.released()

    def settle(self) -> None:
        """Raise unless the buffer holds the state as it was when it was frozen; called once all is copied.

        Raises:
            TornSnapshotError: names a tensor that was changed.
            SaveError: it could not be copied.
        """
        self._allow_changes()
        differing = None if self.checksums is None else self.checksums.differing(self.buffer)
        if differing is not None:
            self._fail(torn_error(self.state, differing, "has other bytes than when it was frozen"))
        self.state = self.checksums = None
        if self._error is not None:
            raise self._error

    def _run_in_thread(self) -> None:
        try:
            for lane in self.copy.lanes.values():
                lane.enter_thread()
        except BaseException as error:  # noqa: BLE001 - of the save, whatever it is
            self._fail(error)
        self._run()

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            self.copy.run()
            self._look(final=False)
            self.stats.device_fence = sum(lane.fence_seconds() for lane in self.copy.lanes.values())
            self.stats.spilled_bytes = sum(lane.spilled for lane in self.copy.lanes.values())
        except BaseException as error:  # noqa: BLE001 - of the save, whatever it is
            self._fail(error)
        if not self.copy.is_complete():
            self._fail(SaveError("the copy of the state to host memory was interrupted"))
        self.stats.deferred = time.perf_counter() - began
        if self._error is None:
            self.filled.advance(len(self.buffer))
        if self.guard is None:
            fences.remove(self)
        self.filled.end(self._error or SaveError("the copy of the state has ended"))

    def _allow_changes(self) -> None:
        self._look(final=True)
        if self.checksums is None:
            self.state = None  # only an error would name an entry of it
        if self.copy.ended:
            fences.remove(self)
        self.released()

    def _look(self, *, final: bool) -> None:
        """Fail if a source was changed while that was not allowed; with `final`, it is from now on."""
        # Between the look and the end of the guard no other thread may pass the fence.
        with self._changed:
            guard = self.guard
            if guard is not None and self._torn is None:
                self._torn = guard.changed()
            if final:
                self.guard = None
        if self._torn is not None and self._error is None:  # an earlier look may have been interrupted
            self._fail(
                torn_error(self.state, self._torn, "was changed in place before its copy was finished")
            )

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, SaveError):
            failure = SaveError(f"could not copy the state to host memory: {error}")
            failure.__cause__ = error
            error = failure
        self._error = self._error or error
        self.overlap.torn |= isinstance(error, TornSnapshotError)
