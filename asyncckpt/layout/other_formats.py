"""Identify foreign formats by their magic bytes."""

from __future__ import annotations

# How much of a file has to be read: the magic of a tar file lies at 257.
HEAD = 512
_TAR_AT = 257
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
_MAX_SAFETENSORS_HEADER = 100 << 20

_PICKLE = "a plain pickle, which only unpickling would show: do not unless you trust it"
_MAGIC = (
    (
        _LEGACY,
        "of the format that torch.save had before 1.6: read it with torch.load and save it again",
    ),
    *((b"\x80" + bytes([protocol]), _PICKLE) for protocol in range(2, 6)),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file: read it with h5py"),
    (b"\x1f\x8b", "compressed by gzip: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: decompress it first"),
    (b"\xfd7zXZ\0", "compressed by xz: decompress it first"),
    (b"BZh", "compressed by bzip2: decompress it first"),
    (b"\x93NUMPY", "a numpy array: read it with numpy.load"),
    (b"GGUF", "a GGUF file: read it with the package gguf"),
    (b"ONNX", "an ONNX file: read it with the package onnx"),
)


def recognize(head: bytes) -> str | None:
    """Return what a file that begins with these bytes is, and how to read it; None if it does not tell.

    Args:
        head: the first HEAD bytes, or all if there are fewer.
    """
    if not head:
        return "empty: writing it was cut short, or never begun"
    for magic, meaning in _MAGIC:
        if head.startswith(magic):
            return meaning
    if head[_TAR_AT : _TAR_AT + 5] == b"ustar":
        return "a tar archive: unpack it first"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _MAX_SAFETENSORS_HEADER:
        return "a safetensors file: read it with the package safetensors"
    return None
