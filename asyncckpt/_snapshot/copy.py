"""Copy live storages into a host buffer, in file order, telling how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from asyncckpt._snapshot.copy_threads import copy_pieces, memmove
from asyncckpt._snapshot.pinning import PIECE
from asyncckpt._snapshot.scatter import scatter
from asyncckpt._threads import Condition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.storage import UntypedStorage

    from asyncckpt._snapshot.buffers import Lease

# How much is copied between two reports, in bytes.
_STRIDE = 16 << 20
# Up to this size the call costs more than the copy.
_SMALL = 32 << 10
# From this size on, several threads share the copy: one cannot use all of the memory's bandwidth.
_SHARED_FROM = 4 << 20


@dataclass(slots=True, eq=False)
class Watermark:
    """How many bytes at the front of a buffer hold what they will be written as.

    Attributes:
        ended: whether nobody writes into the buffer any more.
    """

    _value: int = 0
    _error: BaseException | None = None
    ended: bool = False
    _changed: Condition = field(default_factory=Condition)

    def advance(self, value: int) -> None:
        """Say that everything below `value` is there."""
        with self._changed:
            self._value = value
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Say that no more will come; the first reason counts."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def end(self, error: BaseException) -> None:
        """Say that nobody writes into the buffer any more; what is not there has failed with `error`."""
        self.fail(error)
        self.ended = True
        self._changed.notify_all()

    def wait_for_end(self) -> None:
        """Block until nobody writes into the buffer any more."""
        self._changed.until(lambda: self.ended)

    def wait(self, value: int) -> None:
        """Block until everything below `value` is there; raises what the copy failed with."""
        self._changed.until(lambda: self._value >= value or self._error is not None)
        if self._value < value and self._error is not None:
            raise self._error


def copy_storages(
    storages: Sequence[UntypedStorage],
    sizes: Sequence[int],
    starts: Sequence[int],
    lease: Lease,
    done: Watermark,
) -> None:
    """Copy each storage to its place in the leased buffer, and return when all of it is there.

    Args:
        storages: live storages on any devices.
        sizes: of each, in bytes.
        starts: where in the buffer each goes, in bytes, ascending.
        lease: the buffer; pinned, if a storage is on a CUDA device.
        done: told how far the buffer is filled; its end is for the caller to tell.
    """
    if not torch.accelerator.is_available() or all(storage.device.type == "cpu" for storage in storages):
        _copy_on_host(storages, sizes, starts, lease, done)
        return
    streams: dict[torch.device, torch.cuda.Stream] = {}
    try:
        pending = _start_device_copies(storages, starts, lease, streams)
        for storage, start in zip(storages, starts, strict=True):
            if storage.device.type == "cpu" and storage.nbytes():
                memmove(lease.address + start, storage.data_ptr(), storage.nbytes())
        for events, upto in pending:
            for event in events:
                event.synchronize()
            done.advance(upto)
    except BaseException:
        # Whoever gives the buffer back has to know that nothing is copied into it any more.
        for stream in streams.values():
            stream.synchronize()
        raise


def _copy_on_host(
    storages: Sequence[UntypedStorage],
    sizes: Sequence[int],
    starts: Sequence[int],
    lease: Lease,
    done: Watermark,
) -> None:
    """Copy the storages of a state that is all on the host."""
    begin = 0  # of the run of small storages that is not yet copied
    pieces: list[tuple[int, int, int]] = []
    for index in [*(i for i, nbytes in enumerate(sizes) if not 0 < nbytes <= _SMALL), len(sizes)]:
        if begin < index:
            run = slice(begin, index)
            scatter(storages[run], sizes[run], starts[run], lease)
        if index < len(sizes):
            source, target = storages[index].data_ptr(), lease.address + starts[index]
            pieces += [
                (target + offset, source + offset, min(_STRIDE, sizes[index] - offset))
                for offset in range(0, sizes[index], _STRIDE)
            ]
        begin = index + 1
    if sum(length for _, _, length in pieces) < _SHARED_FROM:
        for piece in pieces:
            memmove(*piece)
    else:
        copy_pieces(pieces, lambda end: done.advance(end - lease.address))


def _start_device_copies(
    storages: Sequence[UntypedStorage],
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
    for storage, start in zip(storages, starts, strict=True):
        device, nbytes = storage.device, storage.nbytes()
        if device.type == "cpu" or not nbytes:
            continue
        end = start + nbytes
        if device.type != "cuda":
            buffer[start:end].copy_(_bytes_of(storage))
            continue
        if device not in streams:
            streams[device] = _side_stream(device)
        with torch.cuda.stream(streams[device]):
            source = _bytes_of(storage)
            at = start
            while at < end:
                # Up to the end of the storage, of the stride, or of the registered piece.
                upto = min(end, at + _STRIDE, (at // PIECE + 1) * PIECE)
                buffer[at:upto].copy_(source[at - start : upto - start], non_blocking=True)
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
