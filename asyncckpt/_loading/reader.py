"""Read files in parallel and check every byte of them."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from asyncckpt._checksum import crc32, crc32_combine
from asyncckpt._snapshot.memory import map_private
from asyncckpt._threads import for_each, for_each_in_threads, in_thread
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StoreError
from asyncckpt.layout.zip_reader import check_header, read_directory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from asyncckpt._snapshot.memory import Mapping
    from asyncckpt.layout.zip_reader import Directory
    from asyncckpt.stores.base import OpenFile, Store
    from asyncckpt.types import Offsets

R = TypeVar("R")

# How many small ranges are read at once.
READERS = 8
# A file or a directory that others keep changing is read anew this often.
ATTEMPTS = 100


async def read_file(read: Callable[[OpenFile], Awaitable[R]], store: Store, name: str) -> R:
    """Open a file for `read`, again if it is replaced meanwhile; errors name it.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CorruptCheckpointError: what `read` raises, with the path of the file.
        StoreError: it could not be read, or was replaced again and again.
    """
    where = store.path_of(name)
    for _ in range(ATTEMPTS):
        try:
            async with store.open(name) as file:
                return await read(file)
        except CheckpointNotFoundError:  # of `read` itself
            raise
        except CorruptCheckpointError as error:
            raise error if where in str(error) else CorruptCheckpointError(f"{where}: {error}") from error
        except FileNotFoundError as error:
            try:
                await store.stat(name)
            except FileNotFoundError:
                raise CheckpointNotFoundError(f"there is no checkpoint {where}") from error
    raise StoreError(errno.EAGAIN, f"{where} was replaced in each of {ATTEMPTS} attempts to read it", where)


@dataclass(slots=True, eq=False)
class Image:
    """A whole file in memory, every record of it checked; or an item, which is a file within another one.

    Attributes:
        path: path or URL of the file, for errors.
        mapping: the memory.
        nbytes: size of the file.
        directory: its records, the payload ranges as the local headers give them.
        begin: where in the memory the file begins.
    """

    path: str
    mapping: Mapping
    nbytes: int
    directory: Directory
    begin: int = 0

    def record(self, name: str) -> bytes | None:
        """Return the payload of a record, whatever its folder is called; None if there is no such record."""
        row = self.directory.row(name)
        if row is None:
            return None
        start, stop = (
            self.begin + int(place[row]) for place in (self.directory.starts, self.directory.stops)
        )
        return bytes(self.mapping.view[start:stop])


async def read_image(store: Store, name: str) -> Image:
    """Read a whole file into memory of its own; raises what `read_file` does."""
    return await read_file(_read_image, store, name)


async def _read_image(file: OpenFile) -> Image:
    mapping = map_private(file.file.nbytes)
    try:
        directory = await _read_checked(file, lambda start, stop: mapping.view[start:stop])
    except BaseException:
        mapping.close()
        raise
    return Image(file.path, mapping, file.file.nbytes, directory)


async def verify_file(store: Store, name: str, progress: Callable[[int], None] | None = None) -> None:
    """Read every byte of a file and compare every checksum; raises what `read_file` does.

    Args:
        store: where it is.
        name: which file.
        progress: called with how many more bytes were checked, on the event loop's thread.
    """
    await read_file(partial(verify, progress=progress), store, name)


async def verify(file: OpenFile, progress: Callable[[int], None] | None = None) -> None:
    """Do what `verify_file` does with an open file, in a fixed amount of memory."""
    mapping = map_private(file.chunk * file.readers)
    free = [mapping.view[start : start + file.chunk] for start in range(0, mapping.nbytes, file.chunk)]

    loop = asyncio.get_running_loop()

    def checked(piece: memoryview) -> None:
        free.append(piece)  # only the last one of the file is shorter than its buffer
        if progress is not None:
            loop.call_soon_threadsafe(progress, len(piece))

    try:
        await _read_checked(file, lambda start, stop: free.pop()[: stop - start], checked)
    finally:
        mapping.close()


async def _read_checked(
    file: OpenFile,
    buffer: Callable[[int, int], memoryview],
    checked: Callable[[memoryview], None] = lambda _: None,
) -> Directory:
    """Read a file in pieces, several at once, and check every record; returns the records.

    Args:
        file: which one.
        buffer: returns the memory for the bytes [start, stop).
        checked: called with each piece when it is checked, on any thread.
    """
    nbytes, chunk = file.file.nbytes, file.chunk
    directory = await file.answer(read_directory(nbytes))
    check = Check(directory, file.path)

    starts = range(0, nbytes, chunk)
    blocking = file.blocking_reader()

    async def read_piece(start: int) -> None:
        piece = buffer(start, min(start + chunk, nbytes))
        await file.read(start, piece)
        await in_thread(check.add, start, piece)
        checked(piece)

    def read_piece_here(read: Callable[[int, memoryview], None], start: int) -> None:
        piece = buffer(start, min(start + chunk, nbytes))
        read(start, piece)
        check.add(start, piece)
        checked(piece)

    at_once = min(file.readers, len(starts))
    if blocking is None:
        await for_each(read_piece, starts, at_once)
    else:
        await for_each_in_threads(partial(read_piece_here, blocking), starts, at_once)
    await in_thread(check.finish)
    return directory


@dataclass(slots=True, eq=False)
class Check:
    """Headers and checksums of the records of one file, put together from pieces in any order.

    Attributes:
        directory: the records.
        where: path or URL of the file, for errors.
    """

    directory: Directory
    where: str
    _headers: list[tuple[int, int, bytes]] = field(default_factory=list)
    _sums: list[tuple[int, int, int, int]] = field(default_factory=list)

    def add(self, start: int, data: memoryview) -> None:
        """Note what `data`, which begins at offset `start`, holds of each record."""
        d, stop = self.directory, start + len(data)
        for row, begin, end in _overlaps(d.headers, d.starts, start, stop):
            self._headers.append((row, begin, bytes(data[begin - start : end - start])))
        for row, begin, end in _overlaps(d.starts, d.stops, start, stop):
            self._sums.append((row, begin, crc32(data[begin - start : end - start]), end - begin))

    def finish(self) -> None:
        """Raise CorruptCheckpointError for the first record that is not what the directory says."""
        d = self.directory
        headers, sums = [b""] * len(d.names), [0] * len(d.names)
        for row, _, part in sorted(self._headers):
            headers[row] += part
        for row, _, part_sum, length in sorted(self._sums):
            sums[row] = crc32_combine(sums[row], part_sum, length)
        for row, (name, expected) in enumerate(zip(d.names, d.checksums.tolist(), strict=True)):
            check_header(headers[row], name, int(d.starts[row] - d.headers[row]))
            if sums[row] != expected:
                raise CorruptCheckpointError(f"{self.where}{self._mismatch(row, sums[row])}")

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
