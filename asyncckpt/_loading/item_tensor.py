"""From an item in memory to the tensor that it holds, without torch.load where that is not needed."""

from __future__ import annotations

import sys
from pickletools import genops
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from asyncckpt._inspection.inert import Tensor, dtype_name, read_pickle
from asyncckpt._loading.load import load_image, storage_of
from asyncckpt._loading.unpickle import is_device
from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.layout.zip_format import ROOT

if TYPE_CHECKING:
    from asyncckpt._loading.reader import Image

_PLAIN = "torch.Tensor"
# What torch.save writes for a plain tensor. None of it takes more memory than the pickle's length.
_OPCODES = frozenset({
    "PROTO", "GLOBAL", "BINPUT", "BINGET", "MARK", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "NEWTRUE", "NEWFALSE", "BINPERSID", "REDUCE",
    "STOP",
})  # fmt: skip
_MOST_BYTES = 4096


class _Plain(NamedTuple):
    """A tensor that views the one storage of its item.

    Attributes:
        record: name of the record with the storage.
        dtype: of the tensor.
        offset: of its first element in the storage.
        shape: of the tensor.
        stride: of the tensor.
        nbytes: how much of the storage it needs.
    """

    record: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    nbytes: int


class ItemTensors:
    """Makes the tensors of items, whose memory they view.

    Unpickling each item would cost ten times as much as all else. Tensors of one shape and dtype have the
    same pickle, which is read once, into inert objects.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, _Plain | None] = {}

    def tensor(self, image: Image, dtype: torch.dtype, sizes: tuple[int, ...]) -> torch.Tensor:
        """Return the tensor in an item.

        Args:
            image: the item.
            dtype: what the metadata says of it.
            sizes: the same of its shape.

        Raises:
            CorruptCheckpointError: it is not.
            UnsafeStateError: it is of a class that `weights_only=True` refuses.
        """
        pickled = image.record(ROOT + "data.pkl") or b""
        if pickled not in self._known:
            self._known[pickled] = _described(pickled)
        found = self._known[pickled]
        tensor: Any = None
        if found is not None and _is_native(image):
            tensor = _viewed(image, found)
        if tensor is None:
            tensor = load_image(image, "cpu", weights_only=True).state
        is_tensor = isinstance(tensor, torch.Tensor)
        if not is_tensor or tensor.dtype is not dtype or tuple(tensor.shape) != sizes:
            there = f"{tensor.dtype} {list(tensor.shape)}" if is_tensor else type(tensor).__name__
            raise CorruptCheckpointError(
                f"{image.path} holds {there} instead of {dtype} {list(sizes)}, of which the metadata of the"
                " folder speaks; they are of different saves"
            )
        plain: torch.Tensor = tensor.detach()
        return plain


def _described(pickled: bytes) -> _Plain | None:
    """Return what tensor a pickle describes; None if only torch.load can make it."""
    if len(pickled) > _MOST_BYTES:
        return None
    try:
        if not all(opcode.name in _OPCODES for opcode, _, _ in genops(pickled)):
            return None
        found = read_pickle(pickled).root
    except Exception:  # noqa: BLE001 - whatever a damaged pickle comes to; torch.load says it better
        return None
    if not isinstance(found, Tensor) or found.kind != _PLAIN or found.state or found.conj or found.neg:
        return None
    dtype = getattr(torch, dtype_name(found), None)
    is_quantized = dtype_name(found).startswith("q")
    if not isinstance(dtype, torch.dtype) or is_quantized or not is_device(found.storage.location):
        return None
    nbytes = (found.offset + found.reach) * dtype.itemsize
    return _Plain(f"{ROOT}data/{found.storage.key}", dtype, found.offset, found.shape, found.stride, nbytes)


def _is_native(image: Image) -> bool:
    return (image.record(ROOT + "byteorder") or b"little").decode("ascii", "replace") == sys.byteorder


def _viewed(image: Image, found: _Plain) -> torch.Tensor | None:
    """Return a tensor that views its item; None if the item is too short for it."""
    row = image.directory.row(found.record)
    if row is None:
        return None
    start, stop = int(image.directory.starts[row]), int(image.directory.stops[row])
    if found.nbytes > stop - start:
        return None
    if start == stop:
        return torch.empty_strided(found.shape, found.stride, dtype=found.dtype)
    tensor = torch.empty(0, dtype=found.dtype)
    return tensor.set_(storage_of(image, start, stop), found.offset, found.shape, found.stride)
