"""Turn a frozen state into `data.pkl`: put the arguments of each plain tensor where its mark is."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncckpt._snapshot.freeze import MARK, STORAGE_CLASS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncckpt._snapshot.freeze import FrozenState, TensorMeta

# LONG1 of 20 bytes, the index in the first four, then TUPLE1: the stack effect of one tuple.
_MARKED = re.compile(rb"\x8a\x14(.{4})" + re.escape(MARK) + rb"\x85", re.DOTALL)
_NO_HOOKS = b"ccollections\nOrderedDict\n)R"
_TUPLE_END = {1: b"\x85", 2: b"\x86", 3: b"\x87"}


@dataclass(slots=True)
class DataPickler:
    """Makes `data.pkl` of one state again and again; what did not change is not made anew."""

    _last: FrozenState | None = None
    _arguments: list[bytes] = field(default_factory=list)
    _data: bytes = b""

    def data_pickle(self, frozen: FrozenState) -> bytes:
        """Return the bytes that torch.save would have written as `data.pkl`, in meaning."""
        last = self._last
        same_tensors = (
            last is not None
            and last.tensors == frozen.tensors
            and last.sizes == frozen.sizes
            and last.locations == frozen.locations
        )
        if last is not None and same_tensors and last.pickled == frozen.pickled:
            return self._data
        if not same_tensors:
            self._arguments = [_rebuild_arguments(meta, frozen) for meta in frozen.tensors]
        self._data = _splice(frozen.pickled, self._arguments)
        self._last = frozen
        return self._data


def _splice(pickled: bytes, arguments: Sequence[bytes]) -> bytes:
    pieces = _MARKED.split(pickled)
    pieces[1::2] = [arguments[int.from_bytes(index, "little")] for index in pieces[1::2]]
    return b"".join(pieces)


def _rebuild_arguments(meta: TensorMeta, frozen: FrozenState) -> bytes:
    """Pickle (storage, offset, size, stride, requires_grad, hooks), the storage by its persistent id."""
    key, dtype, offset, size, stride, requires_grad = meta
    return b"".join(
        (
            b"((X\x07\0\0\0storage",
            b"ctorch\n%b\n" % STORAGE_CLASS[dtype].encode(),
            _text(str(key)),
            _text(frozen.locations[key]),
            _integer(frozen.sizes[key] // dtype.itemsize),
            b"tQ",
            _integer(offset),
            _integers(size),
            _integers(stride),
            b"\x88" if requires_grad else b"\x89",
            _NO_HOOKS,
            b"t",
        )
    )


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _integers(values: Sequence[int]) -> bytes:
    items = b"".join([_integer(value) for value in values])
    if not values:
        return b")"
    return items + _TUPLE_END[len(values)] if len(values) in _TUPLE_END else b"(" + items + b"t"


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if 0 <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little")
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded
