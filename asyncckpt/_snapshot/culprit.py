"""Find which entry of a state does not pickle. Only runs once a save has failed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MAX_DEPTH = 50


def find_culprit(state: object, probe: Callable[[object], None]) -> str:
    """Return the path of the innermost entry that `probe` raises for, such as `state["opt"]["hook"]`."""
    path, value = "state", state
    seen: set[int] = set()
    for _ in range(_MAX_DEPTH):
        seen.add(id(value))
        found = next(((p, v) for p, v in _children(value) if id(v) not in seen and _fails(v, probe)), None)
        if found is None:
            break
        path, value = path + found[0], found[1]
    return path


def subscript(key: object) -> str:
    """Return the text that reaches the entry of a dict, such as `["opt"]`."""
    return f"[{json.dumps(key, ensure_ascii=False) if isinstance(key, str) else repr(key)}]"


def _fails(value: object, probe: Callable[[object], None]) -> bool:
    try:
        probe(value)
    except Exception:  # noqa: BLE001 - a user's __reduce__ may raise anything
        return True
    return False


def _children(value: Any) -> Iterator[tuple[str, object]]:
    """Yield the entries of a container, then an object's attributes, with the text that reaches each."""
    if isinstance(value, dict):
        yield from ((subscript(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from ((f"{{{item!r}}}", item) for item in value)
    yield from ((f".{key}", item) for key, item in dict(getattr(value, "__dict__", {})).items())
