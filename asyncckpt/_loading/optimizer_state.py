"""Restore the state tensors of an optimizer in place, so that none is made anew on its device."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._loading.copies import Copy
from asyncckpt._loading.fitting import copy_cannot_fail, is_dense, misfit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def keep_state_tensors(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], path: str
) -> tuple[dict[str, Any], list[Copy]]:
    """Return what to load in place of `saved`, and the copies to make afterwards.

    Where a tensor of the live state is what `load_state_dict` would make of the loaded one, values aside, it
    takes the place of that: `load_state_dict` keeps it, and the copy gives it the values.

    Args:
        optimizer: one of torch's, without hooks.
        saved: its loaded state dict, with groups of the same sizes.
        path: of the optimizer in the state.
    """
    states = saved.get("state")
    if not isinstance(states, dict):  # which load_state_dict refuses
        return saved, []
    kept, copies = dict(states), []
    alone = _lying_alone(optimizer.state.values()), _lying_alone(states.values())
    for key, param, options in _params(optimizer, saved):
        live, loaded = optimizer.state.get(param, {}), states.get(key)
        if not isinstance(loaded, dict) or any(isinstance(v, (dict, list, tuple)) for v in loaded.values()):
            continue  # LBFGS has lists of tensors, which others may be tied to
        kept[key] = dict(loaded)
        for name, value in loaded.items():
            old = live.get(name)
            if not isinstance(old, torch.Tensor) or not isinstance(value, torch.Tensor):
                continue
            if not _is_kept(old, value, param, options if name == "step" else None):
                continue
            if old.data_ptr() in alone[0] and value.data_ptr() in alone[1]:
                kept[key][name] = old
                copies.append(Copy(f'{path}["state"][{key}]["{name}"]', old, value))
    return {**saved, "state": kept}, copies


def _params(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> Iterable[tuple[Any, torch.Tensor, Mapping[str, Any]]]:
    """Yield the key of each parameter in the loaded state, the parameter, and its group's loaded options."""
    for ours, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for key, param in zip(theirs["params"], ours["params"], strict=True):
            yield key, param, theirs


def _is_kept(
    old: torch.Tensor, value: torch.Tensor, param: torch.Tensor, step_options: Mapping[str, Any] | None
) -> bool:
    """Whether `load_state_dict` would make `old` of `value`, values aside, and leave `old` as it is.

    `step_options` are the options that decide where a "step" goes; None for other tensors.
    """
    device, dtype = param.device, param.dtype if param.is_floating_point() else value.dtype
    if step_options is not None:
        moves = step_options.get("capturable") or step_options.get("fused")
        device, dtype = (device, torch.float32) if moves else (value.device, value.dtype)
    return (
        is_dense(old)
        and is_dense(value)
        and old.device == device
        and old.dtype is dtype
        and misfit(old, value) is None
        and copy_cannot_fail(old, value)
    )


def _lying_alone(states: Iterable[Any]) -> set[int]:
    """Return the addresses of state tensors of which no other one begins at the same address."""
    values = chain.from_iterable(state.values() for state in states if isinstance(state, dict))
    found = Counter(
        value.data_ptr() for value in values if isinstance(value, torch.Tensor) and is_dense(value)
    )
    return {address for address, count in found.items() if count == 1}
