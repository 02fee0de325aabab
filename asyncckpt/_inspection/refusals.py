"""What in a state torch.load refuses by default, with `weights_only=True`, and where in the state it is."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch._weights_only_unpickler import _get_allowed_globals, _get_user_allowed_globals

from asyncckpt._inspection.inert import SCALARS, Attribute, Inert, Tensor, children, is_name, name_of
from asyncckpt._inspection.texts import short
from asyncckpt._snapshot.culprit import subscript

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from asyncckpt._inspection.inert import Pickled

_HOLD_ITEMS = frozenset({"collections.Counter"})  # the only class that torch lets set items
_PLAIN_KEYS = frozenset({*SCALARS, Attribute})
_SHOWN_KINDS = 10
_SHOWN_PATHS = 3
_LONGEST_PATH = 200


@dataclass(slots=True)
class Refused:
    """The entries of a state that are refused for the same class or function.

    Attributes:
        names: that class or function first, then what else is refused in the entries.
        paths: of the entries, such as `state["best"]`.
    """

    names: dict[str, None] = field(default_factory=dict)
    paths: dict[str, None] = field(default_factory=dict)

    def __str__(self) -> str:
        paths, more = list(self.paths), len(self.paths) - _SHOWN_PATHS
        shown = ", ".join(paths[:_SHOWN_PATHS]) + (f" and {more:,} more" if more > 0 else "")
        return f"{shown} ({', '.join(self.names)})"


def refused_globals(names: Iterable[str]) -> list[str]:
    """Return which names of classes, functions and constants `torch.load(weights_only=True)` refuses."""
    allowed = _get_user_allowed_globals()
    return [name for name in foreign_globals(names) if name not in allowed]


def foreign_globals(names: Iterable[str]) -> list[str]:
    """Return which of these names torch does not allow by itself, though the user may have allowed them."""
    allowed = _get_allowed_globals()
    return [name for name in names if name not in allowed]


def refused_entries(pickled: Pickled, kinds: Iterable[Any] = ()) -> dict[str, Refused]:
    """Return which entries of a state `weights_only=True` refuses, by the class or function of the entry.

    Args:
        pickled: the state.
        kinds: classes of the live objects, if they are known. Objects whose base class the pickle names are
            only rebuilt if their own class is allowed as well: numpy's dtypes.
    """
    refused = set(refused_globals(pickled.globals))
    implied = _implied(pickled.globals, kinds)
    found: dict[str, Refused] = {}
    first: dict[str, str] = {}  # path of an entry -> the name it is refused for
    for path, names in _refused_nodes(pickled.root, refused, implied):
        entries = found.setdefault(first.setdefault(path, names[0]), Refused())
        entries.names.update(dict.fromkeys(names))
        entries.paths[path] = None
    # What no entry is made by is an argument of what rebuilds one, such as a class of tensors.
    left = refused.difference(*(entries.names for entries in found.values()))
    found.update({name: Refused({name: None}, {"state": None}) for name in sorted(left)})
    return found


def listing(refused: Mapping[str, Refused]) -> str:
    """Return entries and what is refused in them as a text, shortened if there are many."""
    parts, more = [str(entries) for entries in refused.values()], len(refused) - _SHOWN_KINDS
    return "; ".join(parts[:_SHOWN_KINDS]) + (f"; and {more} more kinds" if more > 0 else "")


def _implied(named: Collection[str], kinds: Iterable[Any]) -> dict[str, list[str]]:
    """Return, for each class that the pickle names, the subclasses of it that are refused as well."""
    result: defaultdict[str, list[str]] = defaultdict(list)
    for kind in kinds:
        if isinstance(kind, type) and _name(kind) not in named:
            for base in kind.__mro__[1:]:
                if _name(base) in named and refused_globals([_name(kind)]):
                    result[_name(base)].append(_name(kind))
    return {base: sorted(names) for base, names in result.items()}


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _refused_nodes(
    root: Any, refused: set[str], implied: Mapping[str, list[str]]
) -> Iterator[tuple[str, list[str]]]:
    """Yield, for each refused node, the path of the outermost one that holds it, and what is refused."""
    seen: set[int] = set()
    pending: list[tuple[Any, Any, str | None]] = [((), root, None)]  # (way to it, node, path of the holder)
    while pending:
        way, node, holder = pending.pop()
        names = _names_in(node, refused, implied)
        if names:
            holder = _path(way) if holder is None else holder
            yield holder, names
        if type(node) in SCALARS or id(node) in seen:
            continue
        seen.add(id(node))
        parts: list[tuple[Any, Any, str | None]] = []
        for key, value in children(node):
            if isinstance(node, Inert) and value is node.args:  # of a call: an entry is what it returns
                parts.extend((way, argument, holder) for argument in node.args)
                continue
            if type(key) not in _PLAIN_KEYS:
                parts.append(((way, key), key, holder))
            parts.append(((way, key), value, holder))
        pending.extend(reversed(parts))


def _names_in(node: Any, refused: set[str], implied: Mapping[str, list[str]]) -> list[str]:
    """Return what is refused in a node, not counting what it holds."""
    names = []
    if isinstance(node, Inert):
        if node.items or (node.entries and node.name not in _HOLD_ITEMS):
            return [node.name, "whose items cannot be allowed"]
        names = [node.name, *(() if node.state is None else implied.get(node.name, ()))]
    elif is_name(node):
        names = [name_of(node)]
    elif isinstance(node, Tensor):
        names = [node.kind]
    elif type(node) is frozenset:
        names = ["builtins.frozenset"]
    elif type(node) is bytes and not node:
        names = ["builtins.bytes"]
    return [name for name in names if name in refused or name in implied.get(names[0], ())]


def _path(way: Any) -> str:
    """Return the text of a way: a pair of the way to what holds it and the last key."""
    keys = []
    while way:
        way, key = way
        keys.append(key)
    text = "state" + "".join(map(_step, reversed(keys)))
    half = _LONGEST_PATH // 2
    return text if len(text) <= _LONGEST_PATH else f"{text[:half]}…{text[-half:]}"


def _step(key: Any) -> str:
    if type(key) is Attribute:
        return f".{key}"
    return subscript(key) if type(key) in SCALARS else f"[{short(key)}]"
