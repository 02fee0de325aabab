"""Read files in parallel and check every byte of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from asyncckpt._checksum import crc32, crc32_combine
from asyncckpt._snapshot.memory import map_private
from asyncckpt._threads import for_each, in_thread
from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.layout.zip_reader import check_header, read_directory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator

    from asyncckpt._snapshot.memory import Mapping
    from asyncckpt.layout.zip_reader import Directory, Request
    from asyncckpt.stores.base import OpenFile
    from asyncckpt.types import Offsets

R = TypeVar("R")

# Pieces of this many bytes are read by this many tasks: more than a store reads at once, since some of them
# are busy with checksums.
CHUNK = 16 << 20
READERS = 8


async def answer(requests: Generator[Request, bytes, R], file: OpenFile) -> R:
    """Run one of the layout's reading generators against a file."""
    try:
        offset, length = next(requests)
        while True:
            data = bytearray(length)
            await file.read(offset, memoryview(data))
            offset, length = requests.send(bytes(data))
    except StopIteration as stop:
        result: R = stop.value
        return result


@dataclass(slots=True, eq=False)
class Image:
    """A whole file in memory, every record of it checked.

    Attributes:
        path: path or URL of the file.
        mapping: the memory; the file begins at its first byte.
        nbytes: size of the file.
        directory: its records, the payload ranges as the local headers tell them.
    """

    path: str
    mapping: Mapping
    nbytes: int
    directory: Directory

    def record(self, name: str) -> bytes | None:
        """Return the payload of a record, whatever its folder is called; None if there is no such record."""
        row = self.directory.row(name)
        if row is None:
            return None
        return bytes(self.mapping.view[int(self.directory.starts[row]) : int(self.directory.stops[row])])


async def read_image(file: OpenFile) -> Image:
    """Read a whole file into memory of its own.

    Raises:
        CorruptCheckpointError: names the damaged record.
        StoreError: the file could not be read.
    """
    nbytes = file.file.nbytes
    directory = await answer(read_directory(nbytes), file)
    mapping = map_private(nbytes)
    try:
        check = Check(directory, file.path)

        async def read(start: int, stop: int) -> None:
            piece = mapping.view[start:stop]
            await file.read(start, piece)
            await in_thread(check.add, start, piece)

        await _in_parallel(read, nbytes)
        await in_thread(check.finish)
    except BaseException:
        mapping.close()
        raise
    return Image(file.path, mapping, nbytes, directory)


async def verify(file: OpenFile, progress: Callable[[int], None] | None = None) -> None:
    """Read every byte of a file and compare every checksum, in a fixed amount of memory.

    Args:
        file: which one.
        progress: called with how many more bytes were checked, on the event loop's thread.

    Raises:
        CorruptCheckpointError: names the damaged record.
        StoreError: the file could not be read.
    """
    nbytes = file.file.nbytes
    directory = await answer(read_directory(nbytes), file)
    check = Check(directory, file.path)
    buffers = [map_private(CHUNK) for _ in range(READERS)]
    free = [mapping.view for mapping in buffers]

    async def read(start: int, stop: int) -> None:
        buffer = free.pop()
        piece = buffer[: stop - start]
        await file.read(start, piece)
        await in_thread(check.add, start, piece)
        free.append(buffer)
        if progress is not None:
            progress(stop - start)

    try:
        await _in_parallel(read, nbytes)
        await in_thread(check.finish)
    finally:
        for mapping in buffers:
            mapping.close()


async def _in_parallel(read: Callable[[int, int], Awaitable[None]], size: int) -> None:
    """Call `read` for each chunk of a file of `size` bytes, from several tasks."""

    async def read_from(start: int) -> None:
        await read(start, min(start + CHUNK, size))

    await for_each(read_from, range(0, size, CHUNK), READERS)


@dataclass(slots=True, eq=False)
class Check:
    """Headers and checksums of the records of one file, put together from chunks in any order.

    Attributes:
        directory: the records.
        where: path or URL of the file, for errors.
    """

    directory: Directory
    where: str
    _parts: defaultdict[int, dict[int, tuple[int, int]]] = field(default_factory=lambda: defaultdict(dict))
    _headers: defaultdict[int, dict[int, bytes]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, start: int, data: memoryview) -> None:
        """Look at what `data`, which begins at offset `start`, holds of each record."""
        d, stop = self.directory, start + len(data)
        for row, begin, end in _overlaps(d.headers, d.starts, start, stop):
            self._headers[row][begin] = bytes(data[begin - start : end - start])
        for row, begin, end in _overlaps(d.starts, d.stops, start, stop):
            self._parts[row][begin] = (crc32(data[begin - start : end - start]), end - begin)

    def finish(self) -> None:
        """Raise CorruptCheckpointError for the first record that is not what the directory says."""
        d = self.directory
        rows = zip(d.names, d.headers.tolist(), d.starts.tolist(), d.checksums.tolist(), strict=True)
        for row, (name, header, start, expected) in enumerate(rows):
            found = b"".join(part for _, part in sorted(self._headers[row].items()))
            check_header(found, name, start - header)
            checksum = 0
            for _, (part, length) in sorted(self._parts[row].items()):
                checksum = crc32_combine(checksum, part, length)
            if checksum != expected:
                raise CorruptCheckpointError(f"{self.where}{self._mismatch(row, checksum)}")

    def _mismatch(self, row: int, checksum: int) -> str:
        """Return what it means that a record has this checksum."""
        d = self.directory
        if not d.checksums.any():
            return (
                " holds no checksums (torch.save leaves them out after set_crc32_options(False)), so whether"
                " it is damaged cannot be told; only torch.load reads it, unchecked"
            )
        return (
            f": record {d.names[row]} ({d.stops[row] - d.starts[row]} bytes) is damaged: its checksum is"
            f" {checksum:#010x}, not {d.checksums[row]:#010x}; use another checkpoint"
        )


def _overlaps(begins: Offsets, ends: Offsets, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield the row of each ascending range that [start, stop) meets, and the part that it shares."""
    first, last = int(ends.searchsorted(start, "right")), int(begins.searchsorted(stop))
    pairs = zip(begins[first:last].tolist(), ends[first:last].tolist(), strict=True)
    for row, (begin, end) in enumerate(pairs, first):
        yield row, max(begin, start), min(end, stop)
