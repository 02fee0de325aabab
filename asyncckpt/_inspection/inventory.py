"""Which tensors and other values a state holds, and what they amount to."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asyncckpt._inspection.tensor_values import dtype_of, span
from asyncckpt._outline.nodes import Attribute, TensorOutline
from asyncckpt._outline.texts import clean, key_text
from asyncckpt._outline.walk import walk

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asyncckpt._outline.machine import Outline
    from asyncckpt._outline.nodes import StorageOutline
    from asyncckpt._outline.walk import Path


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of a state.

    Attributes:
        path: where it is.
        tensor: what it is.
        nbytes: of its elements; None if this torch does not have its dtype.
        fits: whether all of its elements are in the file.
    """

    path: Path
    tensor: TensorOutline
    nbytes: int | None
    fits: bool


@dataclass(slots=True)
class Sum:
    """What the tensors under one prefix amount to: how many, their elements, and the bytes of those."""

    tensors: int = 0
    numel: int = 0
    nbytes: int = 0

    def add(self, entry: TensorEntry) -> None:
        """Count one tensor more."""
        self.tensors += 1
        self.numel += entry.tensor.numel
        self.nbytes += entry.nbytes or 0


@dataclass(slots=True)
class Inventory:
    """What a state holds.

    Attributes:
        tensors: all, in order.
        values: everything else that is not an attribute of an object, with its path.
        sharing: for each storage that several tensors view, these.
        storages: those that are in the file, each once, with its size in bytes.
        total: over all tensors.
    """

    tensors: list[TensorEntry] = field(default_factory=list)
    values: list[tuple[Path, Any]] = field(default_factory=list)
    sharing: dict[str, list[TensorEntry]] = field(default_factory=dict)
    storages: list[tuple[StorageOutline, int]] = field(default_factory=list)
    total: Sum = field(default_factory=Sum)


def take_inventory(told: Outline, payloads: Mapping[str, tuple[int, int]]) -> Inventory:
    """Go through a state.

    Args:
        told: its outline.
        payloads: (start, stop) in the file of each storage.

    Raises:
        CorruptCheckpointError: it is nested too deep.
    """
    sizes = {key: stop - start for key, (start, stop) in payloads.items()}
    result = Inventory()
    views: defaultdict[str, list[TensorEntry]] = defaultdict(list)
    for path, node in walk(told.root):
        if isinstance(node, TensorOutline):
            entry = _entry(path, node, sizes.get(node.storage.key, 0))
            result.tensors.append(entry)
            result.total.add(entry)
            views[node.storage.key].append(entry)
        elif not any(type(key) is Attribute for key in path):
            result.values.append((path, node))
    result.sharing = {key: entries for key, entries in views.items() if len(entries) > 1}
    result.storages = [(storage, sizes[storage.key]) for storage in told.storages if storage.key in sizes]
    return result


def sums_by_module(entries: Sequence[TensorEntry], depth: int) -> dict[tuple[str, ...], Sum]:
    """Return sums for each prefix of names, such as ("model", "layers", "0"), in order.

    Args:
        entries: the tensors.
        depth: how many levels below the entries of the state itself.
    """
    sums: dict[tuple[str, ...], Sum] = {}
    for entry in entries:
        # A state dict has the names of modules in its keys, with dots between them.
        names = [name for key in entry.path[: depth + 2] for name in _name(key).split(".")]
        for length in range(1, min(len(names) - 1, depth + 1) + 1):
            sums.setdefault(tuple(names[:length]), Sum()).add(entry)
    return sums


def _name(key: Any) -> str:
    return clean(key) if isinstance(key, str) else key_text(key)


def _entry(path: Path, tensor: TensorOutline, stored: int) -> TensorEntry:
    dtype = dtype_of(tensor.dtype)
    if dtype is None:
        return TensorEntry(path, tensor, None, fits=False)
    needed = (tensor.offset + span(tensor.shape, tensor.stride)) * dtype.itemsize
    return TensorEntry(path, tensor, tensor.numel * dtype.itemsize, fits=not tensor.numel or needed <= stored)
