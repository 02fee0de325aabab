"""Shards: what a rank writes of each tensor, as ranges of live storages."""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.storage import TypedStorage, UntypedStorage

from asyncckpt._snapshot.collector import no_collections
from asyncckpt._snapshot.frozen import PROTOCOL
from asyncckpt._snapshot.local_tensors import PLAIN, local_of
from asyncckpt._snapshot.ranges import Ranges, is_dense
from asyncckpt.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# dtype, shape and stride of a tensor.
Layout = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]
# `data.pkl` and bytes of a tensor.
Record = tuple[bytes, int]


class Shards(NamedTuple):
    """What a rank writes of its tensors beside their bytes, by columns. It keeps no tensor alive.

    Attributes:
        pickles: `data.pkl` of a file that holds the tensor alone, on a storage of `sizes` bytes.
        sizes: bytes of each.
        records: the same of each layout that they have.
    """

    pickles: list[bytes]
    sizes: list[int]
    records: Mapping[Layout, Record]


def shards_of(
    tensors: Sequence[torch.Tensor], names: Sequence[str], last: Shards | None = None
) -> tuple[Shards, Ranges]:
    """Return the record that makes each of some tensors again, and the bytes that a rank writes of it.

    Of a DTensor it is the local tensor. The record is that of torch.save for the local tensor, detached: a
    plain tensor in host memory that needs no gradient. The bytes are those of the tensor without the rest of
    its storage; of a copy, if there are gaps or overlaps between its elements, or if it has a conjugate or
    negative bit.

    Args:
        tensors: plain tensors, DTensors, or the tensors of ShardedTensors' local shards.
        names: what each is called in the state, for errors.
        last: of the same state before. `pickles` and `sizes` are the same objects as there if they are equal.

    Raises:
        SaveError: one is sparse, quantized, nested, of a class with a dispatch of its own, on the meta
            device, or without its memory.
    """
    with no_collections():
        shards, ranges = _shards_of(tensors, names, {} if last is None else last.records)
    # Of layouts that were known, too: FSDP gives up the memory of unsharded parameters.
    for name, source, offset, size in zip(names, *ranges[:3], strict=True):
        _check_memory(name, source, offset + size)
    if last is not None:
        pickles = last.pickles if shards.pickles == last.pickles else shards.pickles
        sizes = last.sizes if shards.sizes == last.sizes else shards.sizes
        shards = Shards(pickles, sizes, shards.records)
    return shards, ranges


def _shards_of(
    tensors: Sequence[torch.Tensor], names: Sequence[str], known: Mapping[Layout, Record]
) -> tuple[Shards, Ranges]:
    """Make shards; runs on the training thread for each tensor: hence locals for everything."""
    plain, strided = PLAIN, torch.strided
    ranges, pickles, records = Ranges([], [], [], []), list[bytes](), dict[Layout, Record]()
    sources, offsets, sizes, views = ranges
    for name, tensor in zip(names, tensors, strict=True):
        local = tensor if type(tensor) in plain else _plain(tensor, name)
        if local.layout is not strided or local.is_nested or local.is_meta:
            raise _unfit(name, local)
        if local.is_neg() or local.is_conj():
            local = local.detach().resolve_conj().resolve_neg()
        layout: Layout = (local.dtype, local.shape, local.stride())
        record = records.get(layout) or known.get(layout)
        if record is None:
            if not is_dense(local.shape, local.stride()):
                local = local.detach().clone(memory_format=torch.contiguous_format)
                layout = (local.dtype, local.shape, local.stride())
            record = records.get(layout) or known.get(layout) or (_data_pickle(local, name), local.nbytes)
        records[layout] = record
        sources.append(local.untyped_storage())
        offsets.append(local.storage_offset() * local.itemsize)  # type: ignore[arg-type]
        sizes.append(record[1])
        views.append(local)
        pickles.append(record[0])
    return Shards(pickles, sizes, records), ranges


def _plain(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return the plain tensor that has the bytes of one of another class."""
    local = local_of(tensor)
    if type(local) in PLAIN:
        return local
    if type(local).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise _unfit(name, local)
    return local.detach().as_subclass(torch.Tensor)


def _data_pickle(tensor: torch.Tensor, name: str) -> bytes:
    if tensor.is_quantized:
        raise _unfit(name, tensor)
    end = int(tensor.storage_offset()) * tensor.itemsize + tensor.nbytes
    _check_memory(name, tensor.untyped_storage(), end)
    out = io.BytesIO()
    # As if its storage began with it.
    alone = tensor.detach().as_strided(tensor.shape, tensor.stride(), 0)
    try:
        _RecordPickler(out, tensor.nbytes).dump(alone)
    except Exception as error:
        raise SaveError(f"{name}: torch cannot save a tensor of {tensor.dtype} ({error})") from error
    return out.getvalue()


class _RecordPickler(pickle.Pickler):
    """Pickles a tensor with the persistent id that torch.save gives the only storage of a file."""

    def __init__(self, out: io.BytesIO, nbytes: int) -> None:
        super().__init__(out, PROTOCOL)
        self._nbytes = nbytes

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, TypedStorage):
            kind = getattr(torch, obj._pickle_storage_type())
            return "storage", kind, "0", "cpu", self._nbytes // obj.dtype.itemsize
        if isinstance(obj, UntypedStorage):
            return "storage", UntypedStorage, "0", "cpu", self._nbytes
        return None


def _check_memory(name: str, storage: UntypedStorage, end: int) -> None:
    if end > storage.nbytes():
        raise SaveError(
            f"{name}: its storage has {storage.nbytes()} of {end} bytes; save it while it has its memory"
        )


def _unfit(name: str, tensor: torch.Tensor) -> SaveError:
    kind = type(tensor).__name__
    if tensor.is_nested:
        kind = "nested tensor"
    elif tensor.layout is not torch.strided:
        kind = f"tensor of {tensor.layout}"
    elif tensor.is_meta:
        kind = "tensor on the meta device"
    elif tensor.is_quantized:
        kind = f"quantized tensor ({tensor.dtype})"
    return SaveError(
        f"{name}: a {kind} cannot be part of a checkpoint of many ranks, which holds the bytes of dense"
        " tensors; convert it, or leave it out"
    )
