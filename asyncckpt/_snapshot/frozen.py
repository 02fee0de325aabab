"""A frozen state: everything about it but the bytes of its storages, and the `data.pkl` made of it."""

from __future__ import annotations

import io
import pickle
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt.types import STORAGE_DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

# torch.load's weights-only unpickler reads no newer protocol.
PROTOCOL = 2

# A plain tensor is pickled as a call of torch's rebuild function on a 1-tuple of one integer: 4 bytes of
# index, then these 16, which no state contains by accident. The real arguments are put there later.
# The highest byte lies between 0x40 and 0x7f, so that the pickled integer is always 20 bytes long.
MARK = secrets.token_bytes(15) + bytes([0x40 | secrets.randbelow(0x40)])
# LONG1 of 20 bytes, the index in the first four, then TUPLE1: the stack effect of one tuple.
_MARKED = re.compile(rb"\x8a\x14(.{4})" + re.escape(MARK) + rb"\x85", re.DOTALL)

_NO_HOOKS = b"ccollections\nOrderedDict\n)R"

# The dtypes that torch pickles by way of a typed storage class; it has another way for all others.
STORAGE_CLASS = {getattr(torch, dtype): name for name, dtype in STORAGE_DTYPES.items()}

# (storage key, dtype, offset, size, stride, requires_grad)
TensorMeta = tuple[int, torch.dtype, int, tuple[int, ...], tuple[int, ...], bool]


@dataclass(slots=True)
class DataPickler:
    """Makes `data.pkl` of one state again and again, reusing what did not change."""

    _last: FrozenState | None = None
    _arguments: list[bytes] = field(default_factory=list)
    _data: bytes = b""

    def data_pickle(self, frozen: FrozenState) -> bytes:
        """Put the arguments of each plain tensor where its mark is."""
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
            self._arguments = _rebuild_arguments(frozen)
        pieces: list[bytes] = _MARKED.split(frozen.pickled)
        pieces[1::2] = [self._arguments[int.from_bytes(index, "little")] for index in pieces[1::2]]
        self._data = b"".join(pieces)
        self._last = frozen
        return self._data


@dataclass(frozen=True, slots=True)
class FrozenState:
    """Everything about a state but the bytes of its storages.

    Attributes:
        pickled: the pickle stream, with a marked integer for the arguments of each plain tensor.
        tensors: what those arguments are, by the index in the mark.
        sizes: bytes of each storage of the state, once, by the key that names its record.
        locations: where each storage lives, as torch.load names it: "cpu", "cuda:0".
        pickler: of this state and the same one at other times.
    """

    pickled: bytes
    tensors: list[TensorMeta]
    sizes: Sequence[int]
    locations: list[str]
    pickler: DataPickler = field(default_factory=DataPickler, compare=False, repr=False)

    def data_pickle(self) -> bytes:
        """Return the bytes that torch.save would have written as `data.pkl`, in meaning."""
        return self.pickler.data_pickle(self)


def _rebuild_arguments(frozen: FrozenState) -> list[bytes]:
    """Pickle (storage, offset, size, stride, requires_grad, hooks) of each tensor, the storage by its id."""
    out = io.BytesIO()
    pickler = pickle.Pickler(out, PROTOCOL)
    pickler.fast = True  # without memo, which would be that of the stream they are put into

    def pickled(value: Any) -> bytes:
        out.seek(0)
        out.truncate()
        pickler.dump(value)
        return out.getvalue()[2:-1]  # without the protocol and the stop

    def arguments(meta: TensorMeta) -> bytes:
        key, dtype, offset, size, stride, requires_grad = meta
        kind, numel = getattr(torch, STORAGE_CLASS[dtype]), frozen.sizes[key] // dtype.itemsize
        storage = pickled(("storage", kind, str(key), frozen.locations[key], numel))
        others = pickled((offset, tuple(size), stride, requires_grad))
        # Between MARK and TUPLE, the storage's BINPERSID comes first and the hooks last.
        return b"".join((others[:1], storage, b"Q", others[1:-1], _NO_HOOKS, others[-1:]))

    return [arguments(meta) for meta in frozen.tensors]
