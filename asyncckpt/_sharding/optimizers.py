"""State dicts of optimizers with names for the parameters, so that they can be resharded.

DCP's `get_optimizer_state_dict` makes an optimizer step if it has not stepped: it clears gradients, calls
hooks, and counts that step. Here an optimizer is only looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._sharding.flat_parameters import (
    flat_optimizer_state,
    has_flat_parameters,
    load_flat_optimizer,
)
from asyncckpt._sharding.modules import namer
from asyncckpt._snapshot.local_tensors import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch.distributed.checkpoint.metadata import Metadata
    from torch.nn import Module
    from torch.optim import Optimizer

    StatePath = tuple[str | int, ...]

_SHOWN = 5  # of the parameters that a message lists


def optimizer_state(optimizer: Optimizer, modules: Mapping[str, Module]) -> dict[str, Any]:
    """Return the state dict of an optimizer; its tensors are the live ones.

    Args:
        optimizer: the optimizer.
        modules: of the state, by path. If one of them has all its parameters, these get their full names in
            it; if they are in several, the names begin with the paths; else they keep their numbers.
    """
    if (flat := _flat_module(optimizer, modules)) is not None:
        return flat_optimizer_state(flat, optimizer, fresh=not optimizer.state)
    state = optimizer.state_dict()
    names = _names(optimizer, modules)
    if names is None:
        return state
    entries = state["state"]
    for key in list(entries):
        if type(key) is int:
            entries[names[key]] = entries.pop(key)
    for group in state["param_groups"]:
        group["params"] = [names[number] for number in group["params"]]
    return state


def fit_optimizer(
    optimizer: Optimizer,
    modules: Mapping[str, Module],
    path: StatePath,
    state: dict[str, Any],
    metadata: Metadata,
) -> list[str]:
    """Give the state dict of an optimizer the entries that a checkpoint has.

    Args:
        optimizer: the optimizer.
        modules: of the state.
        path: of the optimizer in the state.
        state: of `optimizer_state`; is changed.
        metadata: of the checkpoint.

    Returns:
        What could not be made, a line each.
    """
    saved = _saved_entries(path, metadata)
    if saved is None:
        return []
    if (flat := _flat_module(optimizer, modules)) is not None:
        if not optimizer.state and saved:
            state.update(flat_optimizer_state(flat, optimizer, fresh=False))
        return []
    parameters = {str(key): (key, parameter) for key, parameter in _parameters(optimizer, modules).items()}
    live, fitted, problems = state["state"], {}, []
    for text, entries in saved.items():
        key, parameter = parameters.get(text, (text, None))
        there = live.get(key, {})
        if parameter is None or not isinstance(there, dict):
            fitted[key] = live.get(key)
            continue
        fitted[key] = {}
        for name, saved_as in entries.items():
            if name in there:
                fitted[key][name] = there[name]
                continue
            try:
                fitted[key][name] = _made(parameter, saved_as)
            except ValueError as error:
                where = ".".join(map(str, (*path, "state", text, name)))
                problems.append(f"{where}: {error}; let the optimizer step once before it is restored")
    state["state"] = fitted
    return problems


def optimizer_misfits(
    optimizer: Optimizer, modules: Mapping[str, Module], path: StatePath, state: dict[str, Any]
) -> list[str]:
    """Return why a state dict with loaded values would not fit an optimizer, a line each."""
    if _flat_module(optimizer, modules) is not None:
        return []
    keys, where = list(_parameters(optimizer, modules)), ".".join(map(str, path))
    groups, saved = len(optimizer.param_groups), len(state["param_groups"])
    if groups != saved:
        return [f"{where}.param_groups: {saved} groups in the checkpoint, {groups} in the optimizer"]
    problems, start = [], 0
    for number, (group, loaded) in enumerate(zip(optimizer.param_groups, state["param_groups"], strict=True)):
        own, start = keys[start : start + len(group["params"])], start + len(group["params"])
        here, there = set(own) - set(loaded["params"]), set(loaded["params"]) - set(own)
        if here or there:
            problems.append(
                f"{where}.param_groups.{number}: other parameters are in this group: only in the state"
                f" {_some(here)}, only in the checkpoint {_some(there)}"
            )
    return problems


def load_optimizer(optimizer: Optimizer, modules: Mapping[str, Module], state: dict[str, Any]) -> None:
    """Load what `optimizer_state` has returned, and `fit_optimizer` has changed."""
    if (flat := _flat_module(optimizer, modules)) is not None:
        load_flat_optimizer(flat, optimizer, state)
        return
    numbers = {key: number for number, key in enumerate(_parameters(optimizer, modules))}
    groups, start = [], 0
    for group, loaded in zip(optimizer.param_groups, state["param_groups"], strict=True):
        # By number, and not in the order of the names in the checkpoint.
        start, own = start + len(group["params"]), range(start, start + len(group["params"]))
        groups.append({**loaded, "params": list(own)})
    entries = {numbers.get(key, key): value for key, value in state["state"].items()}
    optimizer.load_state_dict({**state, "state": entries, "param_groups": groups})


def _saved_entries(path: StatePath, metadata: Metadata) -> dict[str, dict[str, list[Any]]] | None:
    """Return how each entry of an optimizer was saved: parameter -> name -> of one or more items."""
    begin, found = len(path), False
    saved: dict[str, dict[str, list[Any]]] = {}
    for key, place in (metadata.planner_data or {}).items():
        if place[:begin] != path:
            continue
        found = True
        if place[begin : begin + 1] == ("state",) and len(place) > begin + 2:
            items = saved.setdefault(place[begin + 1], {}).setdefault(place[begin + 2], [])
            items.append(metadata.state_dict_metadata[key] if len(place) == begin + 3 else None)
        elif place[begin : begin + 1] == ("state",):
            saved[place[begin + 1]] = {}
    return saved if found else None


def _made(parameter: torch.Tensor, items: list[Any]) -> Any:
    """Return an entry of the optimizer's state to read into.

    Raises:
        ValueError: it is not known how it is distributed, or made up of others.
    """
    (saved,) = items if len(items) == 1 else (None,)
    if saved is None:
        raise ValueError("it holds several values")
    if not hasattr(saved, "size"):
        return None  # an object
    dtype = saved.properties.dtype
    if saved.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    if not saved.size:
        return torch.zeros((), dtype=dtype)  # a count; the optimizer moves it to the device it needs
    if is_dtensor(parameter):
        raise ValueError(f"its shape {tuple(saved.size)} is not that of the parameter, which is sharded")
    return torch.zeros(saved.size, dtype=dtype, device=parameter.device)


def _flat_module(optimizer: Optimizer, modules: Mapping[str, Module]) -> Module | None:
    """Return the module with flat parameters that has those of an optimizer."""
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for module in modules.values():
        if has_flat_parameters(module) and own <= set(map(id, module.parameters())):
            return module
    return None


def _parameters(optimizer: Optimizer, modules: Mapping[str, Module]) -> dict[Any, torch.Tensor]:
    """Return the parameters of an optimizer by the keys that `optimizer_state` gives them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = _names(optimizer, modules) or range(len(parameters))
    return dict(zip(names, parameters, strict=True))


def _names(optimizer: Optimizer, modules: Mapping[str, Module]) -> list[str] | None:
    """Return the names of an optimizer's parameters, in order; None if modules do not hold them all."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    merged: dict[torch.Tensor, str] = {}
    for path, module in modules.items():
        name_of = namer(module)
        known = {parameter: name_of(name) for name, parameter in module.named_parameters()}
        if all(parameter in known for parameter in parameters):
            return [known[parameter] for parameter in parameters]
        merged = {parameter: f"{path}.{name}" for parameter, name in known.items()} | merged
    if all(parameter in merged for parameter in parameters):
        return [merged[parameter] for parameter in parameters]
    return None


def _some(names: Collection[Any]) -> str:
    shown = ", ".join(map(str, sorted(names, key=str)[:_SHOWN]))
    return f"{shown or 'none'}{', …' if len(names) > _SHOWN else ''}"
