"""One-line texts for the entries of a state: of bounded length, without control characters.

Also part of the child process: only the standard library.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from asyncckpt._inspection.inert import (
    Attribute,
    Inert,
    Storage,
    Tensor,
    children,
    dtype_name,
    is_name,
    name_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_DEPTH = 4
_LONGEST_KEY = 80
_MAX_BITS = 1 << 10  # of an integer that is written out
_BRACKETS: dict[Any, tuple[str, str]] = {
    **dict.fromkeys((set, frozenset, dict, OrderedDict), ("{", "}")),
    list: ("[", "]"),
    tuple: ("(", ")"),
}


def clean(text: str) -> str:
    """Return a text that can be printed: what is not printable is escaped."""
    return text if text.isprintable() else repr(text)[1:-1]


def path_text(path: Iterable[Any]) -> str:
    """Return a path with dots between its keys."""
    return ".".join(map(key_text, path))


def key_text(key: Any) -> str:
    """Return a key as it is read, quoted only if it has to be, and shortened in its middle if it is long."""
    text = clean(key) if isinstance(key, str) else short(key)
    return text if len(text) <= _LONGEST_KEY else f"{text[: _LONGEST_KEY - 20]}…{text[-19:]}"


def short(node: Any, room: int = 60) -> str:
    """Return what something is, in at most `room` characters."""
    text = ""
    for piece in _pieces(node, 0, room):
        text += piece
        if len(text) > room:
            return text[: room - 1] + "…"
    return text


def _pieces(node: Any, depth: int, room: int) -> Iterator[str]:
    kind = type(node)
    if depth > _DEPTH:
        yield "…"
    elif kind in _BRACKETS or isinstance(node, Inert):
        opening, closing = _BRACKETS.get(kind, ("(", ")"))
        yield (_plain_name(node.name) if isinstance(node, Inert) else "") + opening
        count = 0
        for label, part in _labelled(node):
            yield (", " if count else "") + label
            yield from _pieces(part, depth + 1, room)
            count += 1
        yield ",)" if kind is tuple and count == 1 else closing
    elif kind is Tensor:
        yield f"{_plain_name(node.kind)}({clean(dtype_name(node))}, {list(node.shape)})"
    elif kind is Storage:
        yield f"storage({clean(dtype_name(node))}, {node.numel})"
    elif is_name(node):
        yield _plain_name(name_of(node))
    elif kind is int and node.bit_length() > _MAX_BITS:
        yield f"(integer of {node.bit_length()} bits)"
    else:
        yield repr(node[: room + 1] if kind in {str, bytes, bytearray} else node)


def _labelled(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield what is in a container or an object, each part with the text before it."""
    is_object = isinstance(node, Inert)
    if is_object:
        yield from (("", argument) for argument in node.args)
        yield from ((f"{clean(name)}=", value) for name, value in node.kwargs.items())
    for key, part in children(node, call=False):
        if type(key) is not Attribute:
            yield "" if type(key) is int and not isinstance(node, dict) else f"{short(key)}: ", part
        elif is_object:
            yield f"{clean(key)}=", part


def _plain_name(name: str) -> str:
    return clean(name.removeprefix("builtins."))
