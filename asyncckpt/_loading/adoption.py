"""Adopt files of torch.save into a series: each gets a description, and keeps everything else."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from asyncckpt._loading.catalog import READERS, Catalog, read_described
from asyncckpt._loading.reader import Check, answer, read_file, verify
from asyncckpt._threads import for_each, in_thread
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StoreError
from asyncckpt.layout.description import Description
from asyncckpt.layout.other_formats import HEAD, recognize
from asyncckpt.layout.torch_zip import DESCRIPTION, ROOT, tail_with_description
from asyncckpt.layout.zip_reader import read_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncckpt._loading.catalog import Entry
    from asyncckpt._naming import NameParser
    from asyncckpt.layout.zip_reader import Directory
    from asyncckpt.stores.base import Draft, OpenFile, Store
    from asyncckpt.types import Checkpoint

    Progress = Callable[[int], None]

_UNKNOWN = {"torch": "unknown", "python": "unknown"}  # versions that wrote a file which does not tell


@dataclass(frozen=True, slots=True)
class Survey:
    """What there is to adopt in a directory.

    Attributes:
        found: files without a description whose names the template makes, in order of step: what each is to
            be, without a place in the order of commits.
        described: names that the template may have made, of files that have a description.
        misnamed: names that have a step where the template has it, but not as the template writes it.
        others: names of all other files.
        sequence: the highest place in the order of commits that is taken.
    """

    found: Sequence[Checkpoint]
    described: Sequence[str]
    misnamed: Sequence[str]
    others: Sequence[str]
    sequence: int


async def survey(store: Store, parser: NameParser) -> Survey:
    """Look at the names of a directory, and at which of its files have a description.

    Raises:
        StoreError: the directory or a file could not be read.
    """
    entries = await Catalog(store).entries()
    fitting = [entry for entry in entries if parser.names.step_of(entry.file.name) is not None]
    described = set(await for_each(partial(_described, store), fitting, READERS))
    found, misnamed = [], []
    for entry in fitting:
        read = parser.read(entry.file.name)
        if entry.file.name in described:
            continue
        if read is None:
            misnamed.append(entry.file.name)
            continue
        path = store.path_of(entry.file.name)
        found.append(replace(read, path=path, nbytes=entry.file.nbytes, created=entry.file.modified))
    found.sort(key=lambda checkpoint: (checkpoint.step, checkpoint.created, checkpoint.path))
    kept = {entry.file.name for entry in fitting}
    return Survey(
        found,
        sorted(name for name in described if name is not None),
        sorted(misnamed),
        sorted(entry.file.name for entry in entries if entry.file.name not in kept),
        max((entry.checkpoint.sequence for entry in entries if entry.checkpoint is not None), default=0),
    )


async def adopt(store: Store, found: Checkpoint, progress: Progress | None = None) -> None:
    """Give a file a description, atomically: until the commit the file is as it was.

    Every byte is read, checked, and written to a new file, which then takes the name.

    Args:
        store: where the file is.
        found: what it is to be.
        progress: called with how many more bytes were copied, on the event loop's thread.

    Raises:
        CheckpointNotFoundError: it was removed or replaced meanwhile.
        CorruptCheckpointError: it is damaged, has no checksums, or is of another format.
        StoreError: it could not be read or written.
    """
    await read_file(partial(_adopt, store, found, progress), store, _name_of(found))


async def check(store: Store, found: Checkpoint, progress: Progress | None = None) -> None:
    """Do what `adopt` does, short of writing; raises the same."""
    await read_file(partial(_check, progress), store, _name_of(found))


async def _described(store: Store, entry: Entry) -> str | None:
    """Return the name of a file that has a description; None if it has none."""
    if entry.checkpoint is not None:
        return entry.file.name
    try:
        described = None if entry.error else await read_file(read_described, store, entry.file.name)
    except (CorruptCheckpointError, CheckpointNotFoundError, StoreError):
        return None  # whoever adopts it is told
    return None if described is None else entry.file.name


async def _check(progress: Progress | None, file: OpenFile) -> None:
    await _directory(file)
    await verify(file, progress)


async def _adopt(store: Store, found: Checkpoint, progress: Progress | None, file: OpenFile) -> None:
    directory = await _directory(file)
    entries = bytearray(directory.end - directory.begin)
    await file.read(directory.begin, memoryview(entries))
    description = Description(
        found.sequence, found.step, found.metrics, found.created, _UNKNOWN, found.filename
    )
    tail = tail_with_description(
        directory.begin, directory.folder, len(directory.names), bytes(entries), description.encode()
    )
    checks = Check(directory, file.path)
    async with store.draft(file.file.name, directory.begin + len(tail)) as draft:
        await _copy(file, directory.begin, tail, checks, draft, progress)
        await in_thread(checks.finish)
        if (await store.stat(file.file.name)).version != file.file.version:
            raise CheckpointNotFoundError(f"{file.path} was replaced while it was read")
        await draft.commit()


async def _copy(  # noqa: PLR0913, PLR0917 - where from, what, and where to
    file: OpenFile, body: int, tail: bytes, checks: Check, draft: Draft, progress: Progress | None
) -> None:
    """Write the first `body` bytes of a file and then `tail` into a draft; what is read is checked."""
    size = body + len(tail)

    async def copy_piece(start: int) -> None:
        stop = min(start + draft.chunk, size)
        # The draft may need it until the commit. On a page, it can be read and written past the page cache.
        data = memoryview(mmap.mmap(-1, stop - start))
        kept = max(min(stop, body) - start, 0)
        if kept:
            await file.read(start, data[:kept])
            await in_thread(checks.add, start, data[:kept])
        data[kept:] = tail[max(start - body, 0) : max(stop - body, 0)]
        await draft.write(start, data)
        if progress is not None:
            progress(kept)

    await for_each(copy_piece, range(0, size, draft.chunk), draft.writers)


async def _directory(file: OpenFile) -> Directory:
    """Return the records of a file of torch.save."""
    try:
        directory = await answer(read_directory(file.file.nbytes), file)
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


def _name_of(checkpoint: Checkpoint) -> str:
    return checkpoint.path.rpartition("/")[2]
