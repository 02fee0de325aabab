"""Objects that save themselves by `state_dict` and load by `load_state_dict`."""

from __future__ import annotations

from typing import Any


def is_stateful(value: object) -> bool:
    """Whether `value` has a state dict and takes one back."""
    return _is_stateful_type(type(value))


def collect(state: Any) -> Any:
    """Return `state` with each stateful object in its dicts and lists replaced by its state dict.

    Containers that hold none are passed on as they are, so what they share stays shared.
    """
    return _collect(state, {}, {})


def _collect(value: Any, done: dict[int, Any], known: dict[type, bool]) -> Any:
    kind = type(value)
    stateful = known.get(kind)
    if stateful is None:
        stateful = known[kind] = _is_stateful_type(kind)
    if stateful:
        return value.state_dict()
    if kind is not dict and kind is not list:
        return value
    if id(value) in done:
        return done[id(value)]
    done[id(value)] = value  # a cycle ends here
    items = value.items() if kind is dict else enumerate(value)
    changed = {}
    for key, item in items:
        # Most entries of a large state are tensors: pass them by without a call.
        if known.get(type(item)) is not False or type(item) is dict or type(item) is list:
            new = _collect(item, done, known)
            if new is not item:
                changed[key] = new
    if changed:
        result = (
            {**value, **changed} if kind is dict else [changed.get(i, item) for i, item in enumerate(value)]
        )
        done[id(value)] = result
        return result
    return value


def _is_stateful_type(kind: type) -> bool:
    return callable(getattr(kind, "state_dict", None)) and callable(getattr(kind, "load_state_dict", None))
