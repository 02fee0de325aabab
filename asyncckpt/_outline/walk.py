"""Walk over what a pickle holds, whatever it is: any depth, shared parts and cycles."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from asyncckpt._outline.nodes import (
    SCALARS,
    Attribute,
    ObjectOutline,
    OrderedDictOutline,
    Repeated,
    TensorOutline,
)
from asyncckpt._outline.texts import short
from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

# The keys that lead to a node.
Path = tuple[Any, ...]

MAX_DEPTH = 10_000
# Longer paths are shortened in the middle: the work for all of them shall not grow with the depth.
_LONGEST_PATH = 64
_SEQUENCES = frozenset({list, tuple, set, frozenset})
_COMPOSITE = frozenset({*_SEQUENCES, dict, OrderedDictOutline, ObjectOutline})


def walk(root: Any) -> Iterator[tuple[Path, Any]]:
    """Yield each leaf and the path to it, in order.

    Leaves are tensors, storages, names, scalars, empty containers, and lists, tuples and sets of scalars. An
    object of any other class is yielded before what is in it, a tensor before its attributes. What was met
    before is not entered again: in its place comes a Repeated.

    Raises:
        CorruptCheckpointError: it is nested more than MAX_DEPTH levels deep.
    """
    met: dict[int, Path] = {}
    flat: dict[int, bool] = {}
    entered: list[tuple[Path, Iterator[tuple[Any, Any]]]] = []
    here: Path = ()
    pending: Any = root
    while True:
        opened = None
        if is_leaf(pending, flat):
            yield here, pending
            if type(pending) is TensorOutline and pending.state is not None and id(pending) not in met:
                opened = children(pending)
        elif id(pending) in met:
            yield here, Repeated(met[id(pending)])
        else:
            if type(pending) is ObjectOutline:
                yield here, pending
            opened = children(pending)
        if opened is not None:
            met[id(pending)] = here
            entered.append((here, opened))
            if len(entered) > MAX_DEPTH:
                raise CorruptCheckpointError(f"its state is nested more than {MAX_DEPTH:,} levels deep")
        while entered:
            above, rest = entered[-1]
            found = next(rest, None)
            if found is not None:
                here, pending = joined(above, found[0]), found[1]
                break
            entered.pop()
        else:
            return


def joined(path: Path, key: Any) -> Path:
    """Return the path one step further, shortened in its middle if it is long."""
    if len(path) < _LONGEST_PATH:
        return (*path, key)
    half = _LONGEST_PATH // 2
    return (*path[:half], "…", *path[half + 2 :], key)


def is_leaf(node: Any, flat: dict[int, bool]) -> bool:
    """Whether nothing inside a node is worth a line of its own.

    Args:
        node: any.
        flat: remembers what is known of each sequence by its id; one dict for each walk.
    """
    kind = type(node)
    if kind not in _COMPOSITE or kind is ObjectOutline:
        return kind is not ObjectOutline
    if kind not in _SEQUENCES:
        return not node
    known = flat.get(id(node))
    if known is None:
        known = flat[id(node)] = all(type(item) in SCALARS for item in node)
    return known


def children(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what a node holds, each with the last key of its path."""
    kind = type(node)
    if kind is dict:
        return iter(node.items())
    if kind is OrderedDictOutline:
        return chain(node.items(), _attributes(node.state))
    if kind is ObjectOutline:
        return _parts(node)
    if kind is TensorOutline:
        return _attributes(node.state)
    # A set has no order, but its paths should be the same each time.
    return enumerate(sorted(node, key=short) if kind in {set, frozenset} else node)


def _parts(node: ObjectOutline) -> Iterator[tuple[Any, Any]]:
    if node.args:
        yield Attribute("args"), node.args
    if node.kwargs:
        yield Attribute("kwargs"), node.kwargs
    yield from _attributes(node.state)
    yield from enumerate(node.items)
    yield from node.entries.items()


def _attributes(state: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the attributes that a state sets: a dict, or a pair of one and of those that have slots."""
    for part in state if type(state) is tuple and len(state) == 2 else (state,):  # noqa: PLR2004
        if type(part) is dict:
            yield from ((Attribute(key) if type(key) is str else key, value) for key, value in part.items())
        elif part is not None:
            yield Attribute("state"), part
