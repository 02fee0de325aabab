"""Read the zip's own structure. No I/O here: generators yield which bytes they need and are sent them."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncckpt._checksum import crc32
from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.layout.description import Description
from asyncckpt.layout.zip_format import (
    CENTRAL,
    CENTRAL_MAGIC,
    DESCRIBES,
    END,
    END64,
    END64_LOCATOR,
    END64_LOCATOR_MAGIC,
    END64_MAGIC,
    END_MAGIC,
    EXTRA,
    LOCAL,
    LOCAL_MAGIC,
    ZIP64,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from asyncckpt.types import Offsets

# (offset, length) of the bytes a generator waits for.
Request = tuple[int, int]

# The first read of a file, from its end: a directory of some 500 records, or all of a small file.
TAIL = 64 << 10
_MAX_HEAD = LOCAL.size + 2 * 0xFFFF  # a local header with the longest name and the longest extra field
_FLAGS = 0x0808  # names in UTF-8, sizes behind the payload: all that torch's writer sets
_FOLDER = 0x10
_STORAGE = re.compile(r"[^/]+/data/(\d{1,18})")


@dataclass(frozen=True, slots=True, eq=False)
class Directory:
    """The records of a file, in file order.

    Attributes:
        names: of the records.
        headers: offset of each local header; int64, shape (n,).
        starts, stops: payload ranges, as packed writers place them: just before the next header.
        checksums: CRC-32 of each payload.
        begin, end: where the directory itself lies.
    """

    names: tuple[str, ...]
    headers: Offsets
    starts: Offsets
    stops: Offsets
    checksums: Offsets
    begin: int
    end: int

    @property
    def folder(self) -> str:
        """What the folder of all records is called: `archive`, or as torch.save called it after the file."""
        return self.names[0].partition("/")[0]

    def row(self, name: str) -> int | None:
        """Return the row of a record, whatever its folder is called; None if there is none.

        Args:
            name: with a folder, as asyncckpt calls it.
        """
        wanted = f"{self.folder}/{name.partition('/')[2]}"
        return self.names.index(wanted) if wanted in self.names else None

    def storages(self) -> Iterator[tuple[str, int, int]]:
        """Yield the key of each storage, and where its bytes start and stop."""
        folder = f"{self.folder}/"
        for name, start, stop in zip(self.names, self.starts.tolist(), self.stops.tolist(), strict=True):
            found = _STORAGE.fullmatch(name)
            if found and name.startswith(folder):
                yield found[1], start, stop


def read_description(size: int) -> Generator[Request, bytes, Description | None]:
    """Return the description of a file with two small reads at most; None if it has none.

    Raises:
        CorruptCheckpointError: the file is cut off or damaged there.
    """
    begin, end, _, offset, tail = yield from _read_end(size)
    at = tail.rfind(CENTRAL_MAGIC, 0, end - offset)
    _, _, name = tail[at + CENTRAL.size : end - offset].partition(b"/")
    if at < 0 or not name.startswith(DESCRIBES.encode()):
        return None
    try:
        _, full, checksum, length, header = _entry(tail, at)
    except (struct.error, UnicodeDecodeError) as error:
        raise CorruptCheckpointError("its directory is damaged") from error
    if not begin - TAIL <= header < begin:
        raise CorruptCheckpointError(f"its record {full} is not where the directory says")
    record = (yield header, begin - header) if header < offset else tail[header - offset : begin - offset]
    stop = begin - header - (24 if max(header, length) >= ZIP64 else 16)
    check_header(record, full, stop - length)
    payload = record[stop - length : stop]
    if crc32(payload) != checksum:
        raise CorruptCheckpointError(f"its record {full} is damaged")
    return Description.decode(payload)


def read_directory(size: int) -> Generator[Request, bytes, Directory]:
    """Return all records of a file.

    Raises:
        CorruptCheckpointError: the directory is damaged.
    """
    begin, end, count, offset, tail = yield from _read_end(size)
    data = (yield begin, end - begin) if begin < offset else tail[begin - offset : end - offset]
    entries: list[tuple[str, int, int, int]] = []
    at = 0
    try:
        for _ in range(count):
            length, name, checksum, nbytes, header = _entry(data, at)
            if max(nbytes, header) > begin:
                raise CorruptCheckpointError(f"its record {name} does not fit its place")
            entries.append((name, checksum, nbytes, header))
            at += length
    except (struct.error, UnicodeDecodeError) as error:
        raise CorruptCheckpointError("its directory is damaged") from error
    if at != len(data):
        raise CorruptCheckpointError("its directory does not fill its place")
    import numpy as np  # noqa: PLC0415 - a listing does without it

    entries.sort(key=lambda entry: entry[-1])
    names = tuple(entry[0] for entry in entries)
    _check_names(names)
    table = np.array([entry[1:] for entry in entries], dtype=np.int64).reshape(-1, 3)
    checksums, sizes, headers = table[:, 0], table[:, 1], table[:, 2]
    ends = np.append(headers[1:], begin)
    large = (headers >= ZIP64) | (sizes >= ZIP64)
    stops = ends - np.where(sizes == 0, 0, np.where(large, 24, 16))
    starts = stops - sizes
    heads = starts - headers
    outside = (heads < LOCAL.size) | (heads > _MAX_HEAD) | (ends > begin)
    if outside.any():
        raise CorruptCheckpointError(f"its record {names[int(outside.argmax())]} does not fit its place")
    return Directory(names, headers, starts, stops, checksums, begin, end)


def _read_end(size: int) -> Generator[Request, bytes, tuple[int, int, int, int, bytes]]:
    """Find the directory of a file of `size` bytes.

    Returns:
        Where it begins and ends, how many entries it has, and what was read: its offset and the bytes.

    Raises:
        CorruptCheckpointError: the file does not end as a zip file does.
    """
    if size < END.size:
        raise CorruptCheckpointError(f"it has {size} bytes, too few for a checkpoint; it was cut off")
    offset = max(size - TAIL, 0)
    tail = yield offset, size - offset
    at = len(tail) - END.size
    magic, *disks, here, count, length, begin, _ = END.unpack_from(tail, at)
    if magic != END_MAGIC:
        raise CorruptCheckpointError(
            "it does not end as a zip file does; it was cut off, or is another format"
        )
    locator = at - END64_LOCATOR.size
    if locator >= END64.size and tail[locator : locator + 4] == END64_LOCATOR_MAGIC:
        at = locator - END64.size
        magic, _, _, _, *disks, here, count, length, begin = END64.unpack_from(tail, at)
        if magic != END64_MAGIC:
            raise CorruptCheckpointError("the end of its directory is damaged")
    if begin + length != offset + at or any(disks) or here != count:
        raise CorruptCheckpointError("its directory is not where the end of the file says")
    return begin, offset + at, count, offset, tail


def check_header(header: bytes | bytearray, name: str, length: int) -> None:
    """Raise unless this begins with the local header of record `name`, `length` bytes long, as it should be.

    Raises:
        CorruptCheckpointError: it does not.
    """
    encoded = name.encode()
    if header[:4] != LOCAL_MAGIC or header[LOCAL.size : LOCAL.size + len(encoded)] != encoded:
        raise CorruptCheckpointError(f"its record {name} does not start with a header of that name")
    name_length, extra_length = struct.unpack_from("<HH", header, LOCAL.size - 4)
    if name_length != len(encoded) or LOCAL.size + name_length + extra_length != length:
        raise CorruptCheckpointError(
            f"the header of its record {name} does not end where its payload begins; it is damaged, or was"
            " not written by torch or asyncckpt"
        )


def _check_names(names: tuple[str, ...]) -> None:
    """Raise unless these are the records that torch.load looks for, each of them once."""
    root = names[0].partition("/")[0] if names else ""
    keys = {int(found[1]) for found in map(_STORAGE.fullmatch, names) if found}
    wanted = {f"{root}/data.pkl", f"{root}/version", *(f"{root}/data/{key}" for key in range(len(keys)))}
    missing = wanted.difference(names)
    if missing:
        raise CorruptCheckpointError(f"it has no record {min(missing)}, which torch.load looks for")
    if len(set(names)) != len(names):
        raise CorruptCheckpointError("its directory names a record twice")


def _entry(data: bytes, at: int) -> tuple[int, str, int, int, int]:
    """Unpack a directory entry: its own length, then name, checksum, size and header offset of the record."""
    fields = CENTRAL.unpack_from(data, at)
    magic, flags, method, checksum = fields[0], fields[3], fields[4], fields[7]
    stored, size, name_length, extra_length, comment_length, header = *fields[8:13], fields[16]
    disk, attributes = fields[13], fields[15]
    if magic != CENTRAL_MAGIC or flags & ~_FLAGS or disk or attributes & _FOLDER:
        raise CorruptCheckpointError("its directory is damaged")
    if method or stored != size:
        raise CorruptCheckpointError("it holds compressed records, which no checkpoint has")
    name_end = at + CENTRAL.size + name_length
    name = data[at + CENTRAL.size : name_end].decode()
    extra = data[name_end : name_end + extra_length]
    while len(extra) >= EXTRA.size:
        kind, length = EXTRA.unpack_from(extra)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, EXTRA.size))
            size = next(values, size) if size == ZIP64 else size
            stored = next(values, stored) if stored == ZIP64 else stored
            header = next(values, header) if header == ZIP64 else header
        extra = extra[EXTRA.size + length :]
    return CENTRAL.size + name_length + extra_length + comment_length, name, checksum, size, header
