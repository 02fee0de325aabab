"""Read a range of a file in pieces, several at once, and check the items in it as they become whole."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from asyncckpt._loading.reader import Check, Image
from asyncckpt._snapshot.memory import PAGE
from asyncckpt._threads import for_each, for_each_in_threads, in_thread
from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.layout.zip_reader import read_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from asyncckpt._snapshot.memory import Mapping
    from asyncckpt.layout.zip_reader import Directory, Request
    from asyncckpt.stores.base import OpenFile

    Buffer = Callable[[int, int], memoryview]  # returns the memory for the bytes [start, stop) of a file


class Place(NamedTuple):
    """Where an item lies.

    Attributes:
        file: name of the file in its folder.
        offset, length: of the item in the file, in bytes.
        entry: the key of the entry that it is of, for errors.
    """

    file: str
    offset: int
    length: int
    entry: str

    @property
    def end(self) -> int:
        """Where it ends in the file."""
        return self.offset + self.length


def page_before(offset: int) -> int:
    """Return where the page with this offset begins: files are read by whole pages, past the page cache."""
    return offset // PAGE * PAGE


class Part:
    """An item of a run, which is checked once all of it was read.

    Args:
        path: of the file.
        place: of the item.
        mapping: the memory that all of the item is read into; None if it is checked piece by piece.
        begin: where it begins in the memory.
    """

    def __init__(self, path: str, place: Place, mapping: Mapping | None, begin: int) -> None:
        self.place = place
        self.where = f"{path}, item {place.entry}"
        self.missing = 0  # how many pieces of it are still to be read
        self._mapping = mapping
        self._begin = begin
        self._check: Check | None = None
        self._directory: Directory | None = None

    @property
    def image(self) -> Image:
        """The item in memory."""
        if self._mapping is None or self._directory is None:
            raise AssertionError
        return Image(self.where, self._mapping, self.place.length, self._directory, self._begin)

    async def read_directory(self, file: OpenFile) -> None:
        """Read the item's directory before its content, so that each piece is checked as it comes."""
        self._directory = await file.answer(_shifted(self.place.offset, read_directory(self.place.length)))
        self._check = Check(self._directory, self.where)

    def add(self, start: int, data: memoryview) -> None:
        """Check the part of the item that is in `data`, which begins at offset `start` of the file."""
        if self._check is not None:
            begin = max(start, self.place.offset)
            end = min(start + len(data), self.place.end)
            self._check.add(begin - self.place.offset, data[begin - start : end - start])

    def finish(self) -> None:
        """Check what is left once all of it was added.

        Raises:
            CorruptCheckpointError: the item is damaged.
        """
        try:
            if self._check is None:
                self._check_whole()
            else:
                self._check.finish()
        except CorruptCheckpointError as error:
            raise named(error, self.where) from error

    def _check_whole(self) -> None:
        if self._mapping is None:
            raise AssertionError
        view = self._mapping.view[self._begin : self._begin + self.place.length]
        self._directory = _answer(view, read_directory(len(view)))
        check = Check(self._directory, self.where)
        check.add(0, view)
        check.finish()


class Run:
    """A range of a file, and the items in it.

    Args:
        file: the file.
        parts: its items, in order.
    """

    def __init__(self, file: OpenFile, parts: Sequence[Part]) -> None:
        self._file = file
        self._parts = parts
        self._begins = [part.place.offset for part in parts]
        self._ends = [part.place.end for part in parts]
        self._start, self._stop = page_before(self._begins[0]), self._ends[-1]
        self._lock = threading.Lock()

    async def read(
        self,
        readers: int,
        buffer: Buffer,
        checked: Callable[[memoryview], None] = lambda _: None,
    ) -> None:
        """Read it in pieces, several at once, and check every item.

        Args:
            readers: how many at once.
            buffer: returns the memory for the bytes [start, stop) of the file.
            checked: called with each piece when it is checked, on any thread.
        """
        file, chunk = self._file, self._file.chunk
        for part in self._parts:
            first, last = part.place.offset - self._start, part.place.end - 1 - self._start
            part.missing = last // chunk - first // chunk + 1
            if part.place.length > chunk:
                try:
                    await part.read_directory(file)
                except CorruptCheckpointError as error:
                    raise named(error, part.where) from error
        blocking = file.blocking_reader()

        async def read_piece(start: int) -> None:
            piece = buffer(start, min(start + chunk, self._stop))
            await file.read(start, piece)
            await in_thread(self._add, start, piece)
            checked(piece)

        def read_piece_here(read: Callable[[int, memoryview], None], start: int) -> None:
            piece = buffer(start, min(start + chunk, self._stop))
            read(start, piece)
            self._add(start, piece)
            checked(piece)

        starts = range(self._start, self._stop, chunk)
        if blocking is None:
            await for_each(read_piece, starts, min(readers, len(starts)))
        else:
            await for_each_in_threads(partial(read_piece_here, blocking), starts, min(readers, len(starts)))

    def _add(self, start: int, data: memoryview) -> None:
        first = bisect_right(self._ends, start)
        last = bisect_left(self._begins, start + len(data))
        for part in self._parts[first:last]:
            part.add(start, data)
            with self._lock:
                part.missing -= 1
                is_whole = not part.missing
            if is_whole:
                part.finish()


def named(error: CorruptCheckpointError, where: str) -> CorruptCheckpointError:
    """Return an error whose message begins with what it is about."""
    return error if where in str(error) else CorruptCheckpointError(f"{where}: {error}")


def _answer(view: memoryview, requests: Generator[Request, bytes, Directory]) -> Directory:
    """Send a generator the bytes of each (offset, length) that it yields; returns what it returns."""
    try:
        offset, length = next(requests)
        while True:
            offset, length = requests.send(bytes(view[offset : offset + length]))
    except StopIteration as stop:
        directory: Directory = stop.value
        return directory


def _shifted(
    begin: int, requests: Generator[Request, bytes, Directory]
) -> Generator[Request, bytes, Directory]:
    """Pass on what a generator asks for of a file that begins at offset `begin` of another one."""
    try:
        offset, length = next(requests)
        while True:
            offset, length = requests.send((yield begin + offset, length))
    except StopIteration as stop:
        directory: Directory = stop.value
        return directory
