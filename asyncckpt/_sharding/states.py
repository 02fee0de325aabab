"""Turn the objects of a state into state dicts that DCP can reshard, and give those back to the objects.

Modules and optimizers are saved under fully qualified names, as
`torch.distributed.checkpoint.state_dict` does it; other stateful objects by their `state_dict`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._sharding.modules import load_module, module_state
from asyncckpt._sharding.optimizers import fit_optimizer, load_optimizer, optimizer_misfits, optimizer_state
from asyncckpt._stateful import CONTAINERS, collect, is_plain, is_stateful
from asyncckpt.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.distributed.checkpoint.metadata import Metadata

    from asyncckpt._sharding.optimizers import StatePath

RANK_STATE = "rank_state"


def collect_sharded(state: Any) -> tuple[dict[str, Any], list[Any]]:
    """Return a state with its stateful objects replaced by state dicts, and these objects.

    The tensors in it are the live ones. A module becomes its state dict, an optimizer its state dict with
    names for its parameters if modules of the state hold them all, without wrappers' prefixes in either.
    An optimizer that has not stepped has no state in it; nothing is changed in the program.

    Args:
        state: a dict, or an object with a state dict.

    Raises:
        SaveError: it is no dict.
    """
    objects: list[Any] = []
    collected = collect(state, objects, partial(_state_dict, _modules(state)))
    if not isinstance(collected, dict):
        raise SaveError(f"a sharded checkpoint is made of a dict, not of a {type(collected).__name__}")
    return collected, objects


def with_rank_state(state: dict[str, Any], rank: int, rank_state: Any) -> dict[str, Any]:
    """Return a collected state with what is saved for each rank of its own added.

    It is at `state["rank_state"]["3"]` for rank 3, and stock DCP loads it by that path.

    Raises:
        SaveError: the state has another entry of that name.
    """
    if RANK_STATE in state:
        raise SaveError(f"the state has an entry {RANK_STATE!r}, which rank_state= would replace: rename it")
    return {**state, RANK_STATE: {str(rank): collect(rank_state)}}


def fit_optimizers(state: Any, collected: dict[str, Any], metadata: Metadata) -> list[str]:
    """Give the optimizers of a collected state the entries that a checkpoint has, to read it into them.

    An optimizer that has not stepped has no tensors to read into: they are made, like its parameters. Entries
    that the checkpoint does not have are taken out, so that the optimizer is as it was at the save. The
    optimizers themselves are not changed: `apply` gives them the result.

    Args:
        state: the live state.
        collected: of `collect_sharded(state)`; is changed.
        metadata: of the checkpoint.

    Returns:
        What could not be made, a line each.
    """
    modules = _modules(state)
    problems: list[str] = []
    for path, optimizer, part in _pairs(state, collected):
        if isinstance(optimizer, torch.optim.Optimizer):
            problems += fit_optimizer(optimizer, modules, path, part, metadata)
    return problems


def misfits(state: Any, collected: dict[str, Any]) -> list[str]:
    """Return what `apply` would not fit into the objects of `state`, a line each; changes nothing.

    Call it once the values that are no tensors have been read into `collected`.
    """
    modules = _modules(state)
    problems: list[str] = []
    for path, optimizer, part in _pairs(state, collected):
        if isinstance(optimizer, torch.optim.Optimizer):
            problems += optimizer_misfits(optimizer, modules, path, part)
    return problems


def without_tensors(state: Any, collected: dict[str, Any]) -> dict[int, tuple[str, Any]]:
    """Return the objects whose state dicts have no tensors to read into, and their paths, by identity.

    They can be given their state before any tensor is changed. Modules and optimizers are not among them.
    """
    return {
        id(value): (".".join(map(str, path)), value)
        for path, value, part in _pairs(state, collected)
        if not isinstance(value, (torch.nn.Module, torch.optim.Optimizer)) and is_plain(part)
    }


def apply(state: Any, collected: dict[str, Any], takes: Callable[[int], bool] = lambda _: True) -> None:
    """Give each stateful object of `state` its state back.

    Args:
        state: the live state.
        collected: of `collect_sharded(state)`, with what was loaded in it.
        takes: whether the object with this identity is to get it now; by default all are.
    """
    modules = _modules(state)
    for _, value, part in _pairs(state, collected):
        if not takes(id(value)):
            continue
        if isinstance(value, torch.nn.Module):
            load_module(value, part)
        elif isinstance(value, torch.optim.Optimizer):
            load_optimizer(value, modules, part)
        else:
            value.load_state_dict(part)


def _state_dict(modules: dict[str, torch.nn.Module], value: Any) -> Any:
    if isinstance(value, torch.nn.Module):
        return module_state(value)
    if isinstance(value, torch.optim.Optimizer):
        return optimizer_state(value, modules)
    return value.state_dict()


def _modules(state: Any) -> dict[str, torch.nn.Module]:
    """Return the modules of a state by their path in it, joined by dots."""
    pairs = _pairs(state, state)
    return {".".join(map(str, path)): value for path, value, _ in pairs if isinstance(value, torch.nn.Module)}


def _pairs(state: Any, collected: Any) -> Iterator[tuple[StatePath, Any, Any]]:
    """Yield each stateful object of a state, with its path and with what is at its place in `collected`."""
    return _walk((), state, collected, set())


def _walk(path: StatePath, value: Any, part: Any, seen: set[int]) -> Iterator[tuple[StatePath, Any, Any]]:
    if is_stateful(value):
        yield path, value, part
    elif isinstance(value, CONTAINERS) and id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, dict):
            for key, item in value.items():
                if key in part:
                    yield from _walk((*path, str(key)), item, part[key], seen)
        else:
            for index, (item, other) in enumerate(zip(value, part, strict=True)):
                yield from _walk((*path, index), item, other, seen)
