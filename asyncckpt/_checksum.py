"""CRC-32 as zip files want it, by the fastest library at hand. Both release the GIL."""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32, crc32_combine
except ImportError:  # a platform that isal has no wheels for
    from zlib import crc32

    def crc32_combine(first: int, second: int, length: int, /) -> int:
        """Return the checksum of two byte strings on end, the second one `length` bytes long."""
        zeros = bytes(length)
        return crc32(zeros, first) ^ crc32(zeros) ^ second


__all__ = ["crc32", "crc32_combine"]
