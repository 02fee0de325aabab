"""Payloads of many ranks in one value of a store, to which each appends its own."""

from __future__ import annotations

import struct
import zlib

from asyncckpt._ranks.requests import PIECE

_HEADER = struct.Struct("<II")  # rank, bytes that follow
_MOST = PIECE - _HEADER.size  # bytes in a frame: each is appended by one request


def packed(rank: int, payload: bytes) -> list[bytes]:
    """Return the frames of a rank, to be appended one after the other."""
    data = zlib.compress(payload, 1)
    return [
        _HEADER.pack(rank, len(piece)) + piece
        for piece in (data[start : start + _MOST] for start in range(0, len(data), _MOST))
    ]


def unpacked(value: bytes) -> dict[int, bytes]:
    """Return the payloads of the ranks whose frames are all there."""
    pieces: dict[int, list[bytes]] = {}
    start = 0
    while start < len(value):
        rank, size = _HEADER.unpack_from(value, start)
        start += _HEADER.size
        pieces.setdefault(rank, []).append(value[start : start + size])
        start += size
    return {
        rank: data for rank, parts in pieces.items() if (data := _decompressed(b"".join(parts))) is not None
    }


def _decompressed(data: bytes) -> bytes | None:
    stream = zlib.decompressobj()
    payload = stream.decompress(data)
    return payload if stream.eof else None
