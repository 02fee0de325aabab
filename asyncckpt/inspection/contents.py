"""What a checkpoint file tells, whoever wrote it: read in a few small pieces, and never unpickled."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.inspection.tensor_values import is_native, read_number
from asyncckpt.layout.description import Description
from asyncckpt.layout.other_formats import HEAD, recognize
from asyncckpt.layout.zip_reader import TAIL, is_storage, payload_start, read_description, read_directory
from asyncckpt.outline.machine import outline
from asyncckpt.outline.nodes import TensorOutline
from asyncckpt.outline.progress import Progress, progress_of
from asyncckpt.reader import answer
from asyncckpt.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from asyncckpt.layout.zip_reader import Directory
    from asyncckpt.outline.machine import Outline
    from asyncckpt.stores.base import Store, StoredFile

# A listing looks at many files: it does without what would cost seconds of each, such as the inlined arrays
# that make a data.pkl this large.
MAX_SUMMARY = 64 << 20
_DEFAULT_BYTEORDER = "little"  # of old files, which do not tell
_CONSTANTS = b"/constants.pkl"  # the record that only TorchScript archives have
_TORCHSCRIPT = "a TorchScript archive, a program rather than a checkpoint: read it with torch.jit.load"


@dataclass(frozen=True, slots=True)
class Summary:
    """What a listing shows of a file.

    Attributes:
        path: a local path or a URL.
        name: in its directory.
        writer: `asyncckpt`, `lightning` or `torch`.
        step, epoch, metrics: as the file tells them.
        nbytes: size of the file.
        created: wall time of the snapshot, seconds since the epoch; 0.0 if the file does not tell.
        sequence: place in the order of commits of its directory, from 1; 0 if the file does not tell.
    """

    path: str
    name: str
    writer: str
    step: int | None
    epoch: int | None
    metrics: Mapping[str, float]
    nbytes: int
    created: float = 0.0
    sequence: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What a file tells of itself.

    Attributes:
        summary: what a listing shows.
        versions: of the libraries that wrote it.
        outline: of its state.
        payloads: (start, stop) of the bytes of each storage in the file, by its key.
        byteorder: of the values: `little` or `big`.
        records: how many there are in the file.
    """

    summary: Summary
    versions: Mapping[str, str]
    outline: Outline
    payloads: Mapping[str, tuple[int, int]]
    byteorder: str
    records: int


async def read_contents(store: Store, file: StoredFile) -> Contents:
    """Return what a file tells of itself. Of its tensors' values none is read, but those that are metrics.

    Raises:
        CorruptCheckpointError: it is damaged or another format; the message says which.
        StoreError: it could not be read.
    """
    async with _recognized(store, file):
        description = await _description(store, file)
        directory = await answer(read_directory(file.nbytes), store, file.name)
        return await _read(store, file, description, directory)


async def summarize(store: Store, file: StoredFile) -> Summary:
    """Return what a listing shows of a file, with a few small reads.

    Raises:
        CorruptCheckpointError: it is damaged or another format; the message says which.
        StoreError: it could not be read.
    """
    async with _recognized(store, file):
        description = await _description(store, file)
        # A Checkpointer's files say all that there is to say; only they have a sequence number.
        if description is not None and description.sequence and description.step is not None:
            return _summary(store, file, description, Progress(), {})
        directory = await answer(read_directory(file.nbytes), store, file.name)
        row = _row(directory, "data.pkl")
        if directory.stops[row] - directory.starts[row] > MAX_SUMMARY:
            return _summary(store, file, description, Progress(), {})
        return (await _read(store, file, description, directory)).summary


async def _description(store: Store, file: StoredFile) -> Description | None:
    record = await answer(read_description(file.nbytes), store, file.name)
    return None if record is None else Description.decode(record)


async def _read(
    store: Store, file: StoredFile, description: Description | None, directory: Directory
) -> Contents:
    told = await in_thread(outline, await _record(store, file, directory, "data.pkl"))
    byteorder = _DEFAULT_BYTEORDER
    if _full(directory, "byteorder") in directory.names:
        byteorder = (await _record(store, file, directory, "byteorder")).decode("ascii", "replace")
    rows = zip(directory.names, directory.starts.tolist(), directory.stops.tolist(), strict=True)
    folder = _full(directory, "data/")
    payloads = {
        name.removeprefix(folder): (start, stop)
        for name, start, stop in rows
        if name.startswith(folder) and is_storage(name)
    }
    progress = progress_of(told.root)
    metrics = {}
    for name, value in progress.metrics.items():
        if not isinstance(value, TensorOutline):
            metrics[name] = float(value)
        elif is_native(byteorder):
            number = await read_number(store, file, value, payloads)
            metrics.update({} if number is None else {name: number})
    versions = dict(description.versions) if description else {}
    if progress.lightning:
        versions["lightning"] = progress.lightning
    summary = _summary(store, file, description, progress, metrics)
    return Contents(summary, versions, told, payloads, byteorder, len(directory.names))


def _summary(
    store: Store,
    file: StoredFile,
    description: Description | None,
    progress: Progress,
    metrics: Mapping[str, float],
) -> Summary:
    writer = "asyncckpt" if description else "lightning" if progress.lightning else "torch"
    said = description or Description(0, None, {}, 0.0)
    return Summary(
        store.path_of(file.name),
        file.name,
        writer,
        progress.step if said.step is None else said.step,
        progress.epoch,
        said.metrics if said.sequence else metrics,
        file.nbytes,
        said.created,
        said.sequence,
    )


def _full(directory: Directory, name: str) -> str:
    """Return the name of a record as the directory has it: in the folder that all of them are in."""
    return f"{directory.names[0].partition('/')[0]}/{name}"


def _row(directory: Directory, name: str) -> int:
    return directory.names.index(_full(directory, name))


async def _record(store: Store, file: StoredFile, directory: Directory, name: str) -> bytes:
    """Read a small record; the payloads of all others lie as its does."""
    row, full = _row(directory, name), _full(directory, name)
    header, start, stop = (
        int(places[row]) for places in (directory.headers, directory.starts, directory.stops)
    )
    data = bytearray(stop - header)
    await store.read(file.name, header, memoryview(data))
    if header + payload_start(data, full) != start:
        raise CorruptCheckpointError(
            f"the header of its record {full} does not end where its payload begins; it is damaged, or was"
            " not written by torch or asyncckpt"
        )
    return bytes(data[start - header :])


@asynccontextmanager
async def _recognized(store: Store, file: StoredFile) -> AsyncIterator[None]:
    """Let errors say which file they are about, and what it is if it is no checkpoint."""
    try:
        yield
    except CorruptCheckpointError as error:
        head, tail = bytearray(min(HEAD, file.nbytes)), bytearray(min(TAIL, file.nbytes))
        await store.read(file.name, 0, memoryview(head))
        await store.read(file.name, file.nbytes - len(tail), memoryview(tail))
        is_script = _CONSTANTS in tail and head.startswith(b"PK")
        meaning = _TORCHSCRIPT if is_script else recognize(bytes(head))
        what = f"it is {meaning}" if meaning else str(error)
        raise CorruptCheckpointError(f"{store.path_of(file.name)}: {what}") from error
