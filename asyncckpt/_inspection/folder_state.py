"""Put the entries of a folder together to the state that was saved.

Part of the child process: only the standard library.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from asyncckpt._inspection.inert import Storage, Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class _Node(dict[Any, Any]):
    """A container under way, told apart from dicts that are values."""


def folder_state(entries: Iterable[Sequence[Any]], values: Iterable[Any]) -> dict[Any, Any]:
    """Return the dicts and lists of a state whose entries were saved one by one.

    Args:
        entries: the path of each entry; of a tensor also the key of its storage, its dtype and its shape.
        values: of the entries that are no tensors, in order.

    Raises:
        ValueError: an entry lies within another one, or two have one path.
    """
    root, rest = _Node(), iter(values)
    for path, *tensor in entries:
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, _Node())
            if not isinstance(node, _Node):
                raise ValueError(f"the entry {path} lies within another one")  # noqa: TRY004 - of a damaged file
        if path[-1] in node:
            raise ValueError(f"the entry {path} is there twice")
        node[path[-1]] = _tensor(*tensor) if tensor else next(rest)
    return {key: _built(value) for key, value in root.items()}


def _tensor(key: str, dtype: str, shape: Sequence[int]) -> Tensor:
    stride = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return Tensor(Storage(key, "", "cpu", prod(shape)), dtype, 0, tuple(shape), tuple(stride))


def _built(value: Any) -> Any:
    """Return the dict or the list that a node stands for."""
    if not isinstance(value, _Node):
        return value
    parts = {key: _built(part) for key, part in value.items()}
    # DCP turns the keys of dicts into texts, so that numbers are places in lists.
    is_list = set(parts) == set(range(len(parts)))
    return [parts[place] for place in range(len(parts))] if is_list else parts
