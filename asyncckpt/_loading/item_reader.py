"""Read items in parallel and check every byte of them: checkpoint files that lie in a larger file."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from asyncckpt._loading.item_run import Part, Run, page_before
from asyncckpt._snapshot.memory import map_private
from asyncckpt._threads import for_each
from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from asyncckpt._loading.item_run import Buffer, Place
    from asyncckpt._loading.reader import Image
    from asyncckpt._snapshot.memory import Mapping
    from asyncckpt.stores.base import OpenFile, Store

# Items that lie this close, in bytes, are read at once, with what is between them.
_GAP = 256 << 10
_FILES_AT_ONCE = 4


async def read_items(store: Store, places: Sequence[Place]) -> list[Image]:
    """Read items into memory of their own; those that lie close to each other share it.

    Args:
        store: the folder.
        places: the items; those of one file do not overlap.

    Raises:
        CorruptCheckpointError: an item is damaged, or is not in its file; the message names both.
        FileNotFoundError: a file is missing.
        StoreError: a file could not be read.
    """
    images: dict[Place, Image] = {}
    mappings: list[Mapping] = []

    async def read_file(file: OpenFile, own: list[Place], readers: int) -> None:
        for group in _groups(own):
            begin = page_before(group[0].offset)
            mapping = map_private(group[-1].end - begin)
            mappings.append(mapping)
            parts = [Part(file.path, place, mapping, place.offset - begin) for place in group]
            await Run(file, parts).read(readers, _contiguous(mapping, begin))
            images.update((part.place, part.image) for part in parts)

    try:
        await _for_each_file(store, places, read_file)
    except BaseException:
        for mapping in mappings:
            mapping.close()
        raise
    return [images[place] for place in places]


async def verify_items(
    store: Store, places: Sequence[Place], progress: Callable[[int], None] | None = None
) -> None:
    """Do what `read_items` does, in a fixed amount of memory, and drop what was read.

    Args:
        store: the folder.
        places: the items.
        progress: called with how many more bytes were read, on any thread.
    """

    def checked(piece: memoryview, free: list[memoryview] | None = None) -> None:
        if free is not None:
            free.append(piece)  # only the last one of a run is shorter than its buffer
        if progress is not None:
            progress(len(piece))

    async def verify_file(file: OpenFile, own: list[Place], readers: int) -> None:
        mapping = map_private(file.chunk * (readers + 1))  # what does not fit is larger than a piece
        try:
            for group in _groups(own, most=mapping.nbytes):
                begin = page_before(group[0].offset)
                fits = group[-1].end - begin <= mapping.nbytes
                memory = mapping if fits else None
                parts = [Part(file.path, place, memory, place.offset - begin) for place in group]
                run = Run(file, parts)
                if fits:
                    await run.read(readers, _contiguous(mapping, begin), checked)
                else:
                    free = [mapping.view[at : at + file.chunk] for at in range(0, mapping.nbytes, file.chunk)]
                    await run.read(readers, _reused(free), partial(checked, free=free))
        finally:
            mapping.close()

    await _for_each_file(store, places, verify_file)


async def _for_each_file(
    store: Store, places: Sequence[Place], read: Callable[[OpenFile, list[Place], int], Awaitable[None]]
) -> None:
    """Call `read` with each file, its items in order, and with how many pieces are read at once."""
    by_file: defaultdict[str, list[Place]] = defaultdict(list)
    for place in places:
        by_file[place.file].append(place)
    at_once = min(_FILES_AT_ONCE, len(by_file))

    async def open_and_read(name: str) -> None:
        async with store.open(name) as file:
            own = sorted(set(by_file[name]), key=lambda place: place.offset)
            _check_extents(file, own)
            await read(file, own, max(file.readers // at_once, 1))

    await for_each(open_and_read, by_file, at_once)


def _check_extents(file: OpenFile, places: Sequence[Place]) -> None:
    """Raise unless sorted items lie in a file one after another."""
    for place in places:
        if place.offset < 0 or place.length <= 0 or place.end > file.file.nbytes:
            raise CorruptCheckpointError(
                f"{file.path}: its item {place.entry} lies at bytes {place.offset} to {place.end} of"
                f" {file.file.nbytes}; it was cut off, or is of another checkpoint"
            )
    for one, other in pairwise(places):
        if one.end > other.offset:
            raise CorruptCheckpointError(f"{file.path}: its items {one.entry} and {other.entry} overlap")


def _groups(places: Sequence[Place], most: float = float("inf")) -> list[list[Place]]:
    """Put sorted items together that are read at once, up to `most` bytes; larger items are alone."""
    groups: list[list[Place]] = []
    for place in places:
        group = groups[-1] if groups else []
        near = group and place.offset - group[-1].end <= _GAP
        if near and place.end - page_before(group[0].offset) <= most:
            group.append(place)
        else:
            groups.append([place])
    return groups


def _contiguous(mapping: Mapping, begin: int) -> Buffer:
    """Return what gives each piece of a file its place in a memory that holds it from `begin` on."""
    return lambda start, stop: mapping.view[start - begin : stop - begin]


def _reused(free: list[memoryview]) -> Buffer:
    """Return what gives each piece one of the buffers that are free."""
    return lambda start, stop: free.pop()[: stop - start]
