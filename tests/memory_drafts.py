"""Drafts in memory, with pieces of any size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from asyncckpt.stores.base import Draft

if TYPE_CHECKING:
    from collections.abc import Callable


class MemoryDraft(Draft):
    """A draft in memory, written by coroutines."""

    def __init__(self, chunk: int, writers: int) -> None:
        self.chunk = chunk
        self.writers = writers
        self.pieces: dict[int, bytes] = {}

    async def write(self, offset: int, data: memoryview) -> None:
        await anyio.lowlevel.checkpoint()
        assert offset % self.chunk == 0
        assert offset not in self.pieces
        self.pieces[offset] = bytes(data)

    async def commit(self) -> None:
        raise NotImplementedError

    def content(self) -> bytes:
        whole = b""
        for offset, data in sorted(self.pieces.items()):
            assert offset == len(whole)
            whole += data
        return whole


class ThreadedDraft(MemoryDraft):
    """The same, written by blocking calls of several threads."""

    def blocking_writer(self) -> Callable[[int, memoryview], None]:
        return lambda offset, data: self.pieces.update({offset: bytes(data)})
