"""The arena: host buffers that snapshots are copied into, leased and given back, under one byte cap."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakSet

from asyncckpt._snapshot.copy_threads import on_helper
from asyncckpt._snapshot.memory import map_shared
from asyncckpt._snapshot.pinning import pin, unpin
from asyncckpt._threads import Condition
from asyncckpt.errors import BusyError, SaveError

if TYPE_CHECKING:
    from asyncckpt._snapshot.memory import Mapping

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
    """A buffer that belongs to one snapshot until `release`, or until nobody has the lease any more.

    It is 4096-aligned and at least as long as what was asked for.
    """

    _buffer: _Buffer | None = None

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    def __del__(self) -> None:
        if self._buffer is not None:
            self.release()

    @property
    def view(self) -> memoryview:
        """The whole buffer, writable."""
        return self._mapping.view

    @property
    def address(self) -> int:
        """Where its first byte is."""
        return self._mapping.address

    @property
    def fd(self) -> int:
        """The memfd behind it, at offset 0; -1 where the system has none."""
        return self._mapping.fd

    def share(self) -> Lease:
        """Return a second lease of the same buffer; this one is not given back yet."""
        lease = Lease(self._arena)
        self._arena._hold(self._buffer, lease)
        return lease

    def release(self) -> bool:
        """Give the buffer back; what it holds may be overwritten once all who share it have done so.

        Doing so twice is harmless.

        Returns:
            Whether this was the last lease of the buffer.
        """
        return self._arena._release(self)

    @property
    def _mapping(self) -> Mapping:
        if self._buffer is None or self._buffer.mapping is None:
            raise ValueError("this lease has no buffer")
        return self._buffer.mapping


@dataclass(slots=True, eq=False)
class _Buffer:
    """Memory of the arena.

    Attributes:
        nbytes: its size.
        mapping: the memory; None until it is mapped.
        pinned: whether it is registered with the CUDA runtime, or may be.
        holders: its leases. It is free when there are none.
        used: when it was leased last.
    """

    nbytes: int
    mapping: Mapping | None = None
    pinned: bool = False
    holders: WeakSet[Lease] = field(default_factory=WeakSet)
    used: int = 0

    def make(self) -> None:
        """Map the memory and touch every page of it."""
        mapping = map_shared(self.nbytes)
        mapping.populate()
        self.mapping = mapping

    def close(self) -> None:
        if self.mapping is not None:
            if self.pinned:
                unpin(self.mapping)
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

    def __repr__(self) -> str:
        s = self.statistics()
        return f"<Arena leases={s.leases} leased={s.leased} mapped={s.mapped} high_water={s.high_water}>"

    def statistics(self) -> ArenaStatistics:
        """Return what the arena holds now."""
        with self._changed:
            leased = [buffer.nbytes for buffer in self._buffers if buffer.holders]
            return ArenaStatistics(self._mapped(), sum(leased), len(leased), self._high_water)

    def set_limit(self, nbytes: int | None) -> None:
        """Change the cap; free buffers are given up, leased ones that exceed it once they are released."""
        self.limit = nbytes
        self._changed.notify_all()
        self.close()

    def lease(self, nbytes: int, *, pinned: bool = False, wait: bool = True) -> Lease:
        """Lease a buffer of at least `nbytes`, touched beforehand, and pinned for a GPU's sake if asked to.

        Waits for another snapshot to be written where the cap leaves no room, or raises BusyError if told
        not to wait.

        Raises:
            SaveError: the cap is below `nbytes`, or the system has no memory.
        """
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

    def close(self) -> None:
        """Unmap every free buffer."""
        with self._changed:
            unused = [buffer for buffer in self._buffers if not buffer.holders]
            self._buffers = [buffer for buffer in self._buffers if buffer.holders]
        for buffer in unused:
            buffer.close()

    def abandon(self) -> None:
        """Let go of all memory in a forked child, where it belongs to the parent's snapshots."""
        for buffer in self._buffers:
            if buffer.mapping is not None:
                buffer.mapping.abandon()
        self._buffers = []

    def _take(self, nbytes: int, lease: Lease, unused: list[_Buffer]) -> bool:
        """Let `lease` hold a buffer for `nbytes`, a free one or one that is still to be mapped.

        Free buffers are put into `unused`, to be unmapped, as far as there has to be room. The lock is held.

        Returns:
            Whether there is one; if not, none will be until something is released.
        """
        if self.limit is not None and nbytes > self.limit:
            msg = f"a snapshot of {nbytes} bytes exceeds the limit of {self.limit} bytes of host memory"
            raise SaveError(f"{msg}; raise it with asyncckpt.set_memory_limit")
        free = sorted((b for b in self._buffers if not b.holders), key=lambda b: b.nbytes)
        fitting = [buffer for buffer in free if buffer.nbytes >= nbytes]
        mapped, leased = self._mapped(), self._leased()
        room = max(self._high_water, leased + nbytes)
        if self.limit is not None:
            room = min(room, self.limit)
        if fitting and (nbytes >= fitting[0].nbytes * _FIT or mapped + nbytes > room):
            self._hold(fitting[0], lease)
            return True
        for buffer in sorted(free, key=lambda b: b.used):
            if mapped + nbytes <= room:
                break
            self._buffers.remove(buffer)
            unused.append(buffer)
            mapped -= buffer.nbytes
        if mapped + nbytes > room:
            return False
        buffer = _Buffer(nbytes)
        self._hold(buffer, lease)
        self._buffers.append(buffer)
        self._high_water = max(self._high_water, self._leased())
        return True

    def _fill(self, lease: Lease, nbytes: int, *, pinned: bool, wait: bool) -> None:
        """Give a lease its buffer."""
        unused: list[_Buffer] = []
        try:
            found = self._changed.until(lambda: self._take(nbytes, lease, unused), None if wait else 0)
        finally:
            for old in unused:
                old.close()
        if not found:
            raise BusyError(f"no room for {nbytes} bytes of host memory: {self._leased()} are in use")
        buffer = lease._buffer
        if buffer is None:  # only to type checkers: it has been taken
            return
        if buffer.mapping is None:
            try:
                on_helper(buffer.make)
            except (OSError, MemoryError) as error:
                raise SaveError(
                    f"cannot take {nbytes} bytes of host memory for a snapshot: {error}; save less, lower"
                    " max_in_flight, or raise the limits of the process (ulimit -f, -v) or of its container"
                ) from error
        if pinned and not buffer.pinned and buffer.mapping is not None:
            buffer.pinned = True  # before it is: undoing what was not done is harmless
            buffer.pinned = pin(buffer.mapping)

    def _hold(self, buffer: _Buffer | None, lease: Lease) -> None:
        """Give a buffer one lease more."""
        if buffer is None:
            return
        with self._changed:
            lease._buffer = buffer
            buffer.holders.add(lease)
            self._high_water = max(self._high_water, self._leased())

    def _release(self, lease: Lease) -> bool:
        buffer = lease._buffer
        if buffer is None:
            return False
        with self._changed:
            if lease not in buffer.holders:
                return False
            buffer.holders.discard(lease)
            if buffer.holders:
                return False
            buffer.used = next(self._clock)
            unusable = buffer.mapping is None or (self.limit is not None and self._mapped() > self.limit)
            if unusable and buffer in self._buffers:
                self._buffers.remove(buffer)
            self._changed.notify_all()
        if unusable:
            buffer.close()
        return True

    def _mapped(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def _leased(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers if buffer.holders)
