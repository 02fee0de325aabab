"""What a checkpoint file tells, whoever wrote it: read in a few small pieces, and never unpickled."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING

from asyncckpt._inspection.tensor_values import is_native, read_number
from asyncckpt._loading.catalog import read_described
from asyncckpt._loading.reader import answer
from asyncckpt._outline.machine import outline
from asyncckpt._outline.nodes import TensorOutline
from asyncckpt._outline.progress import Progress, progress_of
from asyncckpt._threads import in_thread
from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.layout.description import Description, checkpoint_of
from asyncckpt.layout.other_formats import HEAD, recognize
from asyncckpt.layout.zip_reader import TAIL, check_header, read_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from asyncckpt._outline.machine import Outline
    from asyncckpt.layout.zip_reader import Directory
    from asyncckpt.stores.base import OpenFile
    from asyncckpt.types import Checkpoint

# A listing looks at many files: it does without what would cost seconds of each, such as the inlined arrays
# that make a data.pkl this large.
MAX_SUMMARY = 16 << 20
MAX_PICKLE = 2 << 30
_MAX_BYTEORDER = 16
_UNTOLD = Description(0, None, {}, 0.0)
# Outlines are made one at a time, as Python would do it anyway: so the memory of several does not add up.
_OUTLINING = Lock()
_DEFAULT_BYTEORDER = "little"  # of old files, which do not tell
_CONSTANTS = b"/constants.pkl"  # the record that only TorchScript archives have
_TORCHSCRIPT = "a TorchScript archive, a program rather than a checkpoint: read it with torch.jit.load"


@dataclass(frozen=True, slots=True)
class Summary:
    """What a listing shows of a file.

    Attributes:
        checkpoint: what the file tells; 0 stands for a time or a place in the order that it does not tell.
        writer: `asyncckpt`, `lightning` or `torch`.
        epoch: as the file tells it.
    """

    checkpoint: Checkpoint
    writer: str
    epoch: int | None = None


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


async def read_contents(file: OpenFile) -> Contents:
    """Return what a file tells of itself. Of its tensors' values none is read, but those that are metrics.

    Raises:
        CorruptCheckpointError: it is damaged or another format; the message says which.
        StoreError: it could not be read.
    """
    async with _recognized(file):
        description = await read_described(file)
        directory = await answer(read_directory(file.file.nbytes), file)
        return await _read(file, description, directory)


async def summarize(file: OpenFile) -> Summary:
    """Return what a listing shows of a file, with a few small reads.

    Raises:
        CorruptCheckpointError: it is damaged or another format; the message says which.
        StoreError: it could not be read.
    """
    async with _recognized(file):
        description = await read_described(file)
        # A Checkpointer's files say all that there is to say; only they have a sequence number.
        if description is not None and description.sequence and description.step is not None:
            return _summary(file, description, Progress(), {})
        directory = await answer(read_directory(file.file.nbytes), file)
        row = _row(directory, "data.pkl")
        if directory.stops[row] - directory.starts[row] > MAX_SUMMARY:
            return _summary(file, description, Progress(), {})
        return (await _read(file, description, directory)).summary


async def _read(file: OpenFile, description: Description | None, directory: Directory) -> Contents:
    told = await in_thread(_outline, await _record(file, directory, "data.pkl", MAX_PICKLE))
    byteorder = _DEFAULT_BYTEORDER
    if _full(directory, "byteorder") in directory.names:
        record = await _record(file, directory, "byteorder", _MAX_BYTEORDER)
        byteorder = record.decode("ascii", "replace")
    payloads = {key: (start, stop) for key, start, stop in directory.storages()}
    progress = progress_of(told.root)
    metrics = {}
    for name, value in progress.metrics.items():
        if not isinstance(value, TensorOutline):
            metrics[name] = float(value)
        elif is_native(byteorder):
            number = await read_number(file, value, payloads)
            metrics.update({} if number is None else {name: number})
    versions = dict(description.versions) if description else {}
    if progress.lightning:
        versions["lightning"] = progress.lightning
    summary = _summary(file, description, progress, metrics)
    return Contents(summary, versions, told, payloads, byteorder, len(directory.names))


def _summary(
    file: OpenFile,
    description: Description | None,
    progress: Progress,
    metrics: Mapping[str, float],
) -> Summary:
    writer = "asyncckpt" if description else "lightning" if progress.lightning else "torch"
    told = checkpoint_of(file.path, description or _UNTOLD, file.file.nbytes)
    step = progress.step if told.step is None else told.step
    checkpoint = replace(told, step=step, metrics=told.metrics if told.sequence else metrics)
    return Summary(checkpoint, writer, progress.epoch)


def _full(directory: Directory, name: str) -> str:
    """Return the name of a record as the directory has it: in the folder that all of them are in."""
    return f"{directory.names[0].partition('/')[0]}/{name}"


def _row(directory: Directory, name: str) -> int:
    return directory.names.index(_full(directory, name))


def _outline(data: bytes) -> Outline:
    with _OUTLINING:
        return outline(data)


async def _record(file: OpenFile, directory: Directory, name: str, limit: int) -> bytes:
    """Read a record of at most `limit` bytes; the payloads of all others lie as its does."""
    row, full = _row(directory, name), _full(directory, name)
    header, start, stop = (
        int(places[row]) for places in (directory.headers, directory.starts, directory.stops)
    )
    if stop - start > limit:
        raise CorruptCheckpointError(f"its record {full} has {stop - start:,} bytes, too many to look at")
    data = bytearray(stop - header)
    await file.read(header, memoryview(data))
    check_header(data, full, start - header)
    return bytes(memoryview(data)[start - header :])


@asynccontextmanager
async def _recognized(file: OpenFile) -> AsyncIterator[None]:
    """Let errors say which file they are about, and what it is if it is no checkpoint."""
    try:
        yield
    except CorruptCheckpointError as error:
        size = file.file.nbytes
        head, tail = bytearray(min(HEAD, size)), bytearray(min(TAIL, size))
        await file.read(0, memoryview(head))
        await file.read(size - len(tail), memoryview(tail))
        is_script = _CONSTANTS in tail and head.startswith(b"PK")
        meaning = _TORCHSCRIPT if is_script else recognize(bytes(head))
        what = f"it is {meaning}" if meaning else str(error)
        raise CorruptCheckpointError(f"{file.path}: {what}") from error
