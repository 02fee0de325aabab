"""Copy ranges of live storages into a host buffer, in file order, reporting how far it is filled."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import compress, starmap
from operator import add
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.storage import UntypedStorage

from asyncckpt._snapshot.copy_threads import for_each_piece
from asyncckpt._snapshot.cuda_lane import CudaLane
from asyncckpt._snapshot.device_budget import DeviceBudget
from asyncckpt._snapshot.lanes import DeviceLane, HostLane, Piece, memmove, move_small
from asyncckpt._snapshot.pinning import PIECE
from asyncckpt._snapshot.range_copy import RangeCopy
from asyncckpt._threads import Condition

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from asyncckpt._snapshot.arena import Lease
    from asyncckpt._snapshot.lanes import Lane
    from asyncckpt._snapshot.ranges import Ranges

# How much is copied between two reports, in bytes.
_STRIDE = 16 << 20
# Up to this size, in bytes, letting go of the interpreter costs more than the copy, and so does a copy from a
# device of its own.
SMALL = 32 << 10
# Device memory for gathering small ranges during a blocking copy, in bytes.
_GATHERED = 64 << 20
# From this size on, several threads share the copy: one cannot use all of the memory's bandwidth.
_SHARED_FROM = 4 << 20


@dataclass(slots=True, eq=False)
class Watermark:
    """How many bytes at the front of a buffer hold what they will be written as.

    Attributes:
        ended: whether all writes into the buffer have ended.
        awaited: whether someone waits or has waited for bytes.
    """

    ended: bool = False
    awaited: bool = False
    _value: int = 0
    _error: BaseException | None = None
    _changed: Condition = field(default_factory=Condition)

    def advance(self, value: int) -> None:
        """Say that everything below `value` is there."""
        with self._changed:
            self._value = value
        self._changed.notify_all()

    def end(self, error: BaseException) -> None:
        """Mark all writes into the buffer as ended; the first error says why bytes are missing."""
        with self._changed:
            self._error = self._error or error
            self.ended = True
        self._changed.notify_all()

    def wait(self, value: int) -> None:
        """Block until everything below `value` is there; raises what the copy failed with."""
        self.awaited = True
        self._changed.until(lambda: self._value >= value or self.ended)
        if self._value < value and self._error is not None:
            raise self._error

    def wait_for_end(self) -> None:
        """Block until all writes into the buffer have ended."""
        self._changed.until(lambda: self.ended)


def copy_ranges(
    ranges: Ranges,
    starts: Sequence[int],
    lease: Lease,
    done: Watermark,
    budget: DeviceBudget | None = None,
) -> None:
    """Copy each range to its place in the leased buffer; return or raise once nothing is copied any more.

    Args:
        ranges: of live storages on any devices.
        starts: where in the buffer each goes, in bytes, ascending.
        lease: the buffer; pinned, if a storage is on a CUDA device.
        done: advanced as the buffer is filled; the caller ends it.
        budget: device memory for gathering small ranges.
    """
    on_device = indices_on_device(ranges)
    if not on_device:
        _copy_on_host(ranges, starts, lease, done)
        return
    on_host = sorted(set(range(len(starts))).difference(on_device))
    _copy_on_host(ranges.select(on_host), [starts[index] for index in on_host], lease, Watermark())
    lanes = open_lanes(ranges, on_device, lease, budget or DeviceBudget(_GATHERED))
    with close_on_error(lanes) as closing:
        small = [index for index in on_device if ranges.sizes[index] <= SMALL]
        gathered, rest = gather(ranges, starts, small, lanes)
        others = sorted({*on_device}.difference(small).union(rest))
        pieces = [*gathered, *pieces_of(ranges, starts, others)]
        copy = RangeCopy(pieces, lanes, done.advance)
        closing.pop_all()
    copy.run()


def indices_on_device(ranges: Ranges) -> list[int]:
    """Return which ranges are not in host memory."""
    if not torch.accelerator.is_available():
        return []
    return [index for index, source in enumerate(ranges.sources) if source.device.type != "cpu"]


def open_lanes(
    ranges: Ranges, indices: Iterable[int], lease: Lease, budget: DeviceBudget
) -> dict[torch.device, Lane]:
    """Make a lane for each device of some ranges, behind what their training streams have in their queues."""
    lanes: dict[torch.device, Lane] = {}
    for device in dict.fromkeys(ranges.sources[index].device for index in indices):
        if device.type == "cpu":
            lanes[device] = HostLane(lease.address)
        elif device.type == "cuda":
            lanes[device] = CudaLane(device, lease, budget)
        else:
            lanes[device] = DeviceLane(torch.frombuffer(lease.view, dtype=torch.uint8))
    return lanes


def close_on_error(lanes: Mapping[torch.device, Lane]) -> ExitStack:
    """Return a context that closes lanes, unless its callbacks are taken out of it."""
    closing = ExitStack()
    for lane in lanes.values():
        closing.callback(lane.close)
    return closing


def gather(
    ranges: Ranges, starts: Sequence[int], indices: Sequence[int], lanes: dict[torch.device, Lane]
) -> tuple[list[Piece], list[int]]:
    """Clone small ranges on their devices, where that is possible.

    Returns:
        The pieces that copy the clones, and the indices of ranges that are not cloned.
    """
    pieces: list[Piece] = []
    rest: list[int] = []
    for device, lane in lanes.items():
        own = [index for index in indices if ranges.sources[index].device == device and ranges.sizes[index]]
        if isinstance(lane, CudaLane) and own:
            gathered, left = lane.gather(ranges.select(own), [starts[index] for index in own])
            pieces += gathered
            rest += [own[index] for index in left]
        else:
            rest += own
    return pieces, rest


def pieces_of(ranges: Ranges, starts: Sequence[int], indices: Iterable[int]) -> list[Piece]:
    """Divide ranges into pieces of a bounded size, none of which crosses a registered piece of the buffer."""
    pieces = []
    for index in indices:
        source, first, end = ranges.sources[index], starts[index], starts[index] + ranges.sizes[index]
        at = first
        while at < end:
            upto = min(end, at + _STRIDE, (at // PIECE + 1) * PIECE)
            pieces.append(Piece(at, source, ranges.offsets[index] + at - first, upto - at))
            at = upto
    return pieces


def _copy_on_host(ranges: Ranges, starts: Sequence[int], lease: Lease, done: Watermark) -> None:
    sources = list(map(add, map(UntypedStorage.data_ptr, ranges.sources), ranges.offsets))
    targets = (np.asarray(starts, dtype=np.int64) + lease.address).tolist()
    sizes = np.asarray(ranges.sizes, dtype=np.int64)
    # In C alone, for the sake of states with thousands of tensors.
    small = compress(zip(targets, sources, ranges.sizes, strict=True), (sizes <= SMALL).tolist())
    deque(starmap(move_small, small), maxlen=0)
    pieces = [
        (targets[index] + at, sources[index] + at, min(_STRIDE, ranges.sizes[index] - at))
        for index in np.flatnonzero(sizes > SMALL).tolist()
        for at in range(0, ranges.sizes[index], _STRIDE)
    ]
    if sum(length for _, _, length in pieces) < _SHARED_FROM:
        for piece in pieces:
            memmove(*piece)
        return

    def report(count: int) -> None:
        target, _, length = pieces[count - 1]
        done.advance(target + length - lease.address)

    # The background needs a core until it writes: a late beginning costs it more than one thread gains here.
    for_each_piece(lambda piece: memmove(*piece), pieces, report, lambda: done.awaited)
