"""Carry a plan out: checksum the body as it fills, and hand the file to a store's draft piece by piece."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING

import anyio

from asyncckpt._checksum import crc32
from asyncckpt._threads import in_thread, tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

    from asyncckpt._snapshot.copy import Watermark
    from asyncckpt.stores.base import Draft
    from asyncckpt.types import FilePlan

    Pieces = MemoryObjectSendStream[tuple[int, memoryview]]

# A checksum in the tail, like those in the body, is four little-endian bytes.
_CRC = 4


@dataclass(slots=True, eq=False)
class Transfer:
    """One plan on its way into a draft.

    Attributes:
        plan: what the file consists of.
        body: the buffer that the body lies in; its literal pieces and checksums are put there.
        filled: how far the copy into the buffer has come.
        checksum_seconds, write_seconds: time spent, the latter from the first write to the end of the last.
    """

    plan: FilePlan
    body: memoryview
    filled: Watermark
    checksum_seconds: float = 0.0
    write_seconds: float = 0.0
    _tail: bytearray = field(init=False, repr=False)
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _next: int = field(default=0, init=False)
    _gap: int = field(default=0, init=False)
    _record: int = field(default=0, init=False)
    _offset: int = field(default=0, init=False)
    _crc: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._tail = bytearray(self.plan.tail)

    async def into(self, draft: Draft) -> None:
        """Write the whole file into `draft`; the commit is left to the caller."""
        began = time.perf_counter()
        write = draft.blocking_writer()
        async with tasks() as group:
            if write is not None:
                for _ in range(draft.writers):
                    group.start_soon(in_thread, self._seal_and_write, draft.chunk, write)
            else:
                # A short queue keeps the checksums just ahead of the writes: running further ahead would
                # take memory bandwidth from the copy on the training thread.
                send, receive = anyio.create_memory_object_stream[tuple[int, memoryview]](draft.writers)
                group.start_soon(self._seal_all, draft.chunk, send)
                for _ in range(draft.writers):
                    group.start_soon(_write_all, draft, receive.clone())
                receive.close()
        self.write_seconds = time.perf_counter() - began

    def _seal_and_write(self, chunk: int, write: Callable[[int, memoryview], None]) -> None:
        """Seal the next piece, in order, and write it, beside other threads that do the same, to the end."""
        size = self.plan.size
        try:
            while True:
                with self._turn:
                    start, stop = self._next, min(self._next + chunk, size)
                    if start >= size:
                        return
                    data = self._seal(start, stop)
                    self._next = stop
                write(start, data)
        except BaseException:
            with self._turn:
                self._next = size  # the others need not go on
            raise

    async def _seal_all(self, chunk: int, out: Pieces) -> None:
        async with out:
            for start in range(0, self.plan.size, chunk):
                stop = min(start + chunk, self.plan.size)
                await out.send((start, await in_thread(self._seal, start, stop)))

    def _seal(self, start: int, stop: int) -> memoryview:
        """Return the bytes [start, stop) of the file, once they are there and all their checksums are in."""
        gaps = self._gaps_below(stop)
        # A gap is filled once the copy is past all of it: what copies may write over it with what was there.
        end = max(stop, gaps[-1][0] + len(gaps[-1][1])) if gaps else stop
        self.filled.wait(min(end, self.plan.body))
        began = time.perf_counter()
        for offset, literal in gaps:
            self.body[offset : offset + len(literal)] = literal
        self._checksum_up_to(stop)
        self.checksum_seconds += time.perf_counter() - began
        if stop <= self.plan.body:
            return self.body[start:stop]
        split = max(self.plan.body - start, 0)
        tail = memoryview(self._tail)[max(start - self.plan.body, 0) : stop - self.plan.body]
        return memoryview(b"".join((self.body[start : start + split], tail))) if split else tail

    def _gaps_below(self, stop: int) -> Sequence[tuple[int, bytes]]:
        """Return the gaps that begin before `stop` and were not returned before."""
        gaps, first = self.plan.gaps, self._gap
        self._gap = bisect_left(gaps, stop, lo=first, key=itemgetter(0))
        return gaps[first : self._gap]

    def _checksum_up_to(self, stop: int) -> None:
        """Checksum the payloads below `stop`, and put in the checksum of each record that ends there."""
        plan, body, tail = self.plan, self.body, self._tail
        limit = min(stop, plan.body)
        count = int(plan.starts.searchsorted(limit)) - self._record
        rows = slice(self._record, self._record + count)
        columns = (plan.starts, plan.stops, plan.slots, plan.tail_slots)
        for start, end, slot, tail_slot in zip(*(column[rows].tolist() for column in columns), strict=True):
            upto = min(end, limit)
            self._crc = crc32(body[max(start, self._offset) : upto], self._crc)
            if end > limit:
                self._offset = upto
                return
            encoded = self._crc.to_bytes(_CRC, "little")
            if end > start:
                body[slot : slot + _CRC] = encoded
            tail[tail_slot : tail_slot + _CRC] = encoded
            self._record += 1
            self._offset = self._crc = 0


async def _write_all(draft: Draft, pieces: MemoryObjectReceiveStream[tuple[int, memoryview]]) -> None:
    async with pieces:
        async for offset, data in pieces:
            await draft.write(offset, data)
