"""State dicts of modules under fully qualified names: those that they have without wrappers around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from asyncckpt._sharding.flat_parameters import flat_module_state, has_flat_parameters, load_flat_module

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn import Module

# Of each module, key -> fully qualified name: it takes 10 µs to find one.
_names: WeakKeyDictionary[Module, dict[str, str]] = WeakKeyDictionary()


def module_state(module: Module) -> dict[str, Any]:
    """Return the state dict of a module under fully qualified names; its tensors are the live ones.

    It is in the order of DCP's `get_model_state_dict`. FullyShardedDataParallel, which shards flat
    parameters, makes new tensors.
    """
    if has_flat_parameters(module):
        return flat_module_state(module)
    state = _live_state(module)
    name_of = namer(module)
    for key in list(state):
        if (name := name_of(key)) != key:
            state[name] = state.pop(key)
    return state


def load_module(module: Module, state: dict[str, Any]) -> None:
    """Load what `module_state` has returned."""
    if has_flat_parameters(module):
        load_flat_module(module, state)
        return
    name_of = namer(module)
    keys = {name_of(key): key for key in _live_state(module)}
    module.load_state_dict({keys.get(name, name): value for name, value in state.items()})


def namer(module: Module) -> Callable[[str], str]:
    """Return a function from the name of a parameter, or a key of the state dict, to its full name."""
    from torch.distributed.checkpoint.state_dict import _get_fqns  # noqa: PLC0415 - see __init__

    known = _names.setdefault(module, {})

    def name_of(key: str) -> str:
        name = known.get(key)
        if name is None:
            try:
                (name,) = _get_fqns(module, key)
            except AttributeError:  # a hook has added it: no module or tensor has that name
                name = key
            known[key] = name
        return name

    return name_of


def _live_state(module: Module) -> dict[str, Any]:
    with torch.no_grad():
        if type(module).state_dict is torch.nn.Module.state_dict and "state_dict" not in vars(module):
            # To detach a DTensor takes 5 µs.
            return module.state_dict(keep_vars=True)
        return module.state_dict()
