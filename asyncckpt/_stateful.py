"""Objects that save themselves by `state_dict` and load by `load_state_dict`, and the containers around."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# What a state is walked through: objects are found in these, and in their subclasses.
CONTAINERS = (dict, list, tuple)


def is_stateful(value: object) -> bool:
    """Whether `value` has a state dict and takes one back."""
    return _is_stateful_type(type(value))


def _is_stateful_type(kind: type) -> bool:
    return callable(getattr(kind, "state_dict", None)) and callable(getattr(kind, "load_state_dict", None))


def is_plain(value: object) -> bool:
    """Whether `value` holds neither tensors nor stateful objects in its dicts, lists and tuples."""
    pending: list[Any] = [value]
    seen: set[int] = set()
    passed: set[type] = set()
    while pending:
        item = pending.pop()
        kind = type(item)
        if kind in passed or id(item) in seen:
            continue
        if issubclass(kind, torch.Tensor) or _is_stateful_type(kind):
            return False
        if issubclass(kind, CONTAINERS):
            seen.add(id(item))
            pending.extend(item.values() if isinstance(item, dict) else item)
        else:
            passed.add(kind)
    return True


def stateful_objects(state: Any) -> list[Any]:
    """Return the stateful objects in the dicts, lists and tuples of `state`."""
    found: list[Any] = []
    pending: list[Any] = [state]
    seen: set[int] = set()
    while pending:
        item = pending.pop()
        if is_stateful(item):
            found.append(item)
        elif isinstance(item, CONTAINERS) and id(item) not in seen:
            seen.add(id(item))
            pending.extend(item.values() if isinstance(item, dict) else item)
    return found


def _state_dict(value: Any) -> Any:
    return value.state_dict()


def collect(
    state: Any, objects: list[Any] | None = None, state_dict: Callable[[Any], Any] = _state_dict
) -> Any:
    """Return `state` with each stateful object in its dicts, lists and tuples replaced by its state dict.

    Containers that hold none are passed on as they are, so what they share stays shared; others are copied,
    in their own type.

    Args:
        state: the state.
        objects: the stateful objects are appended to it.
        state_dict: returns the state dict of such an object.
    """
    return _collect(state, {}, set(), [] if objects is None else objects, state_dict)


def _collect(
    value: Any,
    done: dict[int, Any],
    passed: set[type],
    objects: list[Any],
    state_dict: Callable[[Any], Any],
) -> Any:
    if is_stateful(value):
        objects.append(value)
        return state_dict(value)
    if not isinstance(value, CONTAINERS):
        passed.add(type(value))
        return value
    if id(value) in done:
        return done[id(value)]
    done[id(value)] = value  # a cycle ends here
    changed = {}
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        # Most entries of a large state are tensors: pass them by without a call.
        if (
            type(item) not in passed
            and (new := _collect(item, done, passed, objects, state_dict)) is not item
        ):
            changed[key] = new
    if changed and isinstance(value, tuple):
        done[id(value)] = remake(value, (changed.get(index, item) for index, item in enumerate(value)))
    elif changed:
        copied: Any = copy.copy(value)
        for key, item in changed.items():
            copied[key] = item
        done[id(value)] = copied
    return done[id(value)]


def remake(old: tuple[Any, ...], items: Iterable[Any]) -> tuple[Any, ...]:
    """Return a tuple of the type of `old`, with its attributes, that holds `items`."""
    items = list(items)
    try:
        made = tuple.__new__(type(old), items)
    except TypeError:  # a type made in C, which is called with an iterable
        return type(old)(items)
    getattr(made, "__dict__", {}).update(getattr(old, "__dict__", {}))
    return made
