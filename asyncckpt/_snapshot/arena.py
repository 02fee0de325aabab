"""The arena: host buffers that snapshots are copied into, leased and kept for the next, under one cap."""

from __future__ import annotations

import contextlib
import itertools
import logging
import weakref
from dataclasses import dataclass, field
from threading import Thread, current_thread
from typing import TYPE_CHECKING

import torch

from asyncckpt._snapshot.capture_mode import allow_captures
from asyncckpt._snapshot.memory import map_private
from asyncckpt._snapshot.pinning import current_device, pin, unpin
from asyncckpt._threads import Condition, start_threads, uninterrupted
from asyncckpt.errors import BusyError, SaveError

if TYPE_CHECKING:
    from asyncckpt._snapshot.memory import Mapping

logger = logging.getLogger("asyncckpt")

# A free buffer may serve a request that is this fraction of it; a looser fit would waste the cap.
_FIT = 0.875


@dataclass(frozen=True, slots=True)
class ArenaStatistics:
    """What the arena holds, in bytes.

    Attributes:
        mapped: all buffers, leased and free.
        leased: buffers that a snapshot is in.
        leases: how many those are.
        high_water: the most that was leased at once.
    """

    mapped: int
    leased: int
    leases: int
    high_water: int


class Lease:
    """A buffer that belongs to one snapshot until `release`, or until the lease is collected.

    Attributes:
        view: the whole buffer, writable, at least as long as what was asked for.
        address: where its first byte is, a multiple of 4096.
    """

    view: memoryview
    address: int
    _buffer: _Buffer | None = None

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Give the buffer back: what it holds may be overwritten. Doing so twice is harmless."""
        if self._buffer is not None:
            self._arena._take_back(self._buffer, self)


@dataclass(slots=True, eq=False)
class _Buffer:
    """Memory of the arena.

    Attributes:
        nbytes: its size.
        lease: who has it; the buffer is free if that is dead or None.
        mapping: the memory; None until it is mapped.
        pinned: whether it is registered with the CUDA runtime, or may be.
        refused: whether it could not be registered, which is not tried again.
        device: the CUDA device that was current then.
        used: when it was released last.
    """

    nbytes: int
    lease: weakref.ref[Lease] | None
    mapping: Mapping | None = None
    pinned: bool = False
    refused: bool = False
    device: int = 0
    used: int = 0

    @property
    def is_leased(self) -> bool:
        return self.lease is not None and self.lease() is not None

    def ready(self, *, pinned: bool) -> Mapping:
        """Return the memory, its pages touched, and pinned if asked to."""
        mapping = self.mapping
        if mapping is None:
            try:
                mapping = uninterrupted(self._map)
            except (OSError, MemoryError) as error:
                raise SaveError(
                    f"cannot take {self.nbytes} bytes of host memory for a snapshot: {error}; save less,"
                    " lower max_in_flight, or raise the limits of the process (ulimit -v) or of its container"
                ) from error
        if pinned and not self.pinned and not self.refused:
            self.device = current_device()
            self.pinned = True  # before it is: undoing what was not done is harmless
            self.pinned = pin(mapping)
            self.refused = not self.pinned
        return mapping

    def _map(self) -> Mapping:
        mapping = map_private(self.nbytes, inherited=False)
        mapping.populate()
        self.mapping = mapping
        return mapping

    def close(self) -> None:
        if self.mapping is not None:
            try:
                if self.pinned:
                    unpin(self.mapping, self.device)
            finally:
                self.mapping.close()


@dataclass(slots=True, eq=False)
class Arena:
    """Host buffers of one process.

    Args:
        limit: the most bytes that buffers may take, leased and free; None for no cap.
    """

    limit: int | None = None
    _buffers: list[_Buffer] = field(default_factory=list, init=False)
    _high_water: int = field(default=0, init=False)
    _changed: Condition = field(default_factory=Condition, init=False)
    _clock: itertools.count[int] = field(default_factory=itertools.count, init=False)
    _preparer: Thread | None = field(default=None, init=False)

    def __repr__(self) -> str:
        s = self.statistics()
        return f"<Arena leases={s.leases} leased={s.leased} mapped={s.mapped} high_water={s.high_water}>"

    def statistics(self) -> ArenaStatistics:
        """Return what the arena holds now."""
        with self._changed:
            leased = [buffer.nbytes for buffer in self._buffers if buffer.is_leased]
            return ArenaStatistics(self._mapped(), sum(leased), len(leased), self._high_water)

    def set_limit(self, nbytes: int | None) -> None:
        """Change the cap; free buffers are given up, leased ones that exceed it once they are released."""
        self.limit = nbytes
        self._changed.notify_all()
        self.release()

    def lease(self, nbytes: int, *, pinned: bool = False, wait: bool = True) -> Lease:
        """Lease a buffer of at least `nbytes`, its pages touched, and pinned for a GPU's sake if asked to.

        If the cap leaves no room, wait until another snapshot is written, or raise BusyError if `wait` is
        false.

        Raises:
            SaveError: the cap is below `nbytes`, or the system has no memory.
        """
        self._changed.until(self._is_prepared)
        return self._lease(nbytes, pinned=pinned, wait=wait)

    def _lease(self, nbytes: int, *, pinned: bool, wait: bool) -> Lease:
        lease = Lease(self)
        try:
            self._fill(lease, nbytes, pinned=pinned, wait=wait)
        except BaseException:
            lease.release()
            raise
        return lease

    def reserve(self, nbytes: int, count: int, *, pinned: bool = False) -> None:
        """Make `count` free buffers of `nbytes` ready, as far as the cap allows."""
        with contextlib.ExitStack() as leases, contextlib.suppress(BusyError):
            for _ in range(count):
                leases.callback(self.lease(nbytes, pinned=pinned, wait=False).release)

    def prepare(self, nbytes: int, device: torch.device | None) -> None:
        """Make a free buffer of `nbytes` ready in a thread of its own, for which `lease` waits.

        What cannot be had is left to `lease`, which says why.

        Args:
            nbytes: its size.
            device: the CUDA device that copies into it, or None.
        """

        def run() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)
                    allow_captures()
                self._lease(nbytes, pinned=device is not None, wait=False).release()
            except (BusyError, SaveError, RuntimeError) as error:  # the last one is of CUDA
                logger.debug("memory for the first snapshot is not ready: %s", error)
            finally:
                self._preparer = None
                self._changed.notify_all()

        if self._is_prepared():
            self._preparer = Thread(target=run, name="asyncckpt-prepare", daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread can be started
                start_threads([self._preparer], [])

    def _is_prepared(self) -> bool:
        preparer = self._preparer
        return preparer is None or not preparer.is_alive() or preparer is current_thread()

    def release(self) -> None:
        """Unpin and unmap every free buffer; all of them if nothing is leased."""
        self._changed.until(self._is_prepared)
        with self._changed:
            free = [buffer for buffer in self._buffers if not buffer.is_leased]
            self._buffers = [buffer for buffer in self._buffers if buffer.is_leased]
        for buffer in free:
            buffer.close()

    def _fill(self, lease: Lease, nbytes: int, *, pinned: bool, wait: bool) -> None:
        replaced: list[_Buffer] = []
        try:
            self._changed.until(lambda: self._find(nbytes, lease, replaced), None if wait else 0)
        finally:
            for buffer in replaced:
                buffer.close()
        if lease._buffer is None:
            raise BusyError(f"no room for {nbytes} bytes of host memory: {self._leased()} are in use")
        mapping = lease._buffer.ready(pinned=pinned)
        lease.view, lease.address = mapping.view, mapping.address

    def _find(self, nbytes: int, lease: Lease, replaced: list[_Buffer]) -> bool:
        """Give `lease` a buffer for `nbytes`, a free one or one that is still to be mapped. Holds the lock.

        Free buffers that have to make room are put into `replaced`, to be unmapped by the caller.

        Returns:
            Whether there is one; if not, none will be until something is released.
        """
        if self.limit is not None and nbytes > self.limit:
            msg = f"a snapshot of {nbytes} bytes exceeds the limit of {self.limit} bytes of host memory"
            raise SaveError(f"{msg}; raise it with asyncckpt.set_memory_limit")
        free = sorted((b for b in self._buffers if not b.is_leased), key=lambda b: b.used)
        best = min((b for b in free if b.nbytes >= nbytes), key=lambda b: b.nbytes, default=None)
        room = max(self._high_water, self._leased() + nbytes)
        if self.limit is not None:
            room = min(room, self.limit)
        left = room - self._mapped() - nbytes
        if best is not None and (nbytes >= best.nbytes * _FIT or left < 0):
            best.lease = weakref.ref(lease)
            lease._buffer = best
        else:
            for buffer in free:
                if left >= 0:
                    break
                self._buffers.remove(buffer)
                replaced.append(buffer)
                left += buffer.nbytes
            if left < 0:
                return False
            lease._buffer = _Buffer(nbytes, weakref.ref(lease))
            self._buffers.append(lease._buffer)
        self._high_water = max(self._high_water, self._leased())
        return True

    def _take_back(self, buffer: _Buffer, lease: Lease) -> None:
        with self._changed:
            if buffer.lease is None or buffer.lease() is not lease:
                return
            buffer.lease = None
            buffer.used = next(self._clock)
            unusable = buffer.mapping is None or (self.limit is not None and self._mapped() > self.limit)
            if unusable and buffer in self._buffers:
                self._buffers.remove(buffer)
        self._changed.notify_all()
        if unusable:
            buffer.close()

    def _mapped(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def _leased(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers if buffer.is_leased)
