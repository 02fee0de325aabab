"""Match the entries of a folder with a live state: DCP keeps their keys as strings, and no empty dicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._loading.folder_index import TensorEntry
from asyncckpt._loading.item_run import Place
from asyncckpt._loading.restore_plan import Change
from asyncckpt._loading.undo import hold_container
from asyncckpt._stateful import CONTAINERS, is_stateful, remake

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Value = Callable[[TensorEntry | Place], Any]


class Nothing:
    """Stands for an entry of the checkpoint that the state does not have, and that is not read."""


NOTHING = Nothing()


def matched(live: Any, node: Any, value: Value, is_whole: Callable[[Any], bool]) -> Any:
    """Return what a folder has for a live entry, with the keys that the live containers have.

    Args:
        live: an entry of the state.
        node: what the folder has in its place, of `nested`: a TensorEntry, a Place, or a container of them.
        value: returns what is in an entry that is not read into a live tensor.
        is_whole: whether a live entry is replaced as a whole.

    Returns:
        Values, a TensorEntry in place of a live tensor, and containers of those.
    """
    if isinstance(node, TensorEntry):
        return node if isinstance(live, torch.Tensor) else value(node)
    if isinstance(node, Place):
        return value(node)
    if is_whole(live):
        return _whole(live, node, value)
    if isinstance(live, dict):
        return _matched_dict(live, node, value, is_whole)
    if isinstance(live, list) and isinstance(node, list):
        return _matched_list(live, node, value, is_whole)
    return {}  # of another kind, as the plan will say


def _matched_dict(
    live: dict[Any, Any], node: Any, value: Value, is_whole: Callable[[Any], bool]
) -> dict[Any, Any]:
    keys = _by_text(live)
    found: dict[Any, Any] = {}
    for key, item in _entries(node):
        if key in keys:
            found[keys[key]] = matched(live[keys[key]], item, value, is_whole)
        else:
            found[key] = item if isinstance(item, TensorEntry) else NOTHING
    return _with_hollow(found, live)


def _matched_list(
    live: list[Any], node: list[Any], value: Value, is_whole: Callable[[Any], bool]
) -> list[Any]:
    found: list[Any] = []
    for at, one in enumerate(live):
        item = node[at] if at < len(node) else None
        if item is None and _is_hollow(one):
            found.append(one)
        elif at < len(node):
            found.append({} if item is None else matched(one, item, value, is_whole))
        else:
            break
    return found + [NOTHING] * (len(node) - len(live))


def _whole(live: Any, node: Any, value: Value) -> Any:
    """Return everything in a node; its keys are those of `live` where that has them."""
    if node is None:
        return {}
    if isinstance(node, (TensorEntry, Place)):
        return value(node)
    if isinstance(node, list):
        items = live if isinstance(live, list) else []
        return [_whole(items[at] if at < len(items) else None, item, value) for at, item in enumerate(node)]
    lives = live if isinstance(live, dict) else {}
    keys = _by_text(lives)
    found = [(keys.get(text, text), item) for text, item in _entries(node)]
    return _with_hollow({key: _whole(lives.get(key), item, value) for key, item in found}, lives)


def _by_text(live: dict[Any, Any]) -> dict[str, Any]:
    return {str(key): key for key in live}


def _entries(node: Any) -> Iterable[tuple[str, Any]]:
    """Yield the entries of a container by the texts of their keys; whole numbers make a list of a dict."""
    if isinstance(node, list):
        return [(str(at), item) for at, item in enumerate(node) if item is not None]
    return [(str(key), item) for key, item in node.items()]


def _with_hollow(found: dict[Any, Any], live: dict[Any, Any]) -> dict[Any, Any]:
    """Add the live entries that DCP would not have saved."""
    return found | {key: item for key, item in live.items() if key not in found and _is_hollow(item)}


def _is_hollow(live: Any) -> bool:
    """Whether there is nothing in it that DCP would save: empty dicts only."""
    if isinstance(live, dict):
        return all(map(_is_hollow, live.values()))
    return isinstance(live, list) and bool(live) and all(map(_is_hollow, live))


def carry_over(live: Any, collected: Any) -> Change:
    """Return the change that puts values into live containers of which the collected state has copies.

    Args:
        live: the state with its objects.
        collected: the state with state dicts in their places, into which values will have been put.
    """
    containers = [one for one, _ in copied(live, collected) if not isinstance(one, tuple)]
    return Change(
        "state",
        lambda: [step for container in containers for step in hold_container(container)],
        lambda: _carried_over(live, collected),
    )


def copied(live: Any, collected: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the containers of the state that were copied, as they hold objects, each with its copy."""
    if live is not collected and isinstance(live, CONTAINERS) and not is_stateful(live):
        yield live, collected
        for key, item in _items(live):
            yield from copied(item, collected[key])


def _carried_over(live: Any, collected: Any) -> Any:
    """Put values into live containers; returns what an entry becomes."""
    if live is collected or is_stateful(live) or isinstance(live, torch.Tensor):
        return live
    if not isinstance(live, CONTAINERS):
        return collected
    new = {key: _carried_over(item, collected[key]) for key, item in _items(live)}
    changed = {key: item for key, item in _items(live) if new[key] is not item}
    if changed and isinstance(live, tuple):
        return remake(live, new.values())
    for key in changed:
        live[key] = new[key]  # type: ignore[index] # no tuple
    return live


def _items(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))
