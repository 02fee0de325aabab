"""Execute a plan: checksum the body as it fills, and write the file into a draft piece by piece."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING

import anyio
import numpy as np

from asyncckpt._checksum import crc32
from asyncckpt._threads import in_thread, tasks
from asyncckpt.layout.plan import CHECKSUM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

    from asyncckpt._snapshot.copy import Watermark
    from asyncckpt.layout.plan import FilePlan
    from asyncckpt.stores.base import Draft
    from asyncckpt.types import Offsets, SaveStats

    Piece = tuple[int, memoryview]


@dataclass(slots=True, eq=False)
class Transfer:
    """The execution of one plan.

    Attributes:
        plan: the bytes of the file.
        body: the buffer of the body; literals and checksums are added to it.
        filled: progress of the copy into the buffer.
        stats: `checksum` and `write` are set.
    """

    plan: FilePlan
    body: memoryview
    filled: Watermark
    stats: SaveStats
    _tail: bytearray = field(init=False, repr=False)
    _checksums: Offsets = field(init=False, repr=False)
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    # Under `_turn`: start of the next piece, and index of its first literal.
    _next: int = field(default=0, init=False)
    _literal: int = field(default=0, init=False)
    _advanced: threading.Condition = field(default_factory=threading.Condition, init=False, repr=False)
    # All bytes below `_final` are final. Whoever has the piece there owns the first checksum slot that is not
    # filled, and the checksum so far of the range that continues there.
    _final: int = field(default=0, init=False)
    _slot: int = field(default=0, init=False)
    _crc: int = field(default=0, init=False)
    _failed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._tail = bytearray(self.plan.tail)
        self._checksums = np.zeros(len(self.plan.body.starts), dtype=np.int64)

    async def into(self, draft: Draft) -> None:
        """Write the file into `draft`; the caller commits it."""
        began = time.perf_counter()
        write = draft.blocking_writer()
        writers = min(draft.writers, -(-self.plan.size // draft.chunk))
        async with tasks() as group:
            if write is not None:
                for _ in range(writers):
                    group.start_soon(in_thread, self._write_pieces, draft.chunk, write)
            else:
                # A short queue keeps the checksums just ahead of the writes: running further ahead would
                # take memory bandwidth from the copy on the training thread.
                send, receive = anyio.create_memory_object_stream["Piece"](writers)
                group.start_soon(self._queue_pieces, draft.chunk, send)
                for _ in range(writers):
                    group.start_soon(_write_queued, draft, receive.clone())
                receive.close()
        self.stats.write = time.perf_counter() - began

    def _write_pieces(self, chunk: int, write: Callable[[int, memoryview], None]) -> None:
        """Write pieces until the end of the file; several threads do so concurrently."""
        try:
            while (piece := self._next_piece(chunk)) is not None:
                write(*piece)
        except BaseException:
            with self._advanced:
                self._failed = True  # stops the other threads
                self._advanced.notify_all()
            raise

    async def _queue_pieces(self, chunk: int, queue: MemoryObjectSendStream[Piece]) -> None:
        async with queue:
            while (piece := await in_thread(self._next_piece, chunk)) is not None:
                await queue.send(piece)

    def _next_piece(self, chunk: int) -> Piece | None:
        """Return offset and bytes of the next piece once it is final; None at the end, and after a failure.

        Several threads prepare pieces at once. What depends on the bytes before is done piece after piece.
        """
        size, literals = self.plan.body.nbytes, self.plan.literals
        with self._turn:
            start, stop = self._next, min(self._next + chunk, self.plan.size)
            if start >= stop or self._failed:
                return None
            first = self._literal
            self._literal = bisect_left(literals, stop, lo=first, key=itemgetter(0))
            new = literals[first : self._literal]
            # The copy may overwrite bytes between ranges: a literal is added when the copy is past its end.
            end = max(stop, new[-1][0] + len(new[-1][1])) if new else stop
            self.filled.wait(min(end, size))
            self._next = stop
        began = time.perf_counter()
        for offset, literal in new:
            self.body[offset : offset + len(literal)] = literal
        crc = self._checksum_ranges(start, min(stop, size))
        seconds = time.perf_counter() - began
        with self._advanced:
            self._advanced.wait_for(lambda: self._final == start or self._failed)
            if self._final != start:
                return None
        began = time.perf_counter()
        self._continue_range(start, min(stop, size), crc)
        self._fill_slots(end if stop <= size else self.plan.size)
        with self._advanced:
            self.stats.checksum += seconds + time.perf_counter() - began
            self._final = stop
            self._advanced.notify_all()
        if stop <= size:
            return start, self.body[start:stop]
        tail = memoryview(self._tail)[max(start - size, 0) : stop - size]
        return start, tail if start >= size else memoryview(b"".join((self.body[start:size], tail)))

    def _checksum_ranges(self, start: int, stop: int) -> int:
        """Checksum the ranges that begin in [start, stop), up to `stop`; return the last checksum."""
        body = self.plan.body
        first, last = body.starts.searchsorted((start, stop)).tolist() if len(self.plan.slots) else (0, 0)
        rows = zip(body.starts[first:last].tolist(), body.stops[first:last].tolist(), strict=True)
        checksums = [crc32(self.body[begin : min(end, stop)]) for begin, end in rows]
        self._checksums[first:last] = checksums
        return checksums[-1] if checksums else 0

    def _continue_range(self, start: int, stop: int, crc: int) -> None:
        """Continue the checksum of a range that began before `start`; `crc` is the last of those since."""
        body = self.plan.body
        index = int(body.starts.searchsorted(start)) - 1 if len(self.plan.slots) else -1
        if index >= 0 and body.stops[index] > start:
            end = min(int(body.stops[index]), stop)
            self._checksums[index] = self._crc = crc32(self.body[start:end], self._crc)
            if end == stop:
                return
        self._crc = crc

    def _fill_slots(self, limit: int) -> None:
        """Write checksums into the slots below `limit`; the literals around them are in place."""
        plan, first, last = self.plan, self._slot, int(self.plan.slots.searchsorted(limit))
        checksums = self._checksums[plan.slot_ranges[first:last]].tolist()
        for slot, checksum in zip(plan.slots[first:last].tolist(), checksums, strict=True):
            data, at = (self.body, slot) if slot < plan.body.nbytes else (self._tail, slot - plan.body.nbytes)
            data[at : at + CHECKSUM_BYTES] = checksum.to_bytes(CHECKSUM_BYTES, "little")
        self._slot = last


async def _write_queued(draft: Draft, queue: MemoryObjectReceiveStream[Piece]) -> None:
    async with queue:
        async for offset, data in queue:
            await draft.write(offset, data)
