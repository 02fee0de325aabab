"""Objects that save themselves by `state_dict` and load by `load_state_dict`."""

from __future__ import annotations

import copy
from typing import Any


def is_stateful(value: object) -> bool:
    """Whether `value` has a state dict and takes one back."""
    return _is_stateful_type(type(value))


def collect(state: Any) -> Any:
    """Return `state` with each stateful object in its dicts and lists replaced by its state dict.

    Containers that hold none are passed on as they are, so what they share stays shared; others are copied,
    in their own type.
    """
    return _collect(state, {}, {})


def _collect(value: Any, done: dict[int, Any], passed: dict[type, bool]) -> Any:
    if is_stateful(value):
        return value.state_dict()
    if not isinstance(value, (dict, list)):
        return value
    if id(value) in done:
        return done[id(value)]
    done[id(value)] = value  # a cycle ends here
    changed = {}
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        # Most entries of a large state are tensors: pass them by without a call.
        kind = type(item)
        if (by := passed.get(kind)) is None:
            by = passed[kind] = not (_is_stateful_type(kind) or issubclass(kind, (dict, list)))
        if not by:
            new = _collect(item, done, passed)
            if new is not item:
                changed[key] = new
    if changed:
        value = done[id(value)] = copy.copy(value)
        for key, new in changed.items():
            value[key] = new
    return value


def _is_stateful_type(kind: type) -> bool:
    return callable(getattr(kind, "state_dict", None)) and callable(getattr(kind, "load_state_dict", None))
