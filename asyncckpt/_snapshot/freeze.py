"""Freeze a state: one pickler pass that decides everything about it except the bytes of its storages."""

from __future__ import annotations

import io
import itertools
import pickle
from dataclasses import dataclass, field
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.serialization import location_tag
from torch.storage import TypedStorage, UntypedStorage

from asyncckpt._snapshot.collector import no_collections
from asyncckpt._snapshot.culprit import find_culprit
from asyncckpt._snapshot.frozen import MARK, PROTOCOL, STORAGE_CLASS, DataPickler, FrozenState
from asyncckpt._snapshot.local_tensors import shard_ranks
from asyncckpt._snapshot.ranges import Ranges
from asyncckpt.errors import SaveError, ShardedStateError, UnpicklableStateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._snapshot.frozen import TensorMeta

_FIRST_MARK = int.from_bytes(b"\0\0\0\0" + MARK, "little")
_REBUILD: Callable[..., torch.Tensor] = torch._utils._rebuild_tensor_v2
_COMPLEX = frozenset({torch.complex64, torch.complex128})
_PLAIN_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
_STORAGES = (TypedStorage, UntypedStorage)
_NAMED = (type, FunctionType, BuiltinFunctionType)  # pickled by their names


class _NeedsStorageIdsError(Exception):
    """The state has tensors or storages that only torch's own reduction can pickle."""


class _PlainPickler(pickle.Pickler):
    """The C pickler; what it does with tensors is set per instance, which saves a bound method a call."""

    reducer_override: Callable[[Any], Any]


class _ExactPickler(_PlainPickler):
    """Gives storages the persistent ids of torch.save. It costs a call for every object in the state."""

    storage_id: Callable[[Any], Any]

    def persistent_id(self, obj: Any) -> Any:
        return self.storage_id(obj) if isinstance(obj, _STORAGES) else None


@dataclass(slots=True)
class Freezer:
    """Freezes the same state again and again, sharing what did not change since the last time.

    Attributes:
        kinds: the classes of all objects so far that are neither plain tensors nor plain Python values, and
            the classes and functions that are pickled by their names.
    """

    kinds: set[Any] = field(default_factory=set, init=False)
    _last: FrozenState | None = field(default=None, init=False)
    _pickler: DataPickler = field(default_factory=DataPickler, init=False)
    _exact: bool = field(default=False, init=False)

    def freeze(self, state: object) -> tuple[FrozenState, Ranges]:
        """Decide what a checkpoint of `state` will hold, except for the bytes of its storages.

        This is one pass of the C pickler over the whole state, so objects, numpy arrays, RNG states and
        shared references are captured as they are now, just as torch.save would have done it.

        Returns:
            The frozen state, and its live storages by key, which are still to be copied.

        Raises:
            UnpicklableStateError: names the path of the entry that does not pickle.
            ShardedStateError: names the path of a tensor of which this rank has a shard only.
            SaveError: the state has one storage under two dtypes.
        """
        with no_collections():
            try:
                return self._freeze(state)
            except _NeedsStorageIdsError:
                self._exact = True
                return self._freeze(state)

    def _freeze(self, state: object) -> tuple[FrozenState, Ranges]:
        out = io.BytesIO()
        table = _Table(self._last.tensors if self._last else [], self.kinds)
        try:
            _pickler(out, table, exact=self._exact).dump(state)
        except ShardedStateError as error:
            raise ShardedStateError(f"{find_culprit(state, _probe)}: {error}") from None
        except (SaveError, _NeedsStorageIdsError):
            raise
        except Exception as error:
            raise UnpicklableStateError(
                f"{find_culprit(state, _probe)}: cannot pickle ({type(error).__name__}: {error}); make it"
                " picklable or leave it out"
            ) from error
        self._last = FrozenState(out.getvalue(), table.tensors, table.sizes, table.locations, self._pickler)
        return self._last, Ranges(table.storages, [0] * len(table.sizes), table.sizes, table.views)


class _Table:
    """The storages and plain tensors that one pass has met."""

    __slots__ = ("dtypes", "keys", "kinds", "known", "locations", "sizes", "storages", "tensors", "views")

    def __init__(self, known: list[TensorMeta], kinds: set[Any]) -> None:
        self.known = known
        self.kinds = kinds
        self.tensors: list[TensorMeta] = []
        self.storages: list[UntypedStorage] = []
        self.views: list[torch.Tensor | None] = []
        self.sizes: list[int] = []
        self.locations: list[str] = []
        self.dtypes: list[torch.dtype] = []
        self.keys: dict[int, int] = {}

    def add(self, storage: UntypedStorage, dtype: torch.dtype, location: str) -> int:
        key = self.keys[storage._cdata] = len(self.storages)
        self.storages.append(storage)
        self.views.append(None)
        self.sizes.append(storage.nbytes())
        self.locations.append(location)
        self.dtypes.append(dtype)
        return key

    def check_dtype(self, key: int, dtype: torch.dtype) -> None:
        first = self.dtypes[key]
        if first is not dtype and self.sizes[key]:
            raise SaveError(
                f"two entries of the state view the same storage ({self.sizes[key]} bytes) as {first} and as"
                f" {dtype}, which torch's file format cannot express; clone one of them"
            )


def _pickler(out: io.BytesIO, table: _Table, *, exact: bool) -> _PlainPickler:
    pickler = _ExactPickler(out, PROTOCOL) if exact else _PlainPickler(out, PROTOCOL)
    pickler.reducer_override = _tensor_reducer(table, exact=exact)
    if isinstance(pickler, _ExactPickler):
        pickler.storage_id = partial(_storage_id, table)
    return pickler


def _tensor_reducer(table: _Table, *, exact: bool) -> Callable[[Any], Any]:
    """Return a reducer that leaves a mark for a plain tensor and notes its metadata.

    It runs once for each tensor of the state, on the training thread: hence locals for everything.
    """
    plain, strided = torch.Tensor, torch.strided
    devices, complex_dtypes, storage_class = _PLAIN_DEVICES, _COMPLEX, STORAGE_CLASS
    tensors, keys, find, dtypes = table.tensors, table.keys, table.keys.get, table.dtypes
    storages, sizes, locations, views = table.storages, table.sizes, table.locations, table.views
    tags: dict[torch.device, str] = {}
    marks, known, note = itertools.count(_FIRST_MARK), iter(table.known), table.kinds.add

    def reduce(obj: Any) -> Any:
        if type(obj) is not plain:
            if not exact and isinstance(obj, (plain, *_STORAGES)):
                raise _NeedsStorageIdsError
            if isinstance(obj, plain):
                _refuse_shard(obj)
            note(obj if isinstance(obj, _NAMED) else type(obj))
            return NotImplemented
        dtype = obj.dtype
        if (
            obj.layout is not strided
            or obj.is_nested
            or dtype not in storage_class
            or obj.is_neg()
            or (dtype in complex_dtypes and obj.is_conj())
            or not (obj.is_cpu or obj.device.type in devices)
            or obj.__dict__
        ):
            if not exact:
                raise _NeedsStorageIdsError
            return NotImplemented
        storage = obj.untyped_storage()
        identity = storage._cdata
        key = find(identity)
        if key is None:  # as `_Table.add`, without the call
            key = keys[identity] = len(storages)
            storages.append(storage)
            views.append(obj)
            sizes.append(storage.nbytes())
            if obj.is_cpu:
                locations.append("cpu")
            else:  # torch asks every registered kind of device
                device = obj.device
                locations.append(tags.get(device) or tags.setdefault(device, location_tag(storage)))
            dtypes.append(dtype)
        elif dtypes[key] is not dtype:
            table.check_dtype(key, dtype)
        meta = (key, dtype, obj.storage_offset(), obj.shape, obj.stride(), obj.requires_grad)
        before = next(known, None)
        # The equal tuple of last time is kept: an unchanged state costs no memory and compares at once.
        tensors.append(before if before == meta else meta)  # type: ignore[arg-type]
        return _REBUILD, (next(marks),)

    return reduce


def _storage_id(table: _Table, obj: TypedStorage | UntypedStorage) -> tuple[str, Any, str, str, int]:
    storage: UntypedStorage
    if isinstance(obj, TypedStorage):
        storage, dtype = obj._untyped_storage, obj.dtype
        kind, numel = getattr(torch, obj._pickle_storage_type()), obj._size()
    else:
        storage, dtype, kind, numel = obj, torch.uint8, UntypedStorage, obj.nbytes()
    key = table.keys.get(storage._cdata)
    if key is None:
        if storage.nbytes() and not storage.data_ptr():
            raise SaveError(f"a storage on {storage.device} is to be saved, but has no bytes")
        key = table.add(storage, dtype, location_tag(storage))
    else:
        table.check_dtype(key, dtype)
    return "storage", kind, str(key), table.locations[key], numel


def _refuse_shard(tensor: torch.Tensor) -> None:
    """Raise if this process holds a part of a tensor only."""
    ranks = shard_ranks(tensor)
    if ranks > 1:
        raise ShardedStateError(
            f"a {type(tensor).__name__} over {ranks} ranks, of which this process holds its shard only;"
            " save it with a Checkpointer on every rank of a process group, or gather the whole state on one"
            " (torch.distributed.checkpoint.state_dict.get_state_dict with"
            " StateDictOptions(full_state_dict=True, cpu_offload=True))"
        )


def _probe(value: object) -> None:
    """Raise what freezing `value` alone would raise."""
    _pickler(io.BytesIO(), _Table([], set()), exact=True).dump(value)
