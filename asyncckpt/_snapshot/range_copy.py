"""Copy pieces of live storages in order, while another thread may ask for its sources."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncckpt._threads import Condition, handler_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from asyncckpt._snapshot.lanes import Lane, Piece


class RangeCopy:
    """The copy of pieces into one buffer, by the thread that calls `run`.

    Args:
        pieces: in the order to copy them.
        lanes: by device.
        report: called with how far the buffer is filled from the front, in bytes.

    Attributes:
        ended: whether nothing is copied any more.
    """

    def __init__(
        self, pieces: Sequence[Piece], lanes: Mapping[torch.device, Lane], report: Callable[[int], object]
    ) -> None:
        self.ended = False
        self.lanes = dict(lanes)
        self._pieces: list[Piece | None] = list(pieces)
        self._left = {device: deque[int]() for device in lanes}  # neither launched nor copied
        for index, piece in enumerate(pieces):
            self._left[piece.storage.device].append(index)
        starts = np.asarray([piece.start for piece in pieces], dtype=np.int64)
        # How far the buffer is filled if all pieces before this one are copied.
        self._fronts = np.minimum.accumulate(starts[::-1])[::-1].tolist()
        self._copied = bytearray(len(pieces))
        self._front = 0
        self._report = report
        self._changed = Condition()
        self._handed = bytearray(len(pieces))  # whether a fence has handed it over to a lane
        self._launching = 0
        # What each is handing over, by thread.
        self._fences: dict[int, dict[torch.device, list[int]]] = {}
        self._returned: list[
            dict[torch.device, list[int]]
        ] = []  # what interrupted fences have not handed over
        self._running = self._stopped = False

    def is_complete(self) -> bool:
        """Return whether all pieces are copied."""
        return self._front == len(self._copied)

    def run(self) -> None:
        """Copy all pieces; return or raise once nothing is copied any more."""
        launched: deque[tuple[Lane, list[int], Any]] = deque()
        try:
            with self._changed:
                if self._stopped:
                    return
                self._running = True
            while (batch := self._take(wait=not launched)) is not None or launched:
                if batch is not None:
                    lane, indices = batch
                    launched.append((lane, indices, self._launch(lane, indices)))
                # One batch is under way while the next one is launched.
                if batch is None or len(launched) > 1:
                    lane, indices, token = launched.popleft()
                    lane.wait(token)
                    self._mark(indices)
        except BaseException:
            self._stopped = True
            raise
        finally:
            self._end()

    def fence(self) -> None:
        """Return once the calling thread may change the sources of all pieces.

        What is left is copied, or cloned, or ordered before whatever the thread queues next on a device.

        Raises:
            BusyError: called by a signal handler that interrupted a fence.
        """
        if self.is_fenced_by_caller():
            raise handler_error("a step or fence()")
        caller = threading.get_ident()
        taken: dict[torch.device, list[int]] = {device: [] for device in self.lanes}
        try:
            with self._changed:
                if self._stopped or self.ended:
                    return
                self._fences[caller] = taken
            handing = True
            while handing:
                self._changed.until(lambda: self._claim(taken))
                handing = any(taken.values())
                for device, indices in taken.items():
                    self._hand_over(device, indices)
            self.order()
        finally:
            # One call each: another interrupt between them must neither lose pieces nor leave a fence behind.
            try:
                self._returned.append(taken)
            finally:
                self._fences.pop(caller, None)
            self._changed.notify_all()

    def is_fenced_by_caller(self) -> bool:
        """Return whether the calling thread, then in a signal handler, is in a fence."""
        return threading.get_ident() in self._fences

    def order(self) -> None:
        """Order what the calling thread queues next on a device behind the reads of its sources.

        After a fence in another thread, or on another stream, this is enough.
        """
        for lane in self.lanes.values():
            lane.order()

    def cancel(self) -> None:
        """Copy no more; return once nothing is copied."""
        with self._changed:
            self._stopped = True
            for left in self._left.values():
                left.clear()
            never_run = not self._running and not self.ended
        self._changed.notify_all()
        if never_run:
            self._end()
        if not self.ended:  # the caller may hold the lock, once it is
            self._changed.until(lambda: self.ended)

    def _take(self, *, wait: bool) -> tuple[Lane, list[int]] | None:
        """Take the next batch of one device; None if there is none, now or, with `wait`, ever."""
        batch: list[tuple[Lane, list[int]]] = []

        def attempt() -> bool:
            self._put_back()
            # Of the device with most left, so that several of them copy at once.
            device = max(self._left, key=lambda device: len(self._left[device]), default=None)
            if device is not None and (left := self._left[device]):
                lane = self.lanes[device]
                count = min(lane.batch, len(left))
                self._launching += 1
                batch.append((lane, [left.popleft() for _ in range(count)]))
                return True
            return not self._fences  # one may put back what it has taken

        self._changed.until(attempt, None if wait else 0)
        return batch[0] if batch else None

    def _put_back(self) -> None:
        """Take back what interrupted fences have left; a piece that is there twice is copied once."""
        while self._returned:
            for device, indices in self._returned[-1].items():
                if not self._stopped:
                    self._left[device].extendleft(reversed(indices))
            self._returned.pop()
            self._changed.notify_all()

    def _launch(self, lane: Lane, indices: list[int]) -> Any:
        pieces = [piece for index in indices if (piece := self._pieces[index]) is not None]
        try:
            return lane.launch(pieces)
        finally:
            with self._changed:
                self._launching -= 1
            self._changed.notify_all()

    def _claim(self, taken: dict[torch.device, list[int]]) -> bool:
        """Take what no fence has handed over; return whether there is something, or nothing to wait for."""
        for device, left in self._left.items():
            if new := [index for index in left if not self._handed[index]]:
                taken[device] = new
                self._left[device] = deque(index for index in left if self._handed[index])
        others = any(any(other.values()) for other in self._fences.values() if other is not taken)
        waits = self._launching or others or any(any(other.values()) for other in self._returned)
        return any(taken.values()) or not waits or self.ended

    def _hand_over(self, device: torch.device, indices: list[int]) -> None:
        """Let a lane take over pieces at a fence, and put back what it has not copied."""
        indices[:] = [index for index in indices if self._pieces[index] is not None]
        pieces = [piece for index in indices if (piece := self._pieces[index]) is not None]
        after = self.lanes[device].fence(pieces)
        self._mark([index for index, piece in zip(indices, after, strict=True) if piece is None])
        with self._changed:
            for index, piece in zip(indices, after, strict=True):
                self._handed[index] = True
                if piece is not None and not self._stopped:
                    self._pieces[index] = piece
                    self._left[device].append(index)
            indices.clear()
        self._changed.notify_all()

    def _mark(self, indices: list[int]) -> None:
        """Note pieces as copied, let go of their sources, and report a new front."""
        with self._changed:
            for index in indices:
                self._copied[index] = True
                self._pieces[index] = None
            before = self._front
            while self._front < len(self._copied) and self._copied[self._front]:
                self._front += 1
            if before < self._front < len(self._copied):
                self._report(self._fronts[self._front])

    def _end(self) -> None:
        try:
            if self._fences:
                self._changed.until(lambda: not self._fences)
        finally:
            try:
                with ExitStack() as lanes:
                    for lane in self.lanes.values():
                        lanes.callback(lane.close)
            finally:
                with self._changed:
                    self._pieces.clear()
                    self.ended = True
                self._changed.notify_all()
