"""Copy pieces of a CUDA device to pinned host memory, on a stream beside the training's."""

from __future__ import annotations

from collections import deque
from itertools import starmap
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import cuda

from asyncckpt._snapshot.capture_mode import allow_captures
from asyncckpt._snapshot.lanes import Lane, Piece, bytes_of, move_small
from asyncckpt.errors import TornSnapshotError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from asyncckpt._snapshot.arena import Lease
    from asyncckpt._snapshot.device_budget import DeviceBudget
    from asyncckpt._snapshot.ranges import Ranges

# Ranges that are gathered into one image, in bytes and in number: it takes as much host memory again.
_IMAGE, _MOST = 16 << 20, 4096


class CudaLane(Lane):
    """Copies from one device, behind the kernels that were queued when this was made.

    Clones are made in the order of the training stream, which is the current one of the calling thread.

    Args:
        device: of the sources.
        lease: the buffer, pinned.
        budget: memory for clones.
    """

    batch = 2

    def __init__(self, device: torch.device, lease: Lease, budget: DeviceBudget) -> None:
        self._device = device
        self._address = lease.address
        with torch.inference_mode(mode=False):  # or only this thread could copy into it
            self._buffer = torch.frombuffer(lease.view, dtype=torch.uint8)
        self._budget = budget
        self._taken = 0
        self._side = cuda.Stream(device)
        self._side.wait_stream(cuda.current_stream(device))
        self._lock = Lock()
        self._last = self._side.record_event()  # of the copies of sources that may be changed after a fence
        self._clones: list[torch.cuda.Event] = []  # of their ends
        self._followed = 0  # how many of them the side stream waits for
        self._launched: set[int] = set()  # `start` of the pieces that a fence has launched
        self._held: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def enter_thread(self) -> None:
        # Its device would be the first one, on which this process may have no context yet.
        cuda.set_device(self._device)
        allow_captures()

    def gather(self, ranges: Ranges, starts: Sequence[int]) -> tuple[list[Piece], list[int]]:
        """Clone small ranges into few images.

        Returns:
            Pieces that copy the images and spread them in the buffer, and the indices of the ranges for which
            there is no memory on the device.
        """
        pieces: list[Piece] = []
        rest: list[int] = []
        with cuda.device(self._device), torch.no_grad():
            for group in _groups(ranges):
                image = self._image(group)
                if image is None:
                    rest += [index for index, _ in group]
                    continue
                self._keep(source for _, source in group)
                spread = [(starts[index], ranges.sizes[index]) for index, _ in group]
                storage = image.untyped_storage()
                pieces.append(Piece(min(spread)[0], storage, 0, image.nbytes, cloned=True, spread=spread))
        self._note_clones()
        return pieces, rest

    def clone(self, pieces: Sequence[Piece]) -> list[Piece] | None:
        """Return pieces that copy a clone of the sources; None if there is no memory for it on the device."""
        nbytes = sum(piece.nbytes for piece in pieces)
        if not nbytes:
            return []
        cloned, at = [], 0
        with cuda.device(self._device):
            image = self._allocate(nbytes, lambda: _memory(nbytes, self._device))
            if image is None:
                return None
            self._keep(map(_source, pieces))
            for piece in pieces:
                _copy(image[at : at + piece.nbytes], _source(piece))
                cloned.append(Piece(piece.start, image.untyped_storage(), at, piece.nbytes, cloned=True))
                at += piece.nbytes
        self._note_clones()
        return cloned

    def launch(self, pieces: Sequence[Piece]) -> _Launch:
        return self._launch([piece for piece in pieces if piece.start not in self._launched])

    def wait(self, launched: _Launch) -> None:
        with cuda.device(self._device):
            launched.event.synchronize()
        for piece, scratch in launched.scratch:
            at = scratch.data_ptr()
            moves = []
            for start, nbytes in piece.spread:
                moves.append((self._address + start, at, nbytes))
                at += nbytes
            deque(starmap(move_small, moves), maxlen=0)

    def fence(self, pieces: Sequence[Piece]) -> list[Piece | None]:
        """Launch what is left, but clone what would be copied last, as far as the budget goes."""
        if cuda.is_current_stream_capturing():
            raise TornSnapshotError(
                "an optimizer step was captured into a CUDA graph before an overlapped copy was finished;"
                " call wait() before a capture"
            )
        live = [index for index, piece in enumerate(pieces) if not piece.cloned]
        first, room = len(live), self._budget.left(self._device)
        while first and pieces[live[first - 1]].nbytes <= room:
            first -= 1
            room -= pieces[live[first]].nbytes
        # Before the clones, which are made behind all that the training stream has in its queue.
        self._launch_at_fence([pieces[index] for index in live[:first]])
        after: list[Piece | None] = list(pieces)
        last = [pieces[index] for index in live[first:]]
        cloned = self.clone(last)
        if cloned is None:
            self._launch_at_fence(last)
        else:
            self.spilled += sum(piece.nbytes for piece in cloned)
            for index, piece in zip(live[first:], cloned, strict=True):
                after[index] = piece
        return after

    def order(self) -> None:
        """Let the training stream wait until sources are copied or cloned; the host does not wait."""
        if cuda.is_current_stream_capturing():
            return  # the device was synchronized before the capture
        training = cuda.current_stream(self._device)
        before, after = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        before.record(training)
        for event in (self._last, *self._clones):
            training.wait_event(event)
        after.record(training)
        self._held.append((before, after))

    def close(self) -> None:
        try:
            with cuda.device(self._device):
                self._side.synchronize()
        finally:
            with self._lock:
                taken, self._taken = self._taken, 0
            self._budget.give_back(self._device, taken)

    def fence_seconds(self) -> float:
        held = list(self._held)
        with cuda.device(self._device):
            for _, after in held:
                after.synchronize()
        milliseconds: float = sum(before.elapsed_time(after) for before, after in held)
        return milliseconds / 1000

    def _launch(self, pieces: Sequence[Piece]) -> _Launch:
        scratch = []
        # A fence launches, too, from another thread: the last event has to be the newest one.
        with self._lock, cuda.device(self._device), cuda.stream(self._side):
            if any(piece.cloned for piece in pieces):
                for event in self._clones[self._followed :]:
                    self._side.wait_event(event)
                    self._followed += 1
            for piece in pieces:
                if piece.spread:
                    target = _pinned(piece.nbytes)
                    scratch.append((piece, target))
                else:
                    target = self._buffer[piece.start : piece.start + piece.nbytes]
                _copy(target, _source(piece))
            event = self._side.record_event()
            if not all(piece.cloned for piece in pieces):
                self._last = event
            return _Launch(event, scratch)

    def _launch_at_fence(self, pieces: Sequence[Piece]) -> None:
        """Launch pieces at a fence; `launch` leaves them out."""
        if pieces:
            self._launch(pieces)
            self._launched.update(piece.start for piece in pieces)

    def _note_clones(self) -> None:
        """Note that clones are in the queue of the training stream: their copies have to come behind it."""
        self._clones.append(cuda.current_stream(self._device).record_event())

    def _keep(self, sources: Iterable[torch.Tensor]) -> None:
        """Let memory that is freed before it is cloned be used again only afterwards.

        On the default stream, from which most memory is allocated, that needs nothing.
        """
        training = cuda.current_stream(self._device)
        if training != cuda.default_stream(self._device):
            for source in sources:
                source.record_stream(training)

    def _image(self, group: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor | None:
        sources = [source for _, source in group]
        return self._allocate(sum(source.nbytes for source in sources), lambda: _concatenated(sources))

    def _allocate(self, nbytes: int, make: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """Return what `make` allocates; None if the budget or the device has no room."""
        if not self._budget.take(self._device, nbytes):
            return None
        with self._lock:
            self._taken += nbytes
        try:
            return make()
        except cuda.OutOfMemoryError:
            # It stays taken until `close`: torch empties its cache before it refuses, which takes long.
            return None


class _Launch(NamedTuple):
    """Copies under way.

    Attributes:
        event: of their end.
        scratch: host memory of the pieces that are then spread.
    """

    event: torch.cuda.Event
    scratch: list[tuple[Piece, torch.Tensor]]


def _groups(ranges: Ranges) -> list[list[tuple[int, torch.Tensor]]]:
    """Divide ranges into groups of one dtype and of a bounded size; each range with a tensor of its bytes."""
    groups: list[list[tuple[int, torch.Tensor]]] = []
    last: dict[torch.dtype, tuple[list[tuple[int, torch.Tensor]], int]] = {}
    for index, (storage, offset, nbytes, view) in enumerate(zip(*ranges, strict=True)):
        whole = view is not None and view.nbytes == nbytes and view.is_contiguous()
        source = view if whole and view is not None else bytes_of(storage)[offset : offset + nbytes]
        group, size = last.get(source.dtype, ([], 0))
        if not group or size + nbytes > _IMAGE or len(group) == _MOST:
            group, size = [], 0
            groups.append(group)
        group.append((index, source))
        last[source.dtype] = group, size + nbytes
    return groups


def _source(piece: Piece) -> torch.Tensor:
    return bytes_of(piece.storage)[piece.offset : piece.offset + piece.nbytes]


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _concatenated(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return a copy of the elements of contiguous tensors of one dtype, one after another."""
    if len(tensors) == 1:
        return tensors[0].detach().clone()
    with torch.autocast(tensors[0].device.type, enabled=False):  # which has rules for concatenation
        # In C: to flatten each from here would take longer than the copy.
        flat: torch.Tensor = torch._C._nn.flatten_dense_tensors(tensors)
    return flat


def _memory(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _pinned(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
