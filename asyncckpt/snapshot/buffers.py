"""The arena: host buffers that snapshots are copied into, leased and given back, under one byte cap."""

from __future__ import annotations

import contextlib
import itertools
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncckpt.errors import BusyError, SaveError
from asyncckpt.snapshot.memory import map_shared
from asyncckpt.snapshot.pinning import pin, unpin

if TYPE_CHECKING:
    from asyncckpt.snapshot.memory import Mapping

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


@dataclass(slots=True, eq=False)
class Lease:
    """A buffer that belongs to one snapshot until `release`.

    It is 4096-aligned and at least as long as what was asked for.
    """

    _arena: Arena
    _buffer: _Buffer
    _released: bool = field(default=False, init=False)

    @property
    def view(self) -> memoryview:
        """The whole buffer, writable."""
        return self._buffer.mapping.view

    @property
    def address(self) -> int:
        """Where its first byte is."""
        return self._buffer.mapping.address

    @property
    def fd(self) -> int:
        """The memfd behind it, at offset 0; -1 where the system has none."""
        return self._buffer.mapping.fd

    def share(self) -> Lease:
        """Return a second lease of the same buffer; this one is not given back yet."""
        self._arena._hold(self._buffer)
        return Lease(self._arena, self._buffer)

    def release(self) -> bool:
        """Give the buffer back; what it holds may be overwritten once all who share it have done so.

        Doing so twice is harmless.

        Returns:
            Whether this was the last lease of the buffer.
        """
        if self._released:
            return False
        self._released = True
        return self._arena._release(self._buffer)


@dataclass(slots=True, eq=False)
class _Buffer:
    mapping: Mapping
    pinned: bool = False
    leased: bool = True
    holders: int = 1
    used: int = 0

    @property
    def nbytes(self) -> int:
        return self.mapping.nbytes

    def close(self) -> None:
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
    _mapping: int = field(default=0, init=False)
    _high_water: int = field(default=0, init=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False)
    _clock: itertools.count[int] = field(default_factory=itertools.count, init=False)

    def __repr__(self) -> str:
        s = self.statistics()
        return f"<Arena leases={s.leases} leased={s.leased} mapped={s.mapped} high_water={s.high_water}>"

    def statistics(self) -> ArenaStatistics:
        """Return what the arena holds now."""
        with self._changed:
            leased = [buffer.nbytes for buffer in self._buffers if buffer.leased]
            mapped = sum(buffer.nbytes for buffer in self._buffers)
            return ArenaStatistics(mapped, sum(leased), len(leased), self._high_water)

    def set_limit(self, nbytes: int | None) -> None:
        """Change the cap; free buffers are given up, leased ones that exceed it once they are released."""
        with self._changed:
            self.limit = nbytes
            self._changed.notify_all()
        self.close()

    def lease(self, nbytes: int, *, pinned: bool = False, wait: bool = True) -> Lease:
        """Lease a buffer of at least `nbytes`, touched beforehand, and pinned for a GPU's sake if asked to.

        Waits for another snapshot to be written where the cap leaves no room, or raises BusyError if told
        not to wait.

        Raises:
            SaveError: the cap is below `nbytes`.
        """
        with self._changed:
            while (found := self._take(nbytes)) is None:
                if not wait:
                    raise BusyError(f"no room for {nbytes} bytes of host memory: {self._leased()} are in use")
                self._changed.wait()
            buffer, size, unused = found
        for old in unused:
            old.close()
        if buffer is None:
            buffer = self._make(size)
        try:
            if pinned and not buffer.pinned:
                buffer.pinned = pin(buffer.mapping)
        except BaseException:
            self._release(buffer)
            raise
        return Lease(self, buffer)

    def reserve(self, nbytes: int, count: int, *, pinned: bool = False) -> None:
        """Make `count` free buffers of `nbytes` ready, as far as the cap allows."""
        with contextlib.ExitStack() as leases, contextlib.suppress(BusyError):
            for _ in range(count):
                leases.callback(self.lease(nbytes, pinned=pinned, wait=False).release)

    def close(self) -> None:
        """Unmap every free buffer."""
        with self._changed:
            unused = [buffer for buffer in self._buffers if not buffer.leased]
            self._buffers = [buffer for buffer in self._buffers if buffer.leased]
        for buffer in unused:
            buffer.close()

    def abandon(self) -> None:
        """Let go of all memory in a forked child, where it belongs to the parent's snapshots."""
        for buffer in self._buffers:
            buffer.mapping.abandon()

    def _take(self, nbytes: int) -> tuple[_Buffer | None, int, list[_Buffer]] | None:
        """Choose a buffer for `nbytes`, and note the choice; the lock is held.

        Returns:
            The free buffer to use, or None and the size of one to map; and free buffers to close for it.
            None if there is no room until something is released.
        """
        if self.limit is not None and nbytes > self.limit:
            msg = f"a snapshot of {nbytes} bytes exceeds the limit of {self.limit} bytes of host memory"
            raise SaveError(f"{msg}; raise it with asyncckpt.set_memory_limit")
        free = sorted((b for b in self._buffers if not b.leased), key=lambda b: b.nbytes)
        fitting = [buffer for buffer in free if buffer.nbytes >= nbytes]
        mapped = sum(buffer.nbytes for buffer in self._buffers) + self._mapping
        leased = self._leased()
        room = max(self._high_water, leased + nbytes)
        if self.limit is not None:
            room = min(room, self.limit)
        if fitting and (nbytes >= fitting[0].nbytes * _FIT or mapped + nbytes > room):
            fitting[0].leased, fitting[0].holders = True, 1
            self._high_water = max(self._high_water, leased + fitting[0].nbytes)
            return fitting[0], nbytes, []
        unused: list[_Buffer] = []
        for buffer in sorted(free, key=lambda b: b.used):
            if mapped + nbytes <= room:
                break
            unused.append(buffer)
            mapped -= buffer.nbytes
        if mapped + nbytes > room:
            return None
        self._buffers = [buffer for buffer in self._buffers if buffer not in unused]
        self._mapping += nbytes
        self._high_water = max(self._high_water, leased + nbytes)
        return None, nbytes, unused

    def _make(self, nbytes: int) -> _Buffer:
        try:
            mapping = map_shared(nbytes)
            mapping.populate()
        except BaseException:
            with self._changed:
                self._mapping -= nbytes
                self._changed.notify_all()
            raise
        with self._changed:
            self._mapping -= nbytes
            buffer = _Buffer(mapping)
            self._buffers.append(buffer)
        return buffer

    def _hold(self, buffer: _Buffer) -> None:
        with self._changed:
            buffer.holders += 1

    def _release(self, buffer: _Buffer) -> bool:
        with self._changed:
            buffer.holders -= 1
            if buffer.holders:
                return False
            buffer.leased = False
            buffer.used = next(self._clock)
            excess = self.limit is not None and sum(b.nbytes for b in self._buffers) > self.limit
            if excess:
                self._buffers.remove(buffer)
            self._changed.notify_all()
        if excess:
            buffer.close()
        return True

    def _leased(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers if buffer.leased) + self._mapping
