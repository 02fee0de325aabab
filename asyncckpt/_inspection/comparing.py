"""Compare what two pickles hold: which entries there are, of which kind, and which of them share memory.

Part of the child process: only the standard library.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any

from asyncckpt._inspection.inert import (
    PARAMETER,
    SCALARS,
    Attribute,
    Inert,
    Storage,
    Tensor,
    children,
    dtype_name,
    is_in_json,
    is_leaf,
    is_name,
)
from asyncckpt._inspection.texts import key_text, short

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from asyncckpt._inspection.inert import Path

# Of longer lists only the items that differ are shown.
_SHOWN_WHOLE = 8
_KEY_WIDTH = 10_000
_TEXT_WIDTH = 200
_ABSENT = object()
_HASHED = SCALARS - {bytearray} | {Attribute}
_KINDS: dict[Any, str] = {OrderedDict: "dict", Storage: "storage", type(None): "None"}


def compare(a: Any, b: Any, *, flattened: bool = False) -> dict[str, Any]:
    """Compare two states.

    An OrderedDict is a dict here. Where tensors were, their strides, and whether they require gradients does
    not count. NaN is equal to NaN.

    Args:
        a: the one.
        b: the other.
        flattened: whether one of them is of a folder. DCP, which flattens states, saves the keys of dicts as
            texts, tensors of any class as plain ones that share no memory, and no empty dicts: all that does
            not count, either.

    Returns:
        "differences" and "sharing" as `asyncckpt diff --json` prints them, and "pairs" of tensors of one
        shape, whose values are to be compared, as [path, A, B].
    """
    comparison = _Comparison(flattened=flattened)
    comparison.enter((), a, b)
    views = [] if flattened else comparison.views
    sharing = [*_torn(views, "A"), *_torn([(path, there, here) for path, here, there in views], "B")]
    return {"differences": comparison.differences, "pairs": comparison.pairs, "sharing": sharing}


class _Comparison:
    """Compares entry by entry; each pair of containers once."""

    def __init__(self, *, flattened: bool) -> None:
        self.flattened = flattened
        self.differences: list[dict[str, Any]] = []
        self.pairs: list[Any] = []
        self.views: list[tuple[Path, Storage, Storage]] = []
        self._met: set[tuple[int, int]] = set()

    def enter(self, path: Path, a: Any, b: Any) -> None:
        """Compare two entries and what is in them."""
        if not self._has_more(path, a, b) or (id(a), id(b)) in self._met:
            return
        self._met.add((id(a), id(b)))
        rest = dict(_identified(b, flattened=self.flattened))
        for identity, (key, part) in _identified(a, flattened=self.flattened):
            self.enter((*path, key), part, rest.pop(identity, (None, _ABSENT))[1])
        for key, part in rest.values():
            self.enter((*path, key), _ABSENT, part)

    def _has_more(self, path: Path, a: Any, b: Any) -> bool:
        """Compare two entries; returns whether what is in them is to be compared, too."""
        if a is _ABSENT or b is _ABSENT:
            if not (self.flattened and _is_empty(b if a is _ABSENT else a)):
                self._note(path, "only in B" if a is _ABSENT else "only in A", a, b)
            return False
        kind, other_kind = _kind_of(a), _kind_of(b)
        if type(a) is type(b) and isinstance(a, (Tensor, Storage)):
            self._tensors(path, _whole(a), _whole(b))
            return isinstance(a, Tensor) and (a.state is not None or b.state is not None)
        if kind != other_kind:
            is_plain = type(a) in SCALARS and type(b) in SCALARS
            self._note(path, *(("value", a, b) if is_plain else ("kind", kind, other_kind)))
        elif not (is_leaf(a) and is_leaf(b)):
            return True
        elif not _same(a, b):
            if kind in {"list", "tuple"} and max(len(a), len(b)) > _SHOWN_WHOLE:
                return True
            self._note(path, "value", a, b)
        return False

    def _tensors(self, path: Path, a: Tensor, b: Tensor) -> None:
        if a.numel and b.numel:
            self.views.append((path, a.storage, b.storage))
        if a.kind != b.kind and not self.flattened:
            self._note(path, "kind", _kind_of(a), _kind_of(b))
        if dtype_name(a) != dtype_name(b):
            self._note(path, "dtype", dtype_name(a), dtype_name(b))
        if a.shape != b.shape:
            self._note(path, "shape", list(a.shape), list(b.shape))
        else:
            self.pairs.append([json_path(path), json_tensor(a), json_tensor(b)])

    def _note(self, path: Path, what: str, a: Any, b: Any) -> None:
        sides = {name: json_value(side) for name, side in (("a", a), ("b", b)) if side is not _ABSENT}
        self.differences.append({"path": json_path(path), "what": what, **sides})


def json_path(path: Path) -> list[Any]:
    """Return the keys of a path; those that JSON does not have, as text."""
    return [key if isinstance(key, str) or is_in_json(key) else key_text(key) for key in path]


def json_value(node: Any) -> dict[str, Any]:
    """Return {"value": …} for what JSON has, and {"text": …}, shortened, for what it does not."""
    is_plain = all(map(is_in_json, node)) if type(node) is list else is_in_json(node)
    return {"value": node} if is_plain else {"text": short(node, _TEXT_WIDTH)}


def json_tensor(tensor: Tensor) -> list[Any]:
    """Return the arguments of a Tensor without its attributes."""
    return list(tensor._replace(state=None))


def _torn(views: Iterable[tuple[Path, Storage, Storage]], where: str) -> Iterator[dict[str, Any]]:
    """Yield the groups of entries that have one storage here, and several there."""
    groups: defaultdict[str, list[tuple[Path, str]]] = defaultdict(list)
    for path, here, there in views:
        groups[here.key].append((path, there.key))
    for group in groups.values():
        if len({there for _, there in group}) > 1:
            yield {"shared_in": where, "paths": [json_path(path) for path, _ in group]}


def _kind_of(node: Any) -> str:
    """Return what something is: `dict`, `tensor`, or the name of a class."""
    if isinstance(node, Tensor):
        return {"torch.Tensor": "tensor", PARAMETER: "parameter"}.get(node.kind, node.kind)
    if isinstance(node, Inert):
        return node.name
    return "name" if is_name(node) else _KINDS.get(type(node)) or type(node).__name__


def _is_empty(node: Any) -> bool:
    """Whether something is a dict in which there is nothing but such dicts."""
    return isinstance(node, dict) and all(map(_is_empty, node.values()))


def _identified(node: Any, *, flattened: bool) -> Iterator[tuple[Any, tuple[Any, Any]]]:
    """Yield what is in a node by what is equal for the same key in two files, and for no others.

    True and 1 are not, unlike in Python. Keys that are no plain values are identified by their texts, and
    those of the same text by their order. All keys of dicts are, if one of the states was flattened.
    """
    as_texts = flattened and isinstance(node, dict)
    texts: Counter[str] = Counter()
    for key, part in children(node):
        if type(key) in _HASHED and not as_texts:
            yield (type(key), key), (key, part)
        else:
            text = str(key) if type(key) in SCALARS else short(key, _KEY_WIDTH)
            texts[text] += 1
            yield (text, texts[text]), (key, part)


def _whole(node: Tensor | Storage) -> Tensor:
    return node if isinstance(node, Tensor) else Tensor(node, None, 0, (node.numel,), (1,))


def _same(a: Any, b: Any) -> bool:
    """Compare two leaves of one kind."""
    kind = type(a)
    if kind in {list, tuple}:
        return len(a) == len(b) and all(
            type(one) is type(other) and _same(one, other) for one, other in zip(a, b, strict=True)
        )
    if kind in {float, complex}:
        return bool(a == b) or repr(a) == repr(b)  # NaN
    if kind in {set, frozenset}:
        return sorted(map(repr, a)) == sorted(map(repr, b))
    return short(a, _KEY_WIDTH) == short(b, _KEY_WIDTH) if is_name(a) else bool(a == b)
