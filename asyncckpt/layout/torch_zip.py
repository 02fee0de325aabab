"""The format of torch.load: a zip file of stored records.

The offsets are those that torch's own writer would choose for the same storages, since torch computes
them instead of looking them up when it loads with fake or meta tensors. Unlike torch's, the storages come
first: so they stay where they are when `data.pkl` grows, and can be written before it is known.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from asyncckpt._checksum import crc32
from asyncckpt.layout.plan import Body, FilePlan, Format
from asyncckpt.layout.zip_format import (
    ALIGNMENT,
    CENTRAL,
    CENTRAL_MAGIC,
    DATA_PICKLE,
    DESCRIBES,
    DESCRIPTION,
    DESCRIPTOR_MAGIC,
    END,
    END64,
    END64_LOCATOR,
    END64_LOCATOR_MAGIC,
    END64_MAGIC,
    END_MAGIC,
    EXTRA,
    LOCAL,
    LOCAL_MAGIC,
    ROOT,
    STORAGES,
    ZIP64,
    ZIP64_COUNT,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncckpt.types import Offsets

N = TypeVar("N", "Offsets", int)

_UTF8, _DESCRIPTOR_FOLLOWS = 0x0800, 0x0008
_FIRST_OF_1980 = 0x21
_CENTRAL_CRC = 16


class TorchState(Protocol):
    """What the format has to know of a state."""

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each storage, by the key that names its record."""

    def data_pickle(self) -> bytes:
        """Return the record that torch.load unpickles."""


class TorchZip(Format[TorchState, "ZipBody"]):
    """The format of torch.load. Lays out anew only what has other sizes than the state before."""

    def __init__(self) -> None:
        self._body = lay_out([])

    def lay_out(self, frozen: TorchState) -> ZipBody:
        """Decide where the storages lie."""
        if self._body.sizes != frozen.sizes:
            self._body = lay_out(frozen.sizes)
        return self._body

    def plan(self, frozen: TorchState, body: ZipBody, description: bytes) -> FilePlan:
        """Put `data.pkl`, the description and the zip's directory behind the storages."""
        return plan(body, frozen.data_pickle(), description)


@dataclass(frozen=True, eq=False)
class ZipBody(Body):
    """Where each storage lies in the file. Depends on their sizes alone.

    Attributes:
        sizes: bytes of each storage.
        headers: offset of each record's local header; int64, shape (n,).
    """

    sizes: Sequence[int]
    headers: Offsets

    @cached_property
    def literals(self) -> tuple[tuple[int, bytes], ...]:
        """The header before each storage, and the descriptor behind it."""
        headers, starts, stops = self.headers.tolist(), self.starts.tolist(), self.stops.tolist()
        literals = []
        begin, descriptor = 0, b""
        for key, (header, start, stop) in enumerate(zip(headers, starts, stops, strict=True)):
            name = f"{STORAGES}{key}"
            literals.append((begin, descriptor + _local_header(name, header, start, stop - start)))
            begin, descriptor = stop, _descriptor(header, stop - start, 0)
        literals.append((begin, descriptor))
        return tuple(literals)

    @cached_property
    def directory(self) -> tuple[bytes, Offsets]:
        """The storages' part of the zip's directory, and where in it each checksum goes."""
        entries = [
            _central_entry(f"{STORAGES}{key}", header, size, 0)
            for key, (header, size) in enumerate(zip(self.headers.tolist(), self.sizes, strict=True))
        ]
        ends = np.cumsum([0, *map(len, entries)], dtype=np.int64)
        return b"".join(entries), ends[:-1] + _CENTRAL_CRC


def lay_out(sizes: Sequence[int]) -> ZipBody:
    """Decide where storages of these sizes lie in the file."""
    n = len(sizes)
    size = np.asarray(sizes, dtype=np.int64)
    names = len(STORAGES) + np.char.str_len(np.arange(n).astype(str)).astype(np.int64)
    big = np.zeros(n, dtype=bool)  # which headers begin beyond 4 GiB
    while True:
        lead = LOCAL.size + names + _extra_size(size, big)
        trail = np.where(size == 0, 0, np.where(big | (size >= ZIP64), 24, 16))
        # Every start is a multiple of the alignment, so each step from one to the next is, too.
        steps = _align(lead + np.concatenate(([0], (size + trail)[:-1]))) if n else lead
        starts = np.cumsum(steps, dtype=np.int64)
        ends = starts + size + trail
        headers = np.concatenate((np.zeros(min(n, 1), dtype=np.int64), ends[:-1]))
        if ((headers >= ZIP64) == big).all():
            break
        big = headers >= ZIP64
    return ZipBody(starts, starts + size, int(ends[-1]) if n else 0, sizes, headers)


def plan(body: ZipBody, data_pickle: bytes, description: bytes | None) -> FilePlan:
    """Complete a body to a file.

    Args:
        body: where the storages lie.
        data_pickle: the record that torch.load unpickles.
        description: what asyncckpt says of the file; its record is the last before the directory. None for
            no such record.
    """
    serialization_id = str(int.from_bytes(blake2b(data_pickle + (description or b"")).digest()[:16], "big"))
    records = [
        (DATA_PICKLE, data_pickle),
        (ROOT + ".format_version", b"1"),
        (ROOT + ".storage_alignment", str(ALIGNMENT).encode()),
        (ROOT + "byteorder", sys.byteorder.encode()),
        (ROOT + "version", b"3\n"),
        (ROOT + ".data/serialization_id", serialization_id.zfill(40).encode()),
    ]
    if description is not None:
        records.append((DESCRIPTION, description))
    pieces, entries, cursor = [], [], body.nbytes
    for name, payload in records:
        record, entry = _record(name, cursor, payload)
        pieces.append(record)
        entries.append(entry)
        cursor += len(record)
    own_entries, entry_slots = body.directory
    directory = own_entries + b"".join(entries)
    tail = b"".join((*pieces, directory, _end(len(body.sizes) + len(records), len(directory), cursor)))
    # An empty storage has no descriptor.
    (filled,) = np.nonzero(body.stops > body.starts)
    slots = np.concatenate((body.stops[filled] + len(DESCRIPTOR_MAGIC), cursor + entry_slots))
    return FilePlan(body, body.literals, tail, slots, np.concatenate((filled, np.arange(len(body.sizes)))))


def tail_with_description(header: int, folder: str, count: int, entries: bytes, description: bytes) -> bytes:
    """Return the end of a file to which a description is added: its record, then the zip's directory.

    Args:
        header: offset of the directory in the file as it is, where the record goes.
        folder: name of the folder of all records.
        count: how many records there are.
        entries: the directory, without its end.
        description: content of the record.
    """
    record, entry = _record(f"{folder}/{DESCRIBES}", header, description)
    directory = entries + entry
    return record + directory + _end(count + 1, len(directory), header + len(record))


def _record(name: str, header: int, payload: bytes) -> tuple[bytes, bytes]:
    """Return all bytes of a record whose header is at offset `header`, and its entry in the directory."""
    crc = crc32(payload)
    start = _start(name, header, len(payload))
    head = _local_header(name, header, start, len(payload))
    record = b"".join((head, payload, _descriptor(header, len(payload), crc)))
    return record, _central_entry(name, header, len(payload), crc)


def _align(offsets: N) -> N:
    return -(-offsets // ALIGNMENT) * ALIGNMENT


def _extra_size(size: Any, big: Any) -> Any:  # of integers or arrays of them
    """Bytes that torch's writer reserves for fields in a local header, before it pads to the alignment."""
    large = size >= ZIP64
    return EXTRA.size + (large | big) * EXTRA.size + large * 16 + big * 8


def _start(name: str, header: int, size: int) -> int:
    extra: int = _extra_size(size, header >= ZIP64)
    return _align(header + LOCAL.size + len(name.encode()) + extra)


def _local_header(name: str, header: int, start: int, size: int) -> bytes:
    encoded = name.encode()
    large = struct.pack("<HHQQ", 1, 16, size, size) if size >= ZIP64 else b""
    padding = start - header - LOCAL.size - len(encoded) - len(large) - EXTRA.size
    extra = large + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    sizes = ZIP64 if large else 0
    flags = _UTF8 | (_DESCRIPTOR_FOLLOWS if size else 0)
    return (
        LOCAL.pack(LOCAL_MAGIC, 0, flags, 0, 0, _FIRST_OF_1980, 0, sizes, sizes, len(encoded), len(extra))
        + encoded
        + extra
    )


def _descriptor(header: int, size: int, crc: int) -> bytes:
    if not size:
        return b""
    sizes = "QQ" if header >= ZIP64 or size >= ZIP64 else "II"
    return struct.pack("<4sI" + sizes, DESCRIPTOR_MAGIC, crc, size, size)


def _central_entry(name: str, header: int, size: int, crc: int) -> bytes:
    encoded = name.encode()
    fields = struct.pack("<QQ", size, size) if size >= ZIP64 else b""
    fields += struct.pack("<Q", header) if header >= ZIP64 else b""
    extra = struct.pack("<HH", 1, len(fields)) + fields if fields else b""
    flags = _UTF8 | (_DESCRIPTOR_FOLLOWS if size else 0)
    short, offset = min(size, ZIP64), min(header, ZIP64)
    fixed = CENTRAL.pack(
        CENTRAL_MAGIC, 0, 0, flags, 0, 0, _FIRST_OF_1980, crc, short, short,
        len(encoded), len(extra), 0, 0, 0, 0, offset,
    )  # fmt: skip
    return fixed + encoded + extra


def _end(count: int, size: int, offset: int) -> bytes:
    """Pack the end of the zip's directory, in both forms where the short one cannot hold it."""
    entries = min(count, ZIP64_COUNT)
    short = END.pack(END_MAGIC, 0, 0, entries, entries, min(size, ZIP64), min(offset, ZIP64), 0)
    if count < ZIP64_COUNT and size < ZIP64 and offset < ZIP64:
        return short
    long = END64.pack(END64_MAGIC, END64.size - 12, 45, 45, 0, 0, count, count, size, offset)
    return long + END64_LOCATOR.pack(END64_LOCATOR_MAGIC, 0, offset + size, 1) + short
