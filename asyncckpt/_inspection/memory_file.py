"""A file that is in memory, or mapped."""

from __future__ import annotations

from asyncckpt.stores.base import OpenFile, StoredFile


class MemoryFile(OpenFile):
    """Bytes in memory, read as a file; such as an item of a larger file that is mapped.

    Attributes:
        path: for messages.
        data: its bytes.
    """

    def __init__(self, path: str, data: memoryview) -> None:
        self.path = path
        self.file = StoredFile("", len(data), "")
        self.data = data

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on."""
        into[:] = self.data[offset : offset + len(into)]
