"""What a folder holds, and where: the metadata of DCP, of which nothing is believed that does not fit."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._loading.item_reader import Place
from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.distributed.checkpoint.metadata import Metadata

    Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes

_SHOWN = 5
# A dimension or an offset that is not below this is made up.
_MOST = 1 << 60
# As many containers in each other as Python's recursion limit lets a planner flatten.
_DEEPEST = 200


@dataclass(frozen=True, slots=True, eq=False)
class TensorEntry:
    """A tensor of a folder.

    Attributes:
        key: its flattened key.
        dtype: its dtype.
        size: its global shape.
        chunks: shape and place of each saved part that has elements, by its offsets. Together they are all
            of the tensor.
    """

    key: str
    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: dict[tuple[int, ...], tuple[tuple[int, ...], Place]]

    @property
    def places(self) -> list[Place]:
        """Where its parts lie."""
        return [place for _, place in self.chunks.values()]


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """The entries of a folder.

    Attributes:
        metadata: as DCP's planners take it.
        tensors: by flattened key.
        objects: where each entry that is no tensor lies, by flattened key.
        items: where each item of the folder lies, those that are empty included.
        paths: the keys that lead to an entry, by flattened key; those that are not in it are not nested.
    """

    metadata: Metadata
    tensors: dict[str, TensorEntry]
    objects: dict[str, Place]
    items: list[Place]
    paths: dict[str, tuple[Any, ...]]

    @property
    def places(self) -> list[Place]:
        """Where all that the entries are made of lies."""
        return [*(p for entry in self.tensors.values() for p in entry.places), *self.objects.values()]


def index_of(metadata: Metadata) -> Index:
    """Return the entries of a folder with this metadata.

    Raises:
        CorruptCheckpointError: the metadata contradicts itself, or a part of a tensor is missing.
    """
    try:
        return _index_of(metadata)
    except (AttributeError, TypeError, ValueError, LookupError, OverflowError) as error:
        if isinstance(error, CorruptCheckpointError):
            raise
        raise CorruptCheckpointError(
            f"its metadata makes no sense ({type(error).__name__}: {error}); use another checkpoint"
        ) from error


def _index_of(metadata: Metadata) -> Index:
    found: dict[str, dict[tuple[int, ...] | None, Place]] = defaultdict(dict)
    for index, info in metadata.storage_data.items():
        offset = None if index.offset is None else tuple(index.offset)
        found[index.fqn][offset] = _place(index.fqn, offset, info)
    tensors: dict[str, TensorEntry] = {}
    objects: dict[str, Place] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise TypeError(f"a key is {key!r}")
        if not hasattr(entry, "chunks"):
            if None not in found[key]:
                raise CorruptCheckpointError(f"its metadata does not say where {key} lies")
            objects[key] = found[key][None]
        else:
            tensors[key] = _tensor(key, entry, found[key])
    items = [place for places in found.values() for place in places.values()]
    return Index(metadata, tensors, objects, items, _paths(metadata))


def _place(key: str, offset: tuple[int, ...] | None, info: Any) -> Place:
    name, start, length = info.relative_path, info.offset, info.length
    if type(name) is not str or type(start) is not int or type(length) is not int:
        raise TypeError(f"{key} lies at {name!r}, {start!r}, {length!r}")
    if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
        raise CorruptCheckpointError(
            f"its metadata has {key} in a file {name!r}, which is not one of a folder"
        )
    if getattr(info, "transform_descriptors", None):
        by = ", ".join(map(str, info.transform_descriptors))
        raise CorruptCheckpointError(
            f"{key} is stored transformed by {by}, which only the extension that wrote it can read; load it"
            " with torch.distributed.checkpoint"
        )
    return Place(name, start, length, f"{key} at {list(offset)}" if offset and any(offset) else key)


def _tensor(key: str, entry: Any, found: dict[tuple[int, ...] | None, Place]) -> TensorEntry:
    size, dtype = _lengths(entry.size), entry.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"the dtype of {key} is {dtype!r}")
    boxes = [(_lengths(chunk.offsets), _lengths(chunk.sizes)) for chunk in entry.chunks]
    if problem := cover_problem(size, boxes):
        raise CorruptCheckpointError(f"the saved parts of {key} {problem}; use another checkpoint")
    chunks: dict[tuple[int, ...], tuple[tuple[int, ...], Place]] = {}
    for offsets, sizes in boxes:
        if prod(sizes):
            place = found.get(offsets)
            if place is None or prod(sizes) * dtype.itemsize > place.length:
                lack = "does not say where it lies" if place is None else "gives it too few bytes"
                raise CorruptCheckpointError(
                    f"its metadata has a part of {key} at {list(offsets)}, but {lack}; use another checkpoint"
                )
            chunks[offsets] = sizes, place
    return TensorEntry(key, dtype, size, chunks)


def _lengths(values: Iterable[Any]) -> tuple[int, ...]:
    lengths = tuple(values)
    if not all(type(value) is int and 0 <= value < _MOST for value in lengths):
        raise ValueError(f"a shape or an offset is {lengths!r}")
    return lengths


def cover_problem(size: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Return why boxes are not all of a tensor, each element once; None if they are."""
    total = 0
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(size):
            return f"have another number of dimensions than its shape {list(size)}"
        if any(o + s > most for o, s, most in zip(offsets, sizes, size, strict=True)):
            return f"reach beyond its shape {list(size)}"
        total += prod(sizes)
    if total != prod(size):
        return f"have {total} of its {prod(size)} elements"
    return "overlap" if _overlap([box for box in boxes if prod(box[1])]) else None


def _overlap(boxes: list[Box]) -> bool:
    """Whether two of the boxes, none of them empty, share an element."""
    if len(boxes) < 2 or not boxes[0][0]:  # noqa: PLR2004
        return len(boxes) > 1
    # Along the dimension that is cut most, only few of them are side by side.
    axis = max(range(len(boxes[0][0])), key=lambda dim: len({offsets[dim] for offsets, _ in boxes}))
    side_by_side: list[Box] = []
    for box in sorted(boxes, key=lambda box: box[0][axis]):
        start = box[0][axis]
        side_by_side = [other for other in side_by_side if other[0][axis] + other[1][axis] > start]
        if any(_meet(box, other) for other in side_by_side):
            return True
        side_by_side.append(box)
    return False


def _meet(one: Box, other: Box) -> bool:
    sides = zip(*one, *other, strict=True)
    return all(a < b + length_b and b < a + length_a for a, length_a, b, length_b in sides)


def _paths(metadata: Metadata) -> dict[str, tuple[Any, ...]]:
    paths = metadata.planner_data
    if not isinstance(paths, dict):  # a planner that flattens nothing, or another one's
        return {}
    for key, path in paths.items():
        is_path = type(path) is tuple and all(type(part) in {str, int} for part in path)
        if not is_path or not 0 < len(path) <= _DEEPEST:
            raise ValueError(f"the path of {key} is {path!r}")
    return paths


def nested(entries: Mapping[str, Any], paths: Mapping[str, tuple[Any, ...]]) -> dict[Any, Any]:
    """Return entries by flattened key as the dicts and lists that they were.

    Raises:
        CorruptCheckpointError: a path leads through a value, or into a list far behind its end.
    """
    root: dict[Any, Any] = {}
    lists: dict[int, dict[Any, Any]] = {}  # by identity: they become lists at the end
    for key, value in entries.items():
        path = paths.get(key, (key,))
        node = root
        for part, following in pairwise(path):
            child = node.setdefault(part, _Node())
            if not isinstance(child, _Node):
                raise CorruptCheckpointError(f"its entry {key} lies within another entry that is a value")
            if type(following) is int:
                lists[id(child)] = child
            node = child
        if path[-1] in node:
            raise CorruptCheckpointError(f"its entry {key} is there twice, or is one with entries in it")
        node[path[-1]] = value
    spare = len(entries) + _MOST_SPARE
    for node in lists.values():
        if not all(type(part) is int and part >= 0 for part in node):
            raise CorruptCheckpointError(f"it has entries {some(node)} in a list")
        spare -= max(node) + 1
        if spare < 0:
            raise CorruptCheckpointError(f"a list in it has an entry {max(node)}, and few others")
    return _built(root, lists)


class _Node(dict[Any, Any]):
    """A container under way, told apart from dicts that are values."""


# Places in lists that no entry fills, as empty dicts leave them.
_MOST_SPARE = 1 << 20


def _built(root: dict[Any, Any], lists: dict[int, dict[Any, Any]]) -> dict[Any, Any]:
    """Return the containers that nodes stand for, without recursion: paths may be long."""
    made: dict[int, Any] = {}
    order: list[dict[Any, Any]] = [root]
    for node in order:
        order += [child for child in node.values() if isinstance(child, _Node)]
    for node in reversed(order):
        items = {k: made[id(v)] if isinstance(v, _Node) else v for k, v in node.items()}
        if id(node) in lists:
            made[id(node)] = [items.get(at) for at in range(max(items) + 1)]
        else:
            made[id(node)] = items
    built: dict[Any, Any] = made[id(root)]
    return built


def some(keys: Iterable[Any]) -> str:
    """Return the first few of them as a text."""
    shown = sorted(map(str, keys))
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")
