"""A live state beside a loaded one: what fits, what does not, and what is to be changed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from operator import setitem
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from asyncckpt._loading.fitting import copy_cannot_fail, is_stock, misfit
from asyncckpt._loading.state_keys import map_state_keys, prefix_remedy
from asyncckpt._loading.stateful import is_plain, is_stateful, remake
from asyncckpt._loading.undo import refill

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_ATOMS = (int, float, complex, str, bytes, type(None))


@dataclass(slots=True)
class Load:
    """An object that is to load its state dict.

    Attributes:
        keys: how many entries a module has; 0 for other objects.
        missing, unexpected: a line for each entry of only one side, by its path.
    """

    path: str
    target: Any
    content: Any
    keys: int = 0
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)

    @property
    def taken(self) -> int:
        """The number of entries that both sides have; 1 where that is not known."""
        return self.keys - len(self.missing) if self.keys else 1

    def carry_out(self, *, strict: bool) -> None:
        """Call `load_state_dict`; hooks may change which entries are missing and unexpected."""
        if strict or not (self.missing or self.unexpected):
            self.target.load_state_dict(self.content)
            return
        result = self.target.load_state_dict(self.content, strict=False)
        if hasattr(result, "missing_keys"):  # else an override of the user's
            self.missing = missing_lines(self.path, result.missing_keys)
            self.unexpected = unexpected_lines(self.path, result.unexpected_keys, "module")


@dataclass(slots=True)
class Match:
    """What does not fit between a live and a loaded state, and what is to be done where all fits.

    Attributes:
        map_keys: applied to the keys of state dicts before they are matched.
        problems: one line for each entry that does not fit.
        doubts: the same of modules whose own loading may make it fit.
        missing, unexpected: a line for each entry that only the live state has, or only the loaded one, by
            its path.
        hints: what makes more of it fit.
        taken: the number of entries that both have, those of `loads` not counted.
        loads: objects whose loading may fail.
        modules: modules whose loading cannot fail, as every entry fits.
        tensors: (path, live tensor, its new content), which cannot fail.
        odd_tensors: the same where copying may fail.
        changes: (path, live list or dict, what changes it).
    """

    map_keys: Callable[[str], str] | None
    problems: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)
    taken: int = 0
    loads: list[Load] = field(default_factory=list)
    modules: list[Load] = field(default_factory=list)
    tensors: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    odd_tensors: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    changes: list[tuple[str, Any, Callable[[], object]]] = field(default_factory=list)
    _met: set[tuple[int, int]] = field(default_factory=set)
    _filled: dict[int, Any] = field(default_factory=dict)

    def state(self, live: Any, saved: Any) -> None:
        """Match two whole states."""
        path = "state"
        if isinstance(live, dict) and not is_stateful(live):
            self._dict(live, saved, path)  # its keys are those of the state, plain or not
        elif not _same(live, self._entry(live, saved, path)):
            self.problems.append(
                f"{path}: a {type(live).__name__} cannot be changed in place, and the checkpoint has another"
                f" {type(saved).__name__}; make it an entry of a dict, or use load() instead"
            )

    def hint_at_a_part(self) -> None:
        """Hint at `strict=False` where entries of only one side are all that does not fit."""
        sides: list[Match | Load] = [self, *self.loads]
        differ = any(side.missing or side.unexpected for side in sides)
        if differ and not self.problems and any(side.taken for side in sides):
            self.hints.append("strict=False restores the entries that both have")

    def _entry(self, live: Any, saved: Any, path: str) -> Any:
        """Match an entry; returns what it becomes, which is `live` where that is changed in place."""
        if isinstance(live, torch.nn.Module) and is_stateful(live):
            self._module(live, saved, path)
        elif is_stateful(live):
            self._stateful(live, saved, path)
        elif isinstance(live, torch.Tensor):
            self._tensor(live, saved, path)
        elif is_plain(live):
            self.taken += 1
            return self._plain(live, saved, path)
        elif (id(live), id(saved)) not in self._met:  # else a cycle, or shared on both sides
            self._met.add((id(live), id(saved)))
            if isinstance(live, dict):
                self._dict(live, saved, path)
            else:
                return self._sequence(live, saved, path)
        return live

    def _plain(self, live: Any, saved: Any, path: str) -> Any:
        """Return what a plain value becomes: `live` where that takes the content of `saved` in place."""
        if not any(isinstance(live, kind) and isinstance(saved, kind) for kind in (dict, list)):
            return saved
        if id(live) in self._filled:
            # One object in two places of the live state may be two in the loaded one.
            return live if self._filled[id(live)] is saved else saved
        self._filled[id(live)] = saved
        content: Any
        if isinstance(live, dict):
            content = {
                key: self._plain(live[key], value, path)
                if isinstance(value, (dict, list)) and key in live
                else value
                for key, value in saved.items()
            }
        else:
            content = saved.copy()
            for index, (old, new) in enumerate(zip(live, saved, strict=False)):
                if isinstance(new, (dict, list)):
                    content[index] = self._plain(old, new, path)
        self.changes.append((path, live, partial(refill, live, content)))
        return live

    def _tensor(self, live: torch.Tensor, saved: Any, path: str) -> None:
        if (problem := misfit(live, saved)) is not None:
            self.problems.append(f"{path}: {problem}")
        else:
            self.taken += 1
            found = self.tensors if copy_cannot_fail(live, saved) else self.odd_tensors
            found.append((path, live, saved))

    def _dict(self, live: dict[Any, Any], saved: Any, path: str) -> None:
        if not isinstance(saved, dict):
            self.problems.append(f"{path}: a dict is expected, the checkpoint has a {type(saved).__name__}")
            return
        if live and all(isinstance(value, torch.Tensor) for value in live.values()):
            saved = self._mapped(live, saved, path)
        self.missing |= missing_lines(path, [key for key in live if key not in saved])
        self.unexpected |= unexpected_lines(path, [key for key in saved if key not in live], "state")
        for key, value in live.items():
            if key in saved:
                at = _at(path, key)
                self._replace(live, key, value, self._entry(value, saved[key], at), at)

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
            return live if all(map(_same, live, items)) else remake(live, items)
        for index, (old, new) in enumerate(zip(live, items, strict=True)):
            self._replace(live, index, old, new, f"{path}[{index}]")
        return live

    def _replace(self, container: Any, key: Any, old: Any, new: Any, path: str) -> None:
        if new is not old:
            self.changes.append((path, container, partial(setitem, container, key, new)))

    def _module(self, module: torch.nn.Module, saved: Any, path: str) -> None:
        if not isinstance(saved, dict):
            self.problems.append(
                f"{path}: a state dict is expected, the checkpoint has a {type(saved).__name__}"
            )
            return
        own = module.state_dict()
        saved = self._mapped(own, saved, path)
        both = [key for key in own if key in saved]
        load = Load(path, module, saved, len(own))
        load.missing = missing_lines(path, [key for key in own if key not in saved])
        load.unexpected = unexpected_lines(path, [key for key in saved if key not in own], "module")
        tensors = [key for key in both if isinstance(own[key], torch.Tensor) and not is_lazy(own[key])]
        why = {key: misfit(own[key], saved[key]) for key in tensors}
        lines = [f"{_at(path, key)}: {problem}" for key, problem in why.items() if problem is not None]
        if not is_stock(module):
            self.doubts += [*lines, *load.missing.values(), *load.unexpected.values()]
            self.loads.append(load)
            return
        self.problems += lines
        self.missing |= load.missing
        self.unexpected |= load.unexpected
        if not lines and all(copy_cannot_fail(own[key], saved[key]) for key in both):
            self.taken += load.taken
            self.modules.append(load)
        else:
            self.loads.append(load)

    def _stateful(self, live: Any, saved: Any, path: str) -> None:
        if isinstance(live, torch.optim.Optimizer) and is_stock(live):
            self._optimizer(live, saved, path)
        self.loads.append(Load(path, live, saved))

    def _optimizer(self, optimizer: torch.optim.Optimizer, saved: Any, path: str) -> None:
        groups = saved.get("param_groups") if isinstance(saved, dict) else None
        if not isinstance(groups, list):
            self.problems.append(f"{path}: the state dict of an optimizer is expected")
            return
        ours = [len(group["params"]) for group in optimizer.param_groups]
        theirs = [len(group.get("params", ())) if isinstance(group, dict) else 0 for group in groups]
        if ours != theirs:
            self.problems.append(
                f"{path}: {theirs} parameters per group in the checkpoint, {ours} in the optimizer"
            )

    def _mapped(self, own: dict[Any, Any], saved: dict[Any, Any], path: str) -> dict[Any, Any]:
        """Apply `map_keys` to a loaded state dict; hint at one that makes more of it fit."""
        if self.map_keys is not None:
            saved, problems = map_state_keys(saved, self.map_keys)
            self.problems += [f"{path}: {problem}" for problem in problems]
        elif own.keys() != saved.keys() and (remedy := prefix_remedy(own, saved)) is not None:
            self.hints.append(f"{path}: {remedy}")
        return saved


def missing_lines(path: str, keys: Iterable[Any]) -> dict[str, str]:
    """Return a line for each entry that the checkpoint lacks, by its path."""
    return {at: f"{at}: missing in the checkpoint" for at in (_at(path, key) for key in keys)}


def unexpected_lines(path: str, keys: Iterable[Any], owner: str) -> dict[str, str]:
    """Return a line for each entry that the live side lacks, by its path."""
    return {at: f"{at}: unexpected, the {owner} has no such entry" for at in (_at(path, key) for key in keys)}


def _at(path: str, key: object) -> str:
    return f"{path}[{json.dumps(key) if isinstance(key, str) else repr(key)}]"


def _same(old: Any, new: Any) -> bool:
    """Whether a plain value need not be replaced."""
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    return isinstance(old, _ATOMS) and bool(old == new)
