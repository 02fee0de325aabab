"""What a folder holds, and where: the metadata of DCP, of which nothing is believed that does not fit."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, cast

from asyncckpt._loading.item_run import Place
from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes

_SHOWN = 5
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
        entries: by flattened key: the tensors, and where each other one lies.
        items: where each item of the folder lies, those of empty chunks included.
        paths: the keys that lead to an entry, by flattened key; those that are not in it are not nested.
        tree: the entries, nested.
    """

    metadata: Metadata
    entries: dict[str, TensorEntry | Place]
    items: list[Place]
    paths: dict[str, tuple[Any, ...]]
    tree: dict[Any, Any]

    @property
    def places(self) -> list[Place]:
        """Where all that the entries are made of lies."""
        return places_of(self.entries.values())


def places_of(entries: Iterable[TensorEntry | Place]) -> list[Place]:
    """Return where all that these entries are made of lies."""
    return [
        place for entry in entries for place in (entry.places if isinstance(entry, TensorEntry) else (entry,))
    ]


def index_of(metadata: Metadata) -> Index:
    """Return the entries of a folder with this metadata, whose types and limits were checked before.

    Raises:
        CorruptCheckpointError: the metadata contradicts itself, or a part of a tensor is missing.
    """
    found: dict[str, dict[tuple[int, ...] | None, Place]] = defaultdict(dict)
    for index, info in metadata.storage_data.items():
        offset = None if index.offset is None else tuple(index.offset)
        found[index.fqn][offset] = _place(index.fqn, offset, info)
    entries: dict[str, TensorEntry | Place] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if hasattr(entry, "chunks"):  # an isinstance would import DCP here, too
            entries[key] = _tensor(key, cast("TensorStorageMetadata", entry), found[key])
        elif None in found[key]:
            entries[key] = found[key][None]
        else:
            raise CorruptCheckpointError(f"its metadata does not say where {key} lies")
    items = [place for places in found.values() for place in places.values()]
    paths = metadata.planner_data or {}  # None if a planner has flattened nothing
    return Index(metadata, entries, items, paths, nested(entries, paths))


def _place(key: str, offset: tuple[int, ...] | None, info: _StorageInfo) -> Place:
    name = info.relative_path
    if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
        raise CorruptCheckpointError(
            f"its metadata has {key} in a file {name!r}, which is not one of a folder"
        )
    if info.transform_descriptors:
        raise CorruptCheckpointError(
            f"{key} is stored transformed by {', '.join(info.transform_descriptors)}: only the extension that"
            " wrote it can read it; load it with torch.distributed.checkpoint"
        )
    entry = f"{key} at {list(offset)}" if offset and any(offset) else key
    return Place(name, info.offset, info.length, entry)


def _tensor(
    key: str, entry: TensorStorageMetadata, found: Mapping[tuple[int, ...] | None, Place]
) -> TensorEntry:
    dtype = entry.properties.dtype
    boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    if problem := cover_problem(entry.size, boxes):
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
    return TensorEntry(key, dtype, tuple(entry.size), chunks)


def cover_problem(size: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Return why boxes within a tensor are not all of it, each element once; None if they are."""
    total = sum(prod(sizes) for _, sizes in boxes)
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


def nested(entries: Mapping[str, Any], paths: Mapping[str, tuple[Any, ...]]) -> dict[Any, Any]:
    """Return entries by flattened key as the dicts and lists that they were.

    Raises:
        CorruptCheckpointError: a path leads through a value, or into a list far behind its end.
    """
    root: dict[Any, Any] = {}
    lists: dict[int, dict[Any, Any]] = {}  # by identity: they become lists at the end
    for key, value in entries.items():
        path = paths.get(key, (key,))
        if len(path) > _DEEPEST:
            raise CorruptCheckpointError(f"its entry {path[0]} lies {len(path)} containers deep")
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
