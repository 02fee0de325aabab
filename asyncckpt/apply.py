"""Put a loaded state into live objects: all of it, or nothing."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt.errors import StateMismatchError
from asyncckpt.stateful import is_stateful

if TYPE_CHECKING:
    from collections.abc import Callable


def apply_state(live: Any, saved: Any, where: str) -> None:
    """Put `saved` into `live`: `load_state_dict` where there is one, tensors in place, values replaced.

    Args:
        live: what was given to `save`: nested dicts and lists of stateful objects, tensors and values.
        saved: what was loaded.
        where: the checkpoint's path, for messages.

    Raises:
        StateMismatchError: lists each entry that is missing, unexpected or of another shape. Nothing was
            changed.
    """
    match = _Match()
    match.any(live, saved, "state")
    if match.problems:
        listing = "\n  ".join(match.problems)
        raise StateMismatchError(
            f"{where} does not fit the state, of which nothing was changed:\n  {listing}"
        )
    undo: list[Callable[[], object]] = []
    try:
        for path, target, content in match.stateful:
            undo.append(_backup(target))
            _load_into(path, target, content, where)
    except BaseException:
        for put_back in reversed(undo):
            put_back()
        raise
    # From here on nothing should fail: every entry has been checked, and no code of the user's takes part.
    for _, module, content in match.modules:
        module.load_state_dict(content)
    with torch.no_grad():
        for tensor, content in match.tensors:
            tensor.copy_(content)
    for container, key, value in match.values:
        container[key] = value


@dataclass(slots=True)
class _Match:
    """What does not fit between a live and a loaded state, and what is to be done where all fits.

    Attributes:
        problems: one line for each entry that does not fit.
        stateful: (path, object, its state dict) of objects that may refuse it.
        modules: the same of modules whose loading cannot fail once every entry fits.
        tensors: (live tensor, its new content).
        values: (container, key, new value).
    """

    problems: list[str] = field(default_factory=list)
    stateful: list[tuple[str, Any, Any]] = field(default_factory=list)
    modules: list[tuple[str, torch.nn.Module, Any]] = field(default_factory=list)
    tensors: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    values: list[tuple[Any, Any, Any]] = field(default_factory=list)

    def any(self, live: Any, saved: Any, path: str) -> None:
        if isinstance(live, torch.nn.Module) and is_stateful(live):
            self._module(live, saved, path)
        elif is_stateful(live):
            if isinstance(live, torch.optim.Optimizer):
                self._optimizer(live, saved, path)
            self.stateful.append((path, live, saved))
        elif isinstance(live, torch.Tensor):
            self._tensor(live, saved, path)
        elif isinstance(live, dict):
            self._dict(live, saved, path)
        elif isinstance(live, list):
            self._list(live, saved, path)
        else:
            self.problems.append(
                f"{path}: a {type(live).__name__} cannot be changed in place; use load() instead"
            )

    def _entry(self, container: Any, key: Any, saved: Any, path: str) -> None:
        live = container[key]
        if isinstance(live, (torch.Tensor, dict, list)) or is_stateful(live):
            self.any(live, saved, path)
        else:
            self.values.append((container, key, saved))

    def _tensor(self, live: torch.Tensor, saved: Any, path: str) -> None:
        if self._fits(live, saved, path):
            self.tensors.append((live, saved))

    def _dict(self, live: dict[Any, Any], saved: Any, path: str) -> None:
        if not isinstance(saved, dict):
            self.problems.append(f"{path}: a dict is expected, the checkpoint has a {type(saved).__name__}")
            return
        self._keys(live, saved, path, "state")
        for key in live:
            if key in saved:
                self._entry(live, key, saved[key], _at(path, key))

    def _list(self, live: list[Any], saved: Any, path: str) -> None:
        if not isinstance(saved, list) or len(live) != len(saved):
            there = f"one of {len(saved)}" if isinstance(saved, list) else f"a {type(saved).__name__}"
            self.problems.append(f"{path}: a list of {len(live)} is expected, the checkpoint has {there}")
            return
        for index, value in enumerate(saved):
            self._entry(live, index, value, f"{path}[{index}]")

    def _module(self, module: torch.nn.Module, saved: Any, path: str) -> None:
        if not isinstance(saved, dict):
            self.problems.append(
                f"{path}: a state dict is expected, the checkpoint has a {type(saved).__name__}"
            )
            return
        own = module.state_dict()
        self._keys(own, saved, path, "module")
        for key, value in own.items():
            other = saved.get(key)
            if isinstance(value, torch.Tensor) and key in saved:
                self._fits(value, other, _at(path, key))
        (self.modules if _loads_as_checked(module) else self.stateful).append((path, module, saved))

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

    def _keys(self, live: dict[Any, Any], saved: dict[Any, Any], path: str, owner: str) -> None:
        self.problems += [f"{_at(path, key)}: missing in the checkpoint" for key in live if key not in saved]
        unexpected = [key for key in saved if key not in live]
        self.problems += [
            f"{_at(path, key)}: unexpected, the {owner} has no such entry" for key in unexpected
        ]

    def _fits(self, live: torch.Tensor, saved: Any, path: str) -> bool:
        """Whether `live` can take the values of `saved`; notes why if not."""
        problem = None
        if not isinstance(saved, torch.Tensor):
            problem = f"a tensor is expected, the checkpoint has a {type(saved).__name__}"
        elif live.layout is not saved.layout or live.is_quantized is not saved.is_quantized:
            problem = f"{_kind(saved)} in the checkpoint, {_kind(live)} in the state"
        elif saved.is_meta and not live.is_meta:
            problem = "the checkpoint has a meta tensor, which holds no values"
        elif live.shape != saved.shape:
            problem = f"shape {tuple(saved.shape)} in the checkpoint, {tuple(live.shape)} in the state"
        elif saved.is_complex() and not live.is_complex():
            problem = f"{saved.dtype} in the checkpoint, {live.dtype} in the state"
        elif live.is_inference() or any(
            step == 0 and size > 1 for size, step in zip(live.shape, _strides(live), strict=False)
        ):
            problem = "the state's tensor cannot be written: it is expanded, or made in inference mode"
        if problem is not None:
            self.problems.append(f"{path}: {problem}")
        return problem is None


def _kind(tensor: torch.Tensor) -> str:
    return f"{'a quantized' if tensor.is_quantized else 'a'} tensor of layout {tensor.layout}"


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout is torch.strided and not tensor.is_nested else ()


def _at(path: str, key: object) -> str:
    return f"{path}[{json.dumps(key) if isinstance(key, str) else repr(key)}]"


def _backup(target: Any) -> Callable[[], object]:
    """Return what puts `target` back as it is now."""
    state = target.state_dict()
    # An optimizer drops its tensors for the loaded ones and does not write into them: no copy is needed.
    if not isinstance(target, torch.optim.Optimizer):
        state = copy.deepcopy(state)
    return lambda: target.load_state_dict(state)


def _loads_as_checked(module: torch.nn.Module) -> bool:
    """Whether loading cannot fail once names and shapes agree: no code of the user's takes part."""
    return all(
        not part._load_state_dict_pre_hooks
        and type(part)._load_from_state_dict.__module__.startswith("torch.")
        and type(part).set_extra_state is torch.nn.Module.set_extra_state
        and type(part).load_state_dict is torch.nn.Module.load_state_dict
        for part in module.modules()
    )


def _load_into(path: str, target: Any, content: Any, where: str) -> None:
    try:
        target.load_state_dict(content)
    except Exception as error:
        fault = f"{path}: {type(error).__name__}: {error}"
        msg = f"{where} does not fit the state, of which nothing was changed:\n  {fault}"
        raise StateMismatchError(msg) from error
