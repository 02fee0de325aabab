"""How nodes and paths are told in a line: short, whatever their size, and without control characters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asyncckpt._outline.nodes import (
    SCALARS,
    GlobalOutline,
    KeyOutline,
    ObjectOutline,
    OrderedDictOutline,
    Repeated,
    StorageOutline,
    TensorOutline,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from asyncckpt._outline.walk import Path

_MAX_DEPTH = 4
_UNORDERED = frozenset({set, frozenset})
_SORTED = 100  # the size up to which sets of plain items are told in an order that is always the same
_MAX_BITS = 1 << 10
_LONGEST_KEY = 80
_BRACKETS: dict[Any, tuple[str, str]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    set: ("{", "}"),
    frozenset: ("{", "}"),
}


def short(node: Any, room: int = 60) -> str:
    """Return what a node is, in at most `room` characters."""
    return _short(node, 0, room)


def _short(node: Any, depth: int, room: int) -> str:
    text = "".join(_within(_pieces(node, depth, room), room))
    return text if len(text) <= room else text[: room - 1] + "…"


def path_text(path: Path) -> str:
    """Return a path with dots between its keys."""
    return ".".join(key_text(key) for key in path)


def key_text(key: Any) -> str:
    """Return a key as it is read, quoted only if it has to be, and shortened in its middle if it is long."""
    text = clean(key) if isinstance(key, str) else short(key)
    return text if len(text) <= _LONGEST_KEY else f"{text[: _LONGEST_KEY - 20]}…{text[-19:]}"


def clean(text: str) -> str:
    """Return a text that can be printed: what is not printable is escaped."""
    return text if text.isprintable() else repr(text)[1:-1]


def _within(pieces: Iterable[str], room: int) -> Iterator[str]:
    """Take pieces while there is room, and one more to show that there would be more."""
    used = 0
    for piece in pieces:
        yield piece
        used += len(piece)
        if used > room:
            return


def _pieces(node: Any, depth: int, room: int) -> Iterator[str]:
    kind = type(node)
    if depth > _MAX_DEPTH:
        yield "…"
    elif kind in _BRACKETS:
        opening, closing = _BRACKETS[kind]
        ordered = kind in _UNORDERED and len(node) <= _SORTED and all(map(_is_flat, node))
        items = sorted(node, key=lambda item: _short(item, depth + 1, room)) if ordered else node
        yield opening
        yield from _listed(((None, item) for item in items), depth, room)
        yield ",)" if kind is tuple and len(node) == 1 else closing
    elif kind in {dict, OrderedDictOutline}:
        yield "{"
        yield from _listed(_entries(node, depth, room), depth, room)
        yield "}"
    elif kind is ObjectOutline:
        yield _name(node.name) + "("
        yield from _listed(_arguments(node, depth, room), depth, room)
        yield ")"
    elif kind is KeyOutline:
        yield from _pieces(node.value, depth + 1, room)
    else:
        yield _plain(node, room)


def _is_flat(item: Any) -> bool:
    """Whether nothing in an item would have to be sorted, too: sets in sets take a hundred times as long."""
    value = item.value if type(item) is KeyOutline else item
    return type(value) in SCALARS or (type(value) is tuple and all(type(part) in SCALARS for part in value))


def _listed(items: Iterable[tuple[str | None, Any]], depth: int, room: int) -> Iterator[str]:
    for at, (label, item) in enumerate(items):
        if at:
            yield ", "
        if label:
            yield label
        yield from _pieces(item, depth + 1, room)


def _entries(entries: dict[Any, Any], depth: int, room: int) -> Iterator[tuple[str, Any]]:
    return ((_short(key, depth + 1, room) + ": ", value) for key, value in entries.items())


def _arguments(node: ObjectOutline, depth: int, room: int) -> Iterator[tuple[str | None, Any]]:
    for arg in node.args:
        yield None, arg
    named = [part for part in (node.kwargs, node.state) if type(part) is dict]
    for part in named:
        for key, value in part.items():
            name = clean(key) if type(key) is str else _short(key, depth + 1, room)
            yield name + "=", value
    if node.state is not None and type(node.state) is not dict:
        yield "state=", node.state
    for item in node.items:
        yield None, item
    yield from _entries(node.entries, depth, room)


def _plain(node: Any, room: int) -> str:
    kind = type(node)
    text = _PLAIN.get(kind)
    if text is not None:
        return text(node)
    if kind in {str, bytes, bytearray}:
        return repr(node[: room + 1])
    return repr(node)


def _integer(value: int) -> str:
    """Python refuses to print the longest ones."""
    bits = value.bit_length()
    return str(value) if bits <= _MAX_BITS else f"(integer of {bits} bits)"


def _name(name: str) -> str:
    return clean(name.removeprefix("builtins."))


_PLAIN: dict[Any, Callable[[Any], str]] = {
    int: _integer,
    TensorOutline: lambda node: f"{_name(node.kind)}({node.dtype}, {list(node.shape)})",
    StorageOutline: lambda node: f"storage({clean(node.dtype)}, {node.numel})",
    GlobalOutline: lambda node: _name(node.name),
    Repeated: lambda node: f"same as {path_text(node.path)}",
}
