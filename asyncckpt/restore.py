"""From a file in a store to a state, and from a state into live objects, all of it or nothing."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StateMismatchError
from asyncckpt.reader import read_image, verify
from asyncckpt.stateful import is_stateful
from asyncckpt.stores import open_store
from asyncckpt.unpickle import LoadedMemory, PayloadFile, load_file

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asyncckpt.engine import Engine
    from asyncckpt.reader import Image
    from asyncckpt.stores.base import Store, StoredFile
    from asyncckpt.unpickle import MapLocation

T = TypeVar("T")


def load_state(
    engine: Engine, store: Store, name: str, map_location: MapLocation, *, weights_only: bool
) -> Any:
    """Read a file in parallel, check it, and return its state.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CorruptCheckpointError: names the damaged record.
        pickle.UnpicklingError: `weights_only` does not allow what is in it.
    """
    image = engine.call(_read, store, name)
    return state_of(image, map_location, weights_only=weights_only)


def locate(path: str | os.PathLike[str], home: Store) -> tuple[Store, str]:
    """Return the store and the name of a path; a bare name is one of `home`."""
    directory, _, name = os.fspath(path).rpartition("/")
    return (open_store(directory or "/") if "/" in os.fspath(path) else home), name


async def verify_file(store: Store, name: str) -> None:
    """Read every byte of a file and compare every checksum.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CorruptCheckpointError: names the damaged record.
    """
    await _checked(verify, store, name)


async def _read(store: Store, name: str) -> Image:
    return await _checked(read_image, store, name)


async def _checked(read: Callable[[Store, StoredFile], Awaitable[T]], store: Store, name: str) -> T:
    where = store.path_of(name)
    try:
        return await read(store, await store.stat(name))
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"there is no checkpoint {where}") from error
    except CorruptCheckpointError as error:
        raise error if where in str(error) else CorruptCheckpointError(f"{where}: {error}") from error


def state_of(image: Image, map_location: MapLocation, *, weights_only: bool) -> Any:
    """Build the state of a file that is in memory; its storages keep that memory."""
    directory, view = image.directory, image.mapping.view
    rows = zip(directory.names, directory.starts.tolist(), directory.stops.tolist(), strict=True)
    with LoadedMemory(image.mapping) as memory:
        payloads = {
            start: memory.storage(start, stop) for name, start, stop in rows if stop > start and "/data/" in name
        }
        file = PayloadFile(image.nbytes, lambda at, length: bytes(view[at : at + length]), payloads)
        return load_file(file, map_location, weights_only=weights_only)


@dataclass(slots=True)
class _Application:
    """What is to be done to live objects, collected before any of it is done."""

    problems: list[str] = field(default_factory=list)
    stateful: list[tuple[str, Any, Any]] = field(default_factory=list)
    modules: list[tuple[str, torch.nn.Module, Any]] = field(default_factory=list)
    tensors: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    values: list[tuple[Any, Any, Any]] = field(default_factory=list)


def apply_state(live: Any, saved: Any, where: str) -> None:
    """Put a loaded state into a live one: `load_state_dict` where there is one, tensors in place.

    Args:
        live: what was given to `save`: nested dicts and lists of stateful objects, tensors and values.
        saved: what was loaded.
        where: the checkpoint's path, for messages.

    Raises:
        StateMismatchError: lists each entry that is missing, unexpected or of another shape. Nothing was
            changed.
    """
    todo = _Application()
    _match(live, saved, "state", todo)
    if todo.problems:
        listing = "\n  ".join(todo.problems)
        raise StateMismatchError(f"{where} does not fit the state, of which nothing was changed:\n  {listing}")
    undo: list[Callable[[], object]] = []
    try:
        for path, target, content in [*todo.stateful, *todo.modules]:
            undo.append(_backup(target))
            _load_into(path, target, content, where)
    except BaseException:
        for restore in reversed(undo):
            restore()
        raise
    with torch.no_grad():
        for tensor, content in todo.tensors:
            tensor.copy_(content)
    for container, key, value in todo.values:
        container[key] = value


def _match(live: Any, saved: Any, path: str, todo: _Application) -> None:
    if is_stateful(live):
        if isinstance(live, torch.nn.Module):
            _match_module(live, saved, path, todo)
        else:
            if isinstance(live, torch.optim.Optimizer):
                _check_optimizer(live, saved, path, todo)
            todo.stateful.append((path, live, saved))
    elif isinstance(live, torch.Tensor):
        if not isinstance(saved, torch.Tensor):
            todo.problems.append(f"{path}: a tensor is expected, the checkpoint has a {type(saved).__name__}")
        elif live.shape != saved.shape:
            todo.problems.append(_shapes(path, saved, live))
        else:
            todo.tensors.append((live, saved))
    elif isinstance(live, dict):
        _match_dict(live, saved, path, todo)
    elif isinstance(live, list):
        if not isinstance(saved, list) or len(live) != len(saved):
            size = len(saved) if isinstance(saved, list) else type(saved).__name__
            todo.problems.append(f"{path}: a list of {len(live)} is expected, the checkpoint has {size}")
        else:
            for index, (ours, theirs) in enumerate(zip(live, saved, strict=True)):
                _match_entry(live, index, ours, theirs, f"{path}[{index}]", todo)
    else:
        todo.problems.append(f"{path}: a {type(live).__name__} cannot be changed in place; use load() instead")


def _match_dict(live: dict[Any, Any], saved: Any, path: str, todo: _Application) -> None:
    if not isinstance(saved, dict):
        todo.problems.append(f"{path}: a dict is expected, the checkpoint has a {type(saved).__name__}")
        return
    names = {key: f"{path}[{json.dumps(key) if isinstance(key, str) else repr(key)}]" for key in [*live, *saved]}
    todo.problems += [f"{names[key]}: missing in the checkpoint" for key in live if key not in saved]
    todo.problems += [f"{names[key]}: unexpected, the state has no such entry" for key in saved if key not in live]
    for key in live:
        if key in saved:
            _match_entry(live, key, live[key], saved[key], names[key], todo)


def _match_entry(container: Any, key: Any, live: Any, saved: Any, path: str, todo: _Application) -> None:
    if isinstance(live, (torch.Tensor, dict, list)) or is_stateful(live):
        _match(live, saved, path, todo)
    else:
        todo.values.append((container, key, saved))


def _match_module(module: torch.nn.Module, saved: Any, path: str, todo: _Application) -> None:
    if not isinstance(saved, dict):
        todo.problems.append(f"{path}: a state dict is expected, the checkpoint has a {type(saved).__name__}")
        return
    own = module.state_dict()
    todo.problems += [f'{path}["{key}"]: missing in the checkpoint' for key in own if key not in saved]
    todo.problems += [f'{path}["{key}"]: unexpected, the module has no such entry' for key in saved if key not in own]
    for key, value in own.items():
        other = saved.get(key)
        if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor) and value.shape != other.shape:
            todo.problems.append(_shapes(f'{path}["{key}"]', other, value))
    todo.modules.append((path, module, saved))


def _check_optimizer(optimizer: torch.optim.Optimizer, saved: Any, path: str, todo: _Application) -> None:
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    if not isinstance(groups, list):
        todo.problems.append(f"{path}: an optimizer's state dict is expected")
        return
    ours = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in groups]
    if ours != theirs:
        todo.problems.append(f"{path}: parameters per group are {theirs} in the checkpoint, {ours} in the optimizer")


def _shapes(path: str, saved: torch.Tensor, live: torch.Tensor) -> str:
    return f"{path}: shape {tuple(saved.shape)} in the checkpoint, {tuple(live.shape)} in the state"


def _backup(target: Any) -> Callable[[], object]:
    """Return what puts `target` back as it is now."""
    state = target.state_dict()
    # An optimizer drops its tensors for the loaded ones and never writes into them, so they can be kept as is.
    if not isinstance(target, torch.optim.Optimizer):
        if isinstance(target, torch.nn.Module) and _loads_as_checked(target):
            return lambda: None
        state = copy.deepcopy(state)
    return lambda: target.load_state_dict(state)


def _loads_as_checked(module: torch.nn.Module) -> bool:
    """Whether loading cannot fail once names and shapes agree: no code of the user's takes part."""
    return all(
        not part._load_state_dict_pre_hooks
        and type(part)._load_from_state_dict.__module__.startswith("torch.")
        and type(part).set_extra_state is torch.nn.Module.set_extra_state
        for part in module.modules()
    )


def _load_into(path: str, target: Any, content: Any, where: str) -> None:
    try:
        target.load_state_dict(content)
    except Exception as error:
        msg = f"{where} does not fit the state, of which nothing was changed:\n  {path}: {error}"
        raise StateMismatchError(msg) from error
