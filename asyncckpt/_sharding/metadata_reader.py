"""Make DCP's metadata of a pickle, of which every part is checked and nothing is run.

It imports `torch.distributed.checkpoint`, which takes a second: import it where it is needed.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from asyncckpt._inspection.inert import Inert, is_name, name_of, read_pickle
from asyncckpt._sharding.opcodes import check_opcodes
from asyncckpt._snapshot.collector import no_collections

_DCP = "torch.distributed.checkpoint.metadata."
_OLD = "torch.distributed._shard.sharded_tensor.metadata."  # of the properties, up to torch 2.3
_PROPERTIES = (_DCP + "TensorProperties", _OLD + "TensorProperties")
_FORMATS = (_DCP + "_MEM_FORMAT_ENCODING", _OLD + "MEM_FORMAT_ENCODING")
_LAYOUT, _SIZE, _GETATTR = "torch.serialization._get_layout", "torch.Size", "builtins.getattr"
_STORAGE = "torch.distributed.checkpoint.filesystem._StorageInfo"
_KNOWN = {
    *(_DCP + kind.__name__ for kind in (BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex)),
    *(_DCP + kind.__name__ for kind in (StorageMeta, TensorStorageMetadata)),
    *_PROPERTIES, *_FORMATS, _LAYOUT, _SIZE, _GETATTR, _STORAGE, "collections.OrderedDict",
    *(f"pathlib{part}.{kind}Path" for part in ("", "._local") for kind in ("Posix", "Windows", "PurePosix")),
}  # fmt: skip
_MAX_COUNT = 1 << 63
_MAX_DIMS = 64

T = TypeVar("T")


class UnknownNamesError(ValueError):
    """The pickle names what no metadata of DCP has; the message lists it."""


def read_metadata(data: bytes) -> Metadata:
    """Return the metadata in a pickle.

    Raises:
        UnknownNamesError: it has classes or functions that do not belong there.
        ValueError: it is damaged, or no metadata.
    """
    check_opcodes(data)
    with no_collections():
        try:
            pickled = read_pickle(data)
        except Exception as error:
            raise ValueError(f"it does not unpickle ({type(error).__name__})") from error
        if unknown := [name for name in pickled.globals if name not in _KNOWN and _dtype(name) is None]:
            raise UnknownNamesError(", ".join(unknown))
        return _metadata(pickled.root)


def _metadata(node: Any) -> Metadata:
    values = _values(node, _DCP + "Metadata")
    entries = {_text(key): _entry(entry) for key, entry in _dict(values.get("state_dict_metadata")).items()}
    where = {_index(key): _place(place) for key, place in _dict(values.get("storage_data")).items()}
    if len(where) != len(values["storage_data"]):
        raise ValueError("an item in it has two places")
    paths = values.get("planner_data")
    more: dict[str, Any] = {}
    if "version" in {field.name for field in fields(Metadata)}:  # from torch 2.9 on
        version = values.get("version")
        more["version"] = None if version is None else _text(version)
    return Metadata(
        entries,
        None if paths is None else {_text(key): _path(path) for key, path in _dict(paths).items()},
        where,
        StorageMeta(),  # what it says of the writer is of no use to a reader
        **more,
    )


def _entry(node: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(node, Inert) and node.name == _DCP + "BytesStorageMetadata":
        return BytesStorageMetadata()
    values = _values(node, _DCP + "TensorStorageMetadata")
    size = _size(values.get("size"))
    chunks = [_chunk(chunk, size) for chunk in _typed(values.get("chunks"), list)]
    return TensorStorageMetadata(_properties(values.get("properties")), size, chunks)


def _chunk(node: Any, whole: torch.Size) -> ChunkStorageMetadata:
    values = _values(node, _DCP + "ChunkStorageMetadata")
    offsets, sizes = _size(values.get("offsets")), _size(values.get("sizes"))
    if not len(offsets) == len(sizes) == len(whole):
        raise ValueError("a chunk in it has other dimensions than its tensor")
    if any(offset + size > limit for offset, size, limit in zip(offsets, sizes, whole, strict=True)):
        raise ValueError("a chunk in it lies outside of its tensor")
    return ChunkStorageMetadata(offsets, sizes)


def _properties(node: Any) -> TensorProperties:
    if not isinstance(node, Inert) or node.name not in _PROPERTIES:
        raise _unexpected(node)
    dtype, layout, requires_grad, memory_format, pinned = _typed(node.state, tuple)
    if not is_name(dtype) or (found := _dtype(name_of(dtype))) is None:
        raise _unexpected(dtype)
    if _called(layout, _LAYOUT) != ("torch.strided",):
        raise ValueError("a tensor in it is not strided")
    _called(memory_format, *_FORMATS, _GETATTR)
    # The other properties are deprecated, and no reader uses them.
    return TensorProperties(found, requires_grad=requires_grad is True, pin_memory=pinned is True)


def _index(node: Any) -> MetadataIndex:
    values = _values(node, _DCP + "MetadataIndex")
    offset = values.get("offset")
    hint = values.get("index")
    return MetadataIndex(
        _text(values.get("fqn")),
        None if offset is None else _size(offset),
        None if hint is None else _count(hint),
    )


def _place(node: Any) -> _StorageInfo:
    values = _values(node, _STORAGE)
    transforms = values.get("transform_descriptors")
    return _StorageInfo(
        _text(values.get("relative_path")),
        _count(values.get("offset")),
        _count(values.get("length")),
        None if transforms is None else [_text(name) for name in _sequence(transforms)],
    )


def _path(node: Any) -> tuple[str | int, ...]:
    if not node or not all(type(part) in {str, int} for part in _typed(node, tuple)):
        raise _unexpected(node)
    return tuple(node)


def _size(node: Any) -> torch.Size:
    (numbers,) = _called(node, _SIZE) or ((),)
    if len(_sequence(numbers)) > _MAX_DIMS:
        raise ValueError(f"a tensor in it has {len(numbers)} dimensions")
    return torch.Size([_count(number) for number in numbers])


def _dtype(name: str) -> torch.dtype | None:
    found = getattr(torch, name.removeprefix("torch."), None) if name.startswith("torch.") else None
    return found if isinstance(found, torch.dtype) else None


def _values(node: Any, name: str) -> dict[str, Any]:
    """Return the attributes of an object of a class."""
    if not isinstance(node, Inert) or node.name != name or node.args or node.items or node.entries:
        raise _unexpected(node)
    return _dict(node.state)


def _called(node: Any, *names: str) -> tuple[Any, ...]:
    """Return what something is called with."""
    if not isinstance(node, Inert) or node.name not in names or node.state is not None:
        raise _unexpected(node)
    return node.args


def _dict(node: Any) -> dict[Any, Any]:
    return _typed(node, dict)


def _text(node: Any) -> str:
    return _typed(node, str)


def _sequence(node: Any) -> list[Any]:
    return list(node) if isinstance(node, tuple) else _typed(node, list)


def _count(node: Any) -> int:
    if not 0 <= _typed(node, int) < _MAX_COUNT:
        raise ValueError("a number in it is negative or too large")
    return int(node)


def _typed(node: Any, kind: type[T]) -> T:
    if not isinstance(node, kind) or isinstance(node, bool):
        raise _unexpected(node)
    return node


def _unexpected(node: Any) -> ValueError:
    name = node.name if isinstance(node, Inert) else type(node).__name__
    return ValueError(f"a {name} is where none should be")
