"""Copy ranges of live storages into a host buffer, in file order, reporting how far it is filled."""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass, field
from itertools import compress, starmap
from operator import add
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.storage import UntypedStorage

from asyncckpt._snapshot.copy_threads import for_each_piece
from asyncckpt._snapshot.pinning import PIECE
from asyncckpt._threads import Condition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncckpt._snapshot.arena import Lease
    from asyncckpt._snapshot.ranges import Ranges

# How much is copied between two reports, in bytes.
_STRIDE = 16 << 20
# Up to this size letting go of the interpreter costs more than the copy.
_SMALL = 32 << 10
# From this size on, several threads share the copy: one cannot use all of the memory's bandwidth.
_SHARED_FROM = 4 << 20

# (target, source, bytes); the first lets go of the interpreter meanwhile, the second does not.
memmove, _move_small = ctypes.CDLL(None).memmove, ctypes.PyDLL(None).memmove
for _function in (memmove, _move_small):
    _function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    _function.restype = None


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


def copy_ranges(ranges: Ranges, starts: Sequence[int], lease: Lease, done: Watermark) -> None:
    """Copy each range to its place in the leased buffer; return or raise once nothing is copied any more.

    Args:
        ranges: of live storages on any devices.
        starts: where in the buffer each goes, in bytes, ascending.
        lease: the buffer; pinned, if a storage is on a CUDA device.
        done: advanced as the buffer is filled; the caller ends it.
    """
    if not torch.accelerator.is_available() or all(source.device.type == "cpu" for source in ranges.sources):
        _copy_on_host(ranges, starts, lease, done)
        return
    streams: dict[torch.device, torch.cuda.Stream] = {}
    try:
        pending = _start_device_copies(ranges, starts, lease, streams)
        # The host has time for its own while the devices copy.
        for source, offset, nbytes, start in zip(*ranges, starts, strict=True):
            if source.device.type == "cpu" and nbytes:
                memmove(lease.address + start, source.data_ptr() + offset, nbytes)
        for events, upto in pending:
            for event in events:
                event.synchronize()
            done.advance(upto)
    except BaseException:
        # Whoever gives the buffer back has to know that nothing is copied into it any more.
        for stream in streams.values():
            stream.synchronize()
        raise


def _copy_on_host(ranges: Ranges, starts: Sequence[int], lease: Lease, done: Watermark) -> None:
    sources = list(map(add, map(UntypedStorage.data_ptr, ranges.sources), ranges.offsets))
    targets = (np.asarray(starts, dtype=np.int64) + lease.address).tolist()
    sizes = np.asarray(ranges.sizes, dtype=np.int64)
    # In C alone, for the sake of states with thousands of tensors.
    small = compress(zip(targets, sources, ranges.sizes, strict=True), (sizes <= _SMALL).tolist())
    deque(starmap(_move_small, small), maxlen=0)
    pieces = [
        (targets[index] + at, sources[index] + at, min(_STRIDE, ranges.sizes[index] - at))
        for index in np.flatnonzero(sizes > _SMALL).tolist()
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


def _start_device_copies(
    ranges: Ranges,
    starts: Sequence[int],
    lease: Lease,
    streams: dict[torch.device, torch.cuda.Stream],
) -> list[tuple[list[torch.cuda.Event], int]]:
    """Queue the copies of all CUDA storages on side streams; other accelerators are copied at once.

    The streams are put into `streams`, one for each device.

    Returns:
        Events in file order, with the end of what is in the buffer once they have all passed.
    """
    buffer = torch.frombuffer(lease.view, dtype=torch.uint8)
    pending: list[tuple[list[torch.cuda.Event], int]] = []
    reported = end = 0
    for storage, offset, nbytes, start in zip(*ranges, starts, strict=True):
        device = storage.device
        if device.type == "cpu" or not nbytes:
            continue
        end = start + nbytes
        if device.type != "cuda":
            buffer[start:end].copy_(_bytes_of(storage)[offset : offset + nbytes])
            continue
        if device not in streams:
            streams[device] = _side_stream(device)
        with torch.cuda.stream(streams[device]):
            source = _bytes_of(storage)
            at = start
            while at < end:
                # Up to the end of the range, of the stride, or of the registered piece.
                upto = min(end, at + _STRIDE, (at // PIECE + 1) * PIECE)
                first = at - start + offset
                buffer[at:upto].copy_(source[first : first + upto - at], non_blocking=True)
                at = upto
                if at - reported >= _STRIDE:
                    pending.append(([stream.record_event() for stream in streams.values()], reported := at))
    pending.append(([stream.record_event() for stream in streams.values()], end))
    return pending


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream of `device` that waits for its training stream, whose last kernels may still run."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def _bytes_of(storage: UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
