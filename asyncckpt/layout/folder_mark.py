"""The `.metadata` file of a folder: the pickle that stock DCP reads, and behind it a description.

Unpickling ends at the pickle's own end, so that what follows it changes nothing for other readers. One file
says whether the folder is committed, what is in it, and how it is to be listed.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from asyncckpt._checksum import crc32
from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.layout.description import Description
from asyncckpt.layout.zip_reader import TAIL

if TYPE_CHECKING:
    from collections.abc import Generator

    from asyncckpt.layout.zip_reader import Request

# Length and CRC-32 of the pickle, length and CRC-32 of the description, magic.
_TRAILER = struct.Struct("<QIQI8s")
_MAGIC = b"asynckpt"
_STOP = b"."  # the last opcode of every pickle


def seal(pickled: bytes, description: bytes) -> bytes:
    """Return the content of `.metadata`.

    Args:
        pickled: the metadata of DCP, as `pickle.dumps` returns it.
        description: what asyncckpt says of the folder, from `Description.encode`.
    """
    trailer = _TRAILER.pack(len(pickled), crc32(pickled), len(description), crc32(description), _MAGIC)
    return b"".join((pickled, description, trailer))


def read_mark(size: int) -> Generator[Request, bytes, Description | None]:
    """Return the description in a `.metadata` file with one small read; None if stock DCP wrote it.

    Args:
        size: of the file in bytes.

    Raises:
        CorruptCheckpointError: the file is cut off, or damaged there.
    """
    offset = max(size - TAIL, 0)  # enough for the longest description
    end = yield offset, size - offset
    found = _description(end, size)
    return None if found is None else Description.decode(found)


def unseal(data: bytes) -> bytes:
    """Return the pickle in the content of a `.metadata` file, as it was sealed or as stock DCP wrote it.

    Raises:
        CorruptCheckpointError: it is cut off, or a checksum does not match.
    """
    description = _description(data, len(data))
    if description is None:
        return data
    length, checksum, *_ = _TRAILER.unpack_from(data, len(data) - _TRAILER.size)
    pickled = data[:length]
    if crc32(pickled) != checksum:
        raise CorruptCheckpointError("its .metadata is damaged: the checksum does not match")
    return pickled


def _description(end: bytes, size: int) -> bytes | None:
    """Return the description in the last bytes of a file of `size` bytes; None if it is a plain pickle."""
    if not end.endswith(_MAGIC):
        if end.endswith(_STOP):
            return None
        raise CorruptCheckpointError(
            f"its .metadata ({size} bytes) ends neither as a pickle nor with a description; it was cut off or"
            " is damaged"
        )
    at = len(end) - _TRAILER.size
    if at >= 0:
        before, _, length, checksum, _ = _TRAILER.unpack_from(end, at)
        description = end[max(at - length, 0) : at]
        if before + length + _TRAILER.size == size and crc32(description) == checksum:
            return description
    raise CorruptCheckpointError("the description in its .metadata is damaged")
