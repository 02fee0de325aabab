"""Read files in parallel and check every byte of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import anyio

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.layout.checksum import crc32, crc32_combine
from asyncckpt.layout.torch_zip import LOCAL
from asyncckpt.layout.zip_reader import payload_start, read_directory
from asyncckpt.snapshot.memory import map_private
from asyncckpt.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from asyncckpt.layout.zip_reader import Directory, Request
    from asyncckpt.snapshot.memory import Mapping
    from asyncckpt.stores.base import Store, StoredFile

R = TypeVar("R")

# Pieces of this many bytes are read by this many tasks.
CHUNK = 16 << 20
READERS = 4


async def answer(requests: Generator[Request, bytes, R], store: Store, name: str) -> R:
    """Run one of the layout's reading generators against a file."""
    try:
        offset, length = next(requests)
        while True:
            data = bytearray(length)
            await store.read(name, offset, memoryview(data))
            offset, length = requests.send(bytes(data))
    except StopIteration as stop:
        result: R = stop.value
        return result


@dataclass(slots=True, eq=False)
class Image:
    """A whole file in memory, every record of it checked.

    Attributes:
        mapping: the memory; the file begins at its first byte.
        nbytes: size of the file.
        directory: its records, the payload ranges as the local headers tell them.
    """

    mapping: Mapping
    nbytes: int
    directory: Directory


async def read_image(store: Store, file: StoredFile) -> Image:
    """Read a whole file into memory of its own.

    Raises:
        CorruptCheckpointError: names the damaged record.
        StoreError: the file could not be read.
    """
    directory = await answer(read_directory(file.nbytes), store, file.name)
    mapping = map_private(file.nbytes)
    try:
        check = _Check(directory)

        async def read(start: int, stop: int) -> None:
            piece = mapping.view[start:stop]
            await store.read(file.name, start, piece)
            await in_thread(check.add, start, piece)

        await _in_parallel(read, file.nbytes)
        await check.finish(store, file.name)
    except BaseException:
        mapping.close()
        raise
    return Image(mapping, file.nbytes, directory)


async def verify(store: Store, file: StoredFile) -> None:
    """Read every byte of a file and compare every checksum, in a fixed amount of memory.

    Raises:
        CorruptCheckpointError: names the damaged record.
        StoreError: the file could not be read.
    """
    directory = await answer(read_directory(file.nbytes), store, file.name)
    check = _Check(directory)
    buffers = [map_private(CHUNK) for _ in range(READERS)]
    free = [mapping.view for mapping in buffers]

    async def read(start: int, stop: int) -> None:
        buffer = free.pop()
        piece = buffer[: stop - start]
        await store.read(file.name, start, piece)
        await in_thread(check.add, start, piece)
        free.append(buffer)

    try:
        await _in_parallel(read, file.nbytes)
        await check.finish(store, file.name)
    finally:
        for mapping in buffers:
            mapping.close()


async def _in_parallel(read: Callable[[int, int], Awaitable[None]], size: int) -> None:
    """Call `read` for each chunk of a file of `size` bytes, from several tasks."""
    chunks = iter([(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)])

    async def work() -> None:
        for start, stop in chunks:
            await read(start, stop)

    async with anyio.create_task_group() as tasks:
        for _ in range(READERS):
            tasks.start_soon(work)


@dataclass(slots=True, eq=False)
class _Check:
    """Checksums of the records of one file, put together from chunks in any order."""

    directory: Directory
    _parts: defaultdict[int, dict[int, tuple[int, int]]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, start: int, data: memoryview) -> None:
        """Checksum what `data`, which begins at offset `start`, holds of each payload."""
        d, stop = self.directory, start + len(data)
        rows = range(int(d.stops.searchsorted(start, "right")), int(d.starts.searchsorted(stop)))
        begins, ends = d.starts[rows.start : rows.stop].tolist(), d.stops[rows.start : rows.stop].tolist()
        for row, begin, end in zip(rows, begins, ends, strict=True):
            begin, end = max(begin, start), min(end, stop)  # noqa: PLW2901
            self._parts[row][begin] = (crc32(data[begin - start : end - start]), end - begin)

    async def finish(self, store: Store, name: str) -> None:
        """Raise CorruptCheckpointError for the first record whose checksum is not the directory's."""
        for row, expected in enumerate(self.directory.checksums.tolist()):
            if self._checksum(row) != expected:
                await self._explain(row, expected, store, name)

    def _checksum(self, row: int) -> int:
        checksum = 0
        for _, (part, length) in sorted(self._parts[row].items()):
            checksum = crc32_combine(checksum, part, length)
        return checksum

    async def _explain(self, row: int, expected: int, store: Store, name: str) -> None:
        d = self.directory
        record, header = d.names[row], int(d.headers[row])
        fixed = bytearray(LOCAL.size)
        await store.read(name, header, memoryview(fixed))
        found = f"{store.path_of(name)}: record {record}"
        try:
            at = header + payload_start(fixed)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{found} is damaged: {error}") from None
        if at != d.starts[row]:
            msg = f"{found} lies where neither torch.save nor asyncckpt puts it; load it with torch.load"
            raise CorruptCheckpointError(msg)
        length, checksum = int(d.stops[row] - d.starts[row]), self._checksum(row)
        msg = f"{found} ({length} bytes) is damaged: its checksum is {checksum:#010x}, not {expected:#010x}"
        raise CorruptCheckpointError(f"{msg}; use another checkpoint")
