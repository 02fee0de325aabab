"""Plan a restore: what does not fit between a live and a loaded state, and what is to be changed."""

from __future__ import annotations

import json
import weakref
from functools import partial
from operator import setitem
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from asyncckpt._loading.copies import Copy
from asyncckpt._loading.fitting import copy_cannot_fail, is_stock, misfit
from asyncckpt._loading.state_keys import map_state_keys, prefix_remedy
from asyncckpt._loading.undo import hold_container, hold_stateful, hold_tensor, refill
from asyncckpt._stateful import is_plain, is_stateful, remake

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from asyncckpt._loading.undo import Step

_ATOMS = (int, float, complex, str, bytes, type(None))


class Change(NamedTuple):
    """A change that may fail.

    Attributes:
        path: of the entry.
        hold: returns the steps that put the entry back; called right before `apply`.
        apply: makes the change.
    """

    path: str
    hold: Callable[[], list[Step]]
    apply: Callable[[], object]


class Plan:
    """What a restore changes, and what does not fit. Nothing is touched until the changes are applied.

    Args:
        live: the state to change.
        saved: the loaded state.
        strict: whether both must have the same entries.
        map_keys: applied to the keys of state dicts before they are matched.

    Attributes:
        changes: in the order to apply them, before any copy.
        copies: into tensors; those of a module are listed one by one.
        problems: a line for each entry that does not fit.
        doubts: the same of modules whose own loading may make it fit.
        missing, unexpected: a line for each entry that only the live state has, or only the loaded one, by
            its path; those of modules with their own loading are added when that is applied.
        hints: what makes more of it fit.
        overlaps: whether both have any entry.
        differs: whether one has an entry that the other lacks.
    """

    def __init__(
        self, live: Any, saved: Any, *, strict: bool = True, map_keys: Callable[[str], str] | None = None
    ) -> None:
        if map_keys is not None and not callable(map_keys):
            raise TypeError(f"map_keys must be a function of a key, not {map_keys!r}")
        self.changes: list[Change] = []
        self.copies: list[Copy] = []
        self.problems: list[str] = []
        self.doubts: list[str] = []
        self.missing: dict[str, str] = {}
        self.unexpected: dict[str, str] = {}
        self.hints: list[str] = []
        self.overlaps = False
        self.differs = False
        self._strict = strict
        self._map_keys = map_keys
        self._met: set[tuple[int, int]] = set()
        self._filled: dict[int, Any] = {}
        if isinstance(live, dict) and not is_stateful(live):
            self._dict(live, saved, "state")  # its keys are those of the state, plain or not
        elif not _is_unchanged(live, self._entry(live, saved, "state")):
            self.problems.append(
                f"state: a {type(live).__name__} cannot be changed in place, and the checkpoint has another"
                f" {type(saved).__name__}; make it an entry of a dict, or use load() instead"
            )
        if strict and self.differs and self.overlaps and not self.problems:
            self.hints.append("strict=False restores the entries that both have")

    def misfits(self) -> list[str]:
        """Return a line for each entry because of which nothing can be restored; none if all fits."""
        sides = [*self.missing.values(), *self.unexpected.values()] if self._strict else []
        lines = [*self.problems, *sides]
        return [*lines, *self.doubts] if lines else []

    def _entry(self, live: Any, saved: Any, path: str) -> Any:
        """Match an entry; returns what it becomes, which is `live` where that is changed in place."""
        if is_stateful(live):
            self._stateful(live, saved, path)
        elif isinstance(live, torch.Tensor):
            self._tensor(live, saved, path)
        elif self._is_plain(live):
            self.overlaps = True
            return self._plain(live, saved, path)
        elif (id(live), id(saved)) not in self._met:  # else a cycle, or shared on both sides
            self._met.add((id(live), id(saved)))
            if isinstance(live, dict):
                self._dict(live, saved, path)
            else:
                return self._sequence(live, saved, path)
        return live

    def _is_plain(self, live: Any) -> bool:
        """Whether an entry is a value that is replaced as a whole."""
        return is_plain(live)

    def _plain(self, live: Any, saved: Any, path: str) -> Any:
        """Return what a plain value becomes: `live` where that takes the content of `saved` in place."""
        if not any(isinstance(live, kind) and isinstance(saved, kind) for kind in (dict, list)):
            return saved
        if id(live) in self._filled:
            # One object in two places of the live state may be two in the loaded one.
            return live if self._filled[id(live)] is saved else saved
        self._filled[id(live)] = saved
        content: Any = dict(saved) if isinstance(saved, dict) else list(saved)
        for key, new in saved.items() if isinstance(saved, dict) else enumerate(saved):
            is_there = key in live if isinstance(live, dict) else key < len(live)
            if is_there and isinstance(new, (dict, list)):
                content[key] = self._plain(live[key], new, path)
        self.changes.append(Change(path, partial(hold_container, live), partial(refill, live, content)))
        return live

    def _tensor(self, live: torch.Tensor, saved: Any, path: str) -> None:
        if (problem := misfit(live, saved)) is not None:
            self.problems.append(f"{path}: {problem}")
            return
        self.overlaps = True
        if copy_cannot_fail(live, saved):
            self.copies.append(Copy(path, live, saved))
        else:
            copy = torch.no_grad()(partial(live.copy_, saved))
            self.changes.append(Change(path, partial(hold_tensor, live), copy))

    def _dict(self, live: dict[Any, Any], saved: Any, path: str, owner: str = "state") -> None:
        """Match a dict, or the state dict of a module, entry by entry."""
        if not isinstance(saved, dict):
            kind = "dict" if owner == "state" else "state dict"
            self.problems.append(f"{path}: a {kind} is expected, the checkpoint has a {type(saved).__name__}")
            return
        if live and all(isinstance(value, torch.Tensor) for value in live.values()):
            saved = self._mapped(live, saved, path)
        missing, unexpected = self._sides(live, saved, path, owner)
        self.missing |= missing
        self.unexpected |= unexpected
        for key, value in live.items():
            if key in saved:
                at = _at(path, key)
                self._replace(live, key, self._entry(value, saved[key], at), at)

    def _sequence(self, live: list[Any] | tuple[Any, ...], saved: Any, path: str) -> Any:
        kind = list if isinstance(live, list) else tuple
        if not isinstance(saved, kind) or len(live) != len(saved):
            there = f"one of {len(saved)}" if isinstance(saved, kind) else f"a {type(saved).__name__}"
            self.problems.append(
                f"{path}: a {kind.__name__} of {len(live)} is expected, the checkpoint has {there}"
            )
            return live
        items = [self._entry(*both, f"{path}[{at}]") for at, both in enumerate(zip(live, saved, strict=True))]
        if isinstance(live, tuple):
            return live if all(map(_is_unchanged, live, items)) else remake(live, items)
        for index, item in enumerate(items):
            self._replace(live, index, item, f"{path}[{index}]")
        return live

    def _replace(self, container: Any, key: Any, new: Any, path: str) -> None:
        old = container[key]
        if new is not old:
            put_back = partial(setitem, container, key, old)
            self.changes.append(Change(path, lambda: [put_back], partial(setitem, container, key, new)))

    def _stateful(self, live: Any, saved: Any, path: str) -> None:
        load: Callable[[], object] = partial(live.load_state_dict, saved)
        if isinstance(live, torch.nn.Module):
            if is_stock(live) or not isinstance(saved, dict):
                own = live.state_dict(keep_vars=True) if is_stock(live) else {}
                self._dict(own, saved, path, "module")
                return
            load = self._own_load(live, saved, path)
        elif is_stock(live) and (theirs := _group_sizes(saved)) != (ours := _group_sizes(vars(live))):
            there = "no parameter groups" if theirs is None else f"{theirs} parameters per group"
            self.problems.append(f"{path}: {there} in the checkpoint, {ours} in the optimizer")
        else:
            self.overlaps = True
        self.changes.append(Change(path, partial(hold_stateful, live), load))

    def _own_load(self, module: torch.nn.Module, saved: dict[Any, Any], path: str) -> Callable[[], object]:
        """Return what loads a module that has its own way to, which may rename or add keys."""
        own = module.state_dict()
        saved = self._mapped(own, saved, path)
        missing, unexpected = self._sides(own, saved, path, "module")
        for key, value in own.items():
            known = key in saved and isinstance(value, torch.Tensor) and not is_lazy(value)
            if known and (problem := misfit(value, saved[key])) is not None:
                self.doubts.append(f"{_at(path, key)}: {problem}")
        self.doubts += [*missing.values(), *unexpected.values()]
        self.overlaps |= len(missing) < len(own)
        plan = weakref.proxy(self)  # a cycle would keep the loaded state until it is collected

        def load() -> None:
            absent, extra = missing, unexpected
            if plan._strict or not (absent or extra):
                module.load_state_dict(saved)
            else:
                result = module.load_state_dict(saved, strict=False)
                if hasattr(result, "missing_keys"):  # else an override of the user's
                    absent = _missing(path, result.missing_keys)
                    extra = _unexpected(path, result.unexpected_keys, "module")
            _refuse_meta(module, saved)
            plan.missing |= absent
            plan.unexpected |= extra
            plan.overlaps |= len(absent) < len(own)

        return load

    def _sides(
        self, own: Collection[Any], saved: Collection[Any], path: str, owner: str
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Return the entries that only one side has."""
        missing = _missing(path, [key for key in own if key not in saved])
        unexpected = _unexpected(path, [key for key in saved if key not in own], owner)
        self.differs |= bool(missing or unexpected)
        return missing, unexpected

    def _mapped(self, own: dict[Any, Any], saved: dict[Any, Any], path: str) -> dict[Any, Any]:
        """Apply `map_keys` to a loaded state dict; hint at one that makes more of it fit."""
        if self._map_keys is not None:
            saved, problems = map_state_keys(saved, self._map_keys)
            self.problems += [f"{path}: {problem}" for problem in problems]
        elif own.keys() != saved.keys() and (remedy := prefix_remedy(own, saved)) is not None:
            self.hints.append(f"{path}: {remedy}")
        return saved


def _group_sizes(state: Any) -> list[int] | None:
    """Return the number of parameters of each group of an optimizer; None if there are no groups."""
    try:
        return [len(group["params"]) for group in state["param_groups"]]
    except (TypeError, KeyError, IndexError):
        return None


def some(paths: Collection[str], most: int = 10) -> str:
    """Return up to `most` of them as a text."""
    rest = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(list(paths)[:most]) + rest


def _refuse_meta(module: torch.nn.Module, content: Any) -> None:
    """Raise if a module took values into meta tensors, where torch drops them."""

    def is_meta(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.is_meta

    own = module.state_dict()
    dropped = [key for key, value in own.items() if is_meta(value) and not is_meta(content.get(key, value))]
    if dropped:
        raise ValueError(
            f"tensors on the meta device took no values: {some(dropped)}; materialize them first"
        )


def _missing(path: str, keys: Iterable[Any]) -> dict[str, str]:
    return {at: f"{at}: missing in the checkpoint" for at in (_at(path, key) for key in keys)}


def _unexpected(path: str, keys: Iterable[Any], owner: str) -> dict[str, str]:
    return {at: f"{at}: unexpected, the {owner} has no such entry" for at in (_at(path, key) for key in keys)}


def _at(path: str, key: object) -> str:
    return f"{path}[{json.dumps(key) if isinstance(key, str) else repr(key)}]"


def _is_unchanged(old: Any, new: Any) -> bool:
    """Whether a plain value need not be replaced."""
    if isinstance(old, tuple) and type(old) is type(new):
        return len(old) == len(new) and all(map(_is_unchanged, old, new))
    return old is new or (type(old) is type(new) and isinstance(old, _ATOMS) and bool(old == new))
