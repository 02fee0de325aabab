"""Adopt files of torch.save into a series: each gets a description, and keeps everything else.

`folder_adoption` does so with folders of stock DCP; both are found here.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from asyncckpt._loading.catalog import READERS, Catalog, read_described
from asyncckpt._loading.reader import Check, read_file, verify
from asyncckpt._naming import SUFFIXES
from asyncckpt._threads import for_each, in_thread
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StoreError
from asyncckpt.layout.description import Description
from asyncckpt.layout.folder_mark import read_mark
from asyncckpt.layout.other_formats import HEAD, recognize
from asyncckpt.layout.torch_zip import tail_with_description
from asyncckpt.layout.zip_format import DESCRIPTION, ROOT
from asyncckpt.layout.zip_reader import read_directory
from asyncckpt.stores.base import COPIED_AT_ONCE, FOLDER_MARK

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._loading.catalog import Entry
    from asyncckpt._naming import NameParser
    from asyncckpt.layout.zip_reader import Directory
    from asyncckpt.stores.base import OpenFile, Store
    from asyncckpt.types import Checkpoint

    Progress = Callable[[int], None]

_UNKNOWN = {"torch": "unknown", "python": "unknown"}  # versions that wrote a file without a description


@dataclass(slots=True)
class Survey:
    """What there is to adopt in a directory.

    Attributes:
        found: files and folders without a description whose names the template makes, in order of step: what
            each is to be, without a place in the order of commits.
        folders: the names of all folders, those that are not to be adopted included.
        described: names that the template may have made, of what has a description.
        misnamed: names that have a step where the template has it, but not as the template writes it.
        others: names of all else.
        sequence: the highest place in the order of commits that is taken.
    """

    found: list[Checkpoint] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    described: list[str] = field(default_factory=list)
    misnamed: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    sequence: int = 0


async def survey(store: Store, parser: NameParser) -> Survey:
    """Look at the names of a directory, and at which of its files and folders have a description.

    Raises:
        StoreError: the directory or a file could not be read.
    """
    seen = Survey()

    async def look(entry: Entry) -> None:
        name = entry.file.name
        if parser.names.step_of(name) is None:
            seen.others.append(name)
        elif await _is_described(store, entry):
            seen.described.append(name)
        elif (read := _read_name(parser, entry)) is None:
            seen.misnamed.append(name)
        else:
            path, nbytes = store.path_of(name), entry.file.nbytes
            if entry.is_folder:
                nbytes = sum(file.nbytes for file in await store.folder(name).list())
            seen.found.append(replace(read, path=path, nbytes=nbytes, created=entry.file.modified))

    entries = await Catalog(store).entries()
    seen.folders = {entry.file.name for entry in entries if entry.is_folder}
    await for_each(look, sorted(entries, key=lambda entry: entry.file.name), READERS)
    seen.found.sort(key=lambda checkpoint: (checkpoint.step, checkpoint.created, checkpoint.path))
    for names in (seen.described, seen.misnamed, seen.others):
        names.sort()
    seen.sequence = max((entry.checkpoint.sequence for entry in entries if entry.checkpoint), default=0)
    return seen


async def adopt(
    store: Store, found: Checkpoint, progress: Progress | None = None, *, dry_run: bool = False
) -> None:
    """Give a file a description, atomically: until the commit the file is as it was.

    Every byte is read, checked, and written to a new file, which then takes the name.

    Args:
        store: where the file is.
        found: the step, metrics and sequence number that its description gets.
        progress: called with how many more bytes were read, on the event loop's thread.
        dry_run: do all but writing.

    Raises:
        CheckpointNotFoundError: it was removed or replaced meanwhile.
        CorruptCheckpointError: it is damaged, has no checksums, or is of another format.
        StoreError: it could not be read or written.
    """

    async def read(file: OpenFile) -> None:
        directory = await _directory(file)
        if dry_run:
            await verify(file, progress)
        else:
            await _rewrite(store, file, directory, await _tail(file, directory, found), progress)

    await read_file(read, store, found.path.rpartition("/")[2])


def _read_name(parser: NameParser, entry: Entry) -> Checkpoint | None:
    """Return the step and the metrics in a name; that of a folder may lack the suffix of the template."""
    suffixes = ("", *sorted(SUFFIXES)) if entry.is_folder else ("",)
    read = (parser.read(entry.file.name + suffix) for suffix in suffixes)
    return next(filter(None, read), None)


async def _is_described(store: Store, entry: Entry) -> bool:
    if entry.checkpoint is not None or entry.error is not None:
        return entry.checkpoint is not None
    try:
        if entry.is_folder:
            async with store.folder(entry.file.name).open(FOLDER_MARK) as mark:
                return await mark.answer(read_mark(mark.file.nbytes)) is not None
        return await read_file(read_described, store, entry.file.name) is not None
    except (CorruptCheckpointError, FileNotFoundError, StoreError):
        return False  # its adoption raises that again


async def _tail(file: OpenFile, directory: Directory, found: Checkpoint) -> bytes:
    """Return the end of the new file: the description, and the zip directory."""
    entries = bytearray(directory.end - directory.begin)
    await file.read(directory.begin, memoryview(entries))
    description = Description(
        found.sequence, found.step, found.metrics, found.created, _UNKNOWN, found.filename
    )
    return tail_with_description(
        directory.begin, directory.folder, len(directory.names), bytes(entries), description.encode()
    )


async def _rewrite(
    store: Store, file: OpenFile, directory: Directory, tail: bytes, progress: Progress | None
) -> None:
    """Replace a file by its records, checked on the way, and a new tail."""
    body = directory.begin
    size = body + len(tail)
    check = Check(directory, file.path)
    async with store.draft(file.file.name, size) as draft:

        async def copy_piece(start: int) -> None:
            stop = min(start + draft.chunk, size)
            # The draft may need it until the commit; page-aligned, it is written past the page cache.
            data = memoryview(mmap.mmap(-1, stop - start))
            kept = max(min(stop, body) - start, 0)
            if kept:
                await file.read(start, data[:kept])
                await in_thread(check.add, start, data[:kept])
            data[kept:] = tail[max(start - body, 0) : max(stop - body, 0)]
            await draft.write(start, data)
            if progress is not None:
                progress(kept)

        await for_each(copy_piece, range(0, size, draft.chunk), min(draft.writers, COPIED_AT_ONCE))
        await in_thread(check.finish)
        if (await store.stat(file.file.name)).version != file.file.version:
            raise CheckpointNotFoundError(f"{file.path} was replaced while it was read")
        await draft.commit()


async def _directory(file: OpenFile) -> Directory:
    """Return the records of a file of torch.save without a description."""
    try:
        directory = await file.answer(read_directory(file.file.nbytes))
    except CorruptCheckpointError as error:
        head = bytearray(min(HEAD, file.file.nbytes))
        await file.read(0, memoryview(head))
        meaning = recognize(bytes(head))
        if meaning is None:
            raise
        raise CorruptCheckpointError(f"it is {meaning}") from error
    if directory.row(ROOT + "constants.pkl") is not None:
        raise CorruptCheckpointError("it is a TorchScript archive, a program rather than a checkpoint")
    if directory.row(DESCRIPTION) is not None:
        raise CorruptCheckpointError("it has a description, which is damaged or was written meanwhile")
    return directory
