"""Which entries of a state torch.load refuses by default, with `weights_only=True`."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.serialization import get_safe_globals

from asyncckpt._inspection.unsafe import refused_globals
from asyncckpt._outline.machine import outline
from asyncckpt._outline.nodes import (
    SCALARS,
    Attribute,
    GlobalOutline,
    KeyOutline,
    ObjectOutline,
    StorageOutline,
    TensorOutline,
)
from asyncckpt._outline.texts import short
from asyncckpt._outline.walk import children
from asyncckpt._snapshot.culprit import subscript
from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from asyncckpt._outline.machine import Outline
    from asyncckpt._snapshot.frozen import FrozenState

# Finds each GLOBAL of a pickle of protocol 2, and a few texts that only look like one.
_GLOBAL = re.compile(rb"c([A-Za-z_][\w.]*)\n([A-Za-z_][\w.]*)\n")
_LEAVES = frozenset({*SCALARS, GlobalOutline, StorageOutline, bytearray})
_PLAIN_KEYS = frozenset({*SCALARS, Attribute})
_HOLD_ITEMS = frozenset({"collections.Counter"})  # of the classes that the outline tells as objects
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
        told = ", ".join(paths[:_SHOWN_PATHS]) + (f" and {more:,} more" if more > 0 else "")
        return f"{told} ({', '.join(self.names)})"


@dataclass(slots=True)
class WeightsOnlyCheck:
    """Tells which entries of one state after another will be refused, once for each kind of object."""

    _looked_at: int = field(default=0, init=False)
    _told: set[str] = field(default_factory=set, init=False)

    def warning(self, frozen: FrozenState, kinds: Collection[Any]) -> str | None:
        """Return what to warn of; None if no kind of object has come that is refused.

        Args:
            frozen: the state.
            kinds: what `Freezer.kinds` has; nothing is looked at until there are more of them.
        """
        if len(kinds) == self._looked_at:
            return None
        self._looked_at = len(kinds)
        names = {f"{module.decode()}.{name.decode()}" for module, name in _GLOBAL.findall(frozen.pickled)}
        foreign = foreign_names(sorted(names))
        try:
            refused = refused_entries(outline(frozen.pickled), kinds) if foreign else {}
        except CorruptCheckpointError:  # the pickle is too large for an outline
            refused = {"": Refused(dict.fromkeys(refused_globals(foreign)), {"state": None})}
        news = {name: entries for name, entries in refused.items() if name not in self._told}
        self._told.update(news)
        if not news:
            return None
        return (
            f"weights_only=True, the default of load and restore, will refuse {listing(news)}; load with"
            " weights_only=False, or save tensors and plain numbers instead, or allow these names with"
            " torch.serialization.add_safe_globals"
        )


def foreign_names(names: Sequence[str]) -> list[str]:
    """Return which of these names torch does not allow by itself, though the user may have allowed them."""
    refused = set(refused_globals(names))
    allowed = {f[1] if isinstance(f, tuple) else _name(f) for f in get_safe_globals()}
    return [name for name in names if name in refused or name in allowed]


def refused_entries(told: Outline, kinds: Iterable[Any] = ()) -> dict[str, Refused]:
    """Return which entries of a pickle `weights_only=True` refuses, by the class or function of the entry.

    Args:
        told: the outline of the pickle.
        kinds: classes of the live objects, if they are known. Objects whose base class the pickle names are
            only rebuilt if their own class is allowed as well: numpy's dtypes.
    """
    refused = set(refused_globals(told.globals))
    implied = _implied(told.globals, kinds)
    found: dict[str, Refused] = {}
    first: dict[str, str] = {}  # path of an entry -> the name it is refused for
    for path, names in _refused_nodes(told.root, refused, implied):
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


def _name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _refused_nodes(
    root: Any, refused: set[str], implied: dict[str, list[str]]
) -> Iterator[tuple[str, list[str]]]:
    """Yield, for each refused node, the path of the outermost one that holds it, and what is refused."""
    seen: set[int] = set()
    pending: list[tuple[Any, Any, str | None]] = [((), root, None)]  # (way to it, node, path of the holder)
    while pending:
        way, node, holder = pending.pop()
        node = node.value if type(node) is KeyOutline else node
        names = _names_in(node, refused, implied)
        if names:
            holder = _path(way) if holder is None else holder
            yield holder, names
        if type(node) in _LEAVES or id(node) in seen:
            continue
        seen.add(id(node))
        parts: list[tuple[Any, Any, str | None]] = []
        for key, value in children(node):
            if type(node) is ObjectOutline and value is node.args:  # of a call: an entry is what it returns
                parts.extend((way, argument, holder) for argument in node.args)
                continue
            if type(key) not in _PLAIN_KEYS:
                parts.append(((way, key), key, holder))
            parts.append(((way, key), value, holder))
        pending.extend(reversed(parts))


def _names_in(node: Any, refused: set[str], implied: dict[str, list[str]]) -> list[str]:
    """Return what is refused in a node, not counting what it holds."""
    kind = type(node)
    if kind is ObjectOutline:
        if node.items or (node.entries and node.name not in _HOLD_ITEMS):
            return [node.name, "whose items cannot be allowed"]
        names = [node.name, *(() if node.state is None else implied.get(node.name, ()))]
    elif kind is GlobalOutline:
        names = [node.name]
    elif kind is TensorOutline:
        names = [node.kind]
    elif kind is frozenset:
        names = ["builtins.frozenset"]
    elif kind is bytes and not node:
        names = ["builtins.bytes"]
    else:
        return []
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
