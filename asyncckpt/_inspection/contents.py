"""The contents of a checkpoint file of any writer, read in a few small pieces and never unpickled here."""

from __future__ import annotations

import struct
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any

from asyncckpt._inspection.inert import Storage, Tensor, dtype_name
from asyncckpt._inspection.isolation import look_at
from asyncckpt._threads import in_thread
from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.layout.description import Description, checkpoint_of
from asyncckpt.layout.other_formats import HEAD, recognize
from asyncckpt.layout.zip_format import ROOT
from asyncckpt.layout.zip_reader import TAIL, check_header, read_description, read_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from asyncckpt.layout.zip_reader import Directory
    from asyncckpt.stores.base import OpenFile
    from asyncckpt.types import Checkpoint

# A listing looks at many files: it does without what would cost seconds of each, such as the inlined arrays
# that make a data.pkl this large.
MAX_SUMMARY = 16 << 20
MAX_PICKLE = 2 << 30
_MAX_BYTEORDER = 16
_UNDESCRIBED = Description(0, None, {}, 0.0)
_children = BoundedSemaphore(4)  # a listing asks for as many as it reads files
_DEFAULT_BYTEORDER = "little"  # old files have no record of it
_CONSTANTS = b"/constants.pkl"  # the record that only TorchScript archives have
_TORCHSCRIPT = "a TorchScript archive, a program rather than a checkpoint: read it with torch.jit.load"
_NUMBERS = {"float32": "f", "float64": "d", "float16": "e", "bfloat16": "f", "int64": "q", "int32": "i"}


@dataclass(frozen=True, slots=True)
class Summary:
    """What a listing shows of a file.

    Attributes:
        checkpoint: from the description or the state; unknown times and sequence numbers are 0.
        writer: `asyncckpt`, `lightning` or `torch`.
        epoch: from the state, if it has one.
    """

    checkpoint: Checkpoint
    writer: str
    epoch: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """What is in a file beside the values of its tensors.

    Attributes:
        path: of the file.
        pickle: the record with the state.
        payloads: (start, stop) of the bytes of each storage in the file, by its key.
        byteorder: of the values: `little` or `big`.
        count: how many records there are.
    """

    path: str
    pickle: bytes
    payloads: Mapping[str, tuple[int, int]]
    byteorder: str
    count: int

    @property
    def is_native(self) -> bool:
        """Whether the byte order is that of this machine."""
        return self.byteorder == sys.byteorder

    def place_of(self, tensor: Tensor, itemsize: int) -> int:
        """Return where in the file the first element of a tensor is.

        Raises:
            CorruptCheckpointError: not all of its elements are in the file.
        """
        start, stop = self.payloads.get(tensor.storage.key, (0, 0))
        if not self.holds(tensor, itemsize):
            raise CorruptCheckpointError(
                f"{self.path}: a tensor of it views more than its storage {tensor.storage.key} of"
                f" {stop - start} bytes holds"
            )
        return start + tensor.offset * itemsize

    def holds(self, tensor: Tensor, itemsize: int) -> bool:
        """Whether all elements of a tensor are in the file."""
        start, stop = self.payloads.get(tensor.storage.key, (0, 0))
        return not tensor.numel or start + (tensor.offset + tensor.reach) * itemsize <= stop


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What `asyncckpt inspect` shows of a file.

    Attributes:
        summary: what a listing shows.
        versions: of the libraries that wrote it.
        records: what is in the file.
        tensors: those of the state, each with its path as JSON has it.
        values: all else, as `asyncckpt inspect --json` prints it.
        storages: each storage that the state names, once.
        globals: the classes and functions that it names, in order of appearance.
    """

    summary: Summary
    versions: Mapping[str, str]
    records: Records
    tensors: list[tuple[list[Any], Tensor]]
    values: list[dict[str, Any]]
    storages: list[Storage]
    globals: list[str]


async def read_contents(file: OpenFile) -> Contents:
    """Read what `asyncckpt inspect` shows of a file; of the values of tensors only those that are metrics.

    Raises:
        CorruptCheckpointError: it is damaged or another format; the message says which.
        StoreError: it could not be read.
    """
    async with _recognized(file):
        description = await file.answer(read_description(file.file.nbytes))
        records = await _records(file, await file.answer(read_directory(file.file.nbytes)))
        found = await _look_at(records, "contents")
        progress = found["progress"]
        versions = dict(description.versions) if description else {}
        if progress.get("lightning"):
            versions["lightning"] = progress["lightning"]
        return Contents(
            await _summary(file, description, progress, records),
            versions,
            records,
            [(path, decoded_tensor(tensor)) for path, tensor in found["tensors"]],
            found["values"],
            [Storage(*storage) for storage in found["storages"]],
            found["globals"],
        )


async def summarize(file: OpenFile) -> Summary:
    """Return what a listing shows of a file, with a few small reads; raises as `read_contents` does."""
    async with _recognized(file):
        description = await file.answer(read_description(file.file.nbytes))
        # A Checkpointer's files say all that there is to say; only they have a sequence number.
        if description is not None and description.sequence and description.step is not None:
            return await _summary(file, description, {})
        directory = await file.answer(read_directory(file.file.nbytes))
        row = directory.row(ROOT + "data.pkl")
        if row is not None and directory.stops[row] - directory.starts[row] > MAX_SUMMARY:
            return await _summary(file, description, {})
        records = await _records(file, directory)
        found = await _look_at(records, "progress")
        return await _summary(file, description, found["progress"], records)


async def read_records(file: OpenFile) -> Records:
    """Return what is in a file beside the values of its tensors; raises as `read_contents` does."""
    async with _recognized(file):
        return await _records(file, await file.answer(read_directory(file.file.nbytes)))


def decoded_tensor(row: list[Any]) -> Tensor:
    """Return a tensor as the child process prints it."""
    storage, dtype, offset, shape, stride, *rest = row
    return Tensor(Storage(*storage), dtype, offset, tuple(shape), tuple(stride), *rest)


async def _look_at(records: Records, task: str) -> dict[str, Any]:
    def look() -> dict[str, Any]:
        with _children:
            return look_at(task, [(records.path, records.pickle)])

    return await in_thread(look)


async def _records(file: OpenFile, directory: Directory) -> Records:
    pickle = await _record(file, directory, "data.pkl", MAX_PICKLE)
    byteorder = _DEFAULT_BYTEORDER
    if directory.row(ROOT + "byteorder") is not None:
        record = await _record(file, directory, "byteorder", _MAX_BYTEORDER)
        byteorder = record.decode("ascii", "replace")
    payloads = {key: (start, stop) for key, start, stop in directory.storages()}
    return Records(file.path, pickle, payloads, byteorder, len(directory.names))


async def _summary(
    file: OpenFile,
    description: Description | None,
    progress: Mapping[str, Any],
    records: Records | None = None,
) -> Summary:
    writer = "asyncckpt" if description else "lightning" if progress.get("lightning") else "torch"
    checkpoint = checkpoint_of(file.path, description or _UNDESCRIBED, file.file.nbytes)
    if checkpoint.step is None:
        checkpoint = replace(checkpoint, step=progress.get("step"))
    if not checkpoint.sequence:
        metrics = {}
        for name, value in progress.get("metrics", {}).items():
            number = value
            if isinstance(value, list) and records is not None:
                number = await _read_number(file, decoded_tensor(value), records)
            metrics.update({} if number is None else {name: float(number)})
        checkpoint = replace(checkpoint, metrics=metrics)
    return Summary(checkpoint, writer, progress.get("epoch"))


async def _read_number(file: OpenFile, tensor: Tensor, records: Records) -> float | None:
    """Return the value of a tensor of one element; None if its dtype or byte order is not one to read."""
    dtype = dtype_name(tensor)
    code = _NUMBERS.get(dtype)
    if code is None or not records.is_native:
        return None
    data = bytearray(2 if dtype == "bfloat16" else struct.calcsize(code))
    await file.read(records.place_of(tensor, len(data)), memoryview(data))
    if dtype == "bfloat16":  # the upper half of a float32
        data = data.rjust(4, b"\0") if sys.byteorder == "little" else data.ljust(4, b"\0")
    return float(struct.unpack(f"={code}", data)[0])


async def _record(file: OpenFile, directory: Directory, name: str, limit: int) -> bytes:
    """Read a record of at most `limit` bytes; the payloads of all others lie as its does."""
    full = f"{directory.folder}/{name}"
    row = directory.names.index(full)
    places = directory.headers, directory.starts, directory.stops
    header, start, stop = (int(place[row]) for place in places)
    if stop - start > limit:
        raise CorruptCheckpointError(f"its record {full} has {stop - start:,} bytes, too many to look at")
    data = bytearray(stop - header)
    await file.read(header, memoryview(data))
    check_header(data, full, start - header)
    return bytes(memoryview(data)[start - header :])


@asynccontextmanager
async def _recognized(file: OpenFile) -> AsyncIterator[None]:
    """Add the path to errors, and the format of a file that is no checkpoint."""
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
        raise CorruptCheckpointError(
            what if what.startswith(file.path) else f"{file.path}: {what}"
        ) from error
