"""Hold what a restore is about to change, so that it can be put back."""

from __future__ import annotations

import copy
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from asyncckpt._loading.fitting import is_dense, is_stock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Step = Callable[[], object]


def put_back(held: Sequence[tuple[str, Sequence[Step]]]) -> list[str]:
    """Run the steps that put entries back, the last entry first; returns a line for each that failed.

    Args:
        held: (path of an entry, its steps).
    """
    failures = []
    for path, steps in reversed(held):
        for step in steps:
            try:
                step()
            except BaseException as error:  # noqa: BLE001 - the others are put back nonetheless
                failures.append(f"{path}: {type(error).__name__}: {error}")
    return failures


def refill(container: Any, content: Any) -> None:
    """Give a dict or a list other content, in place."""
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)


def hold_container(container: Any) -> list[Step]:
    """Return what gives a dict or a list its present entries back."""
    return [partial(refill, container, list(container) if isinstance(container, list) else dict(container))]


def hold_tensor(tensor: torch.Tensor) -> list[Step]:
    """Return what gives a tensor its present values and memory back, with a copy of the values."""
    value: Any = tensor
    if is_traceable_wrapper_subclass(value):
        names = value.__tensor_flatten__()[0]
        inner = {name: getattr(value, name) for name in names}
        bind = [partial(setattr, value, name, part) for name, part in inner.items()]
        return [*bind, *(step for part in inner.values() for step in hold_tensor(part))]
    kind: type = type(tensor)
    data = tensor.data
    if is_lazy(tensor):

        def dematerialize() -> None:
            tensor.data = data
            tensor.__class__ = kind

        return [dematerialize]
    content = data.clone()

    def write() -> None:
        if is_dense(tensor):
            tensor.data = data
        with torch.no_grad():
            tensor.copy_(content)

    return [write]


def hold_stateful(target: Any) -> list[Step]:
    """Return what puts an object back as it is now.

    Attributes are bound again to what they were; modules and optimizers get their tensors back, of the same
    identity. If code of others keeps state elsewhere, it loads its old state dict, too.
    """
    attributes, containers, tensors = _parts(target)
    bind = _steps(hold_container, attributes)
    hold = [*_steps(hold_container, containers), *_steps(hold_tensor, tensors)]
    if is_stock(target):
        return [*bind, *hold]
    state = _copy_state(target.state_dict(), tensors)

    def load() -> None:
        with suppress(Exception):  # what cannot be compared is loaded
            if _equal(target.state_dict(), state):
                return
        target.load_state_dict(state)

    # Loading may put other tensors in their places.
    return [*bind, *hold, load, *hold]


def _steps(hold: Callable[[Any], list[Step]], values: Iterable[Any]) -> list[Step]:
    return [step for value in values for step in hold(value)]


def _parts(target: Any) -> tuple[list[Any], list[Any], list[torch.Tensor]]:
    """Return what holds the state of `target`: attributes, containers, tensors that may be written into."""
    if isinstance(target, torch.nn.Module):
        parts = list(target.modules())
        names = [names for part in parts for names in (part._parameters, part._buffers, part._modules)]
        return [vars(part) for part in parts], names, [*target.parameters(), *target.buffers()]
    if isinstance(target, torch.optim.Optimizer):
        inner = [each for each in (*target.state.values(), *target.param_groups) if isinstance(each, dict)]
        # torch's own load_state_dict replaces the tensors.
        written = [] if is_stock(target) else [value for each in inner for value in _tensors(each)]
        return [], [vars(target), target.state, target.param_groups, *inner], written
    attributes = getattr(target, "__dict__", None)
    return [] if attributes is None else [attributes], [], []


def _tensors(container: dict[Any, Any]) -> list[torch.Tensor]:
    return [value for value in container.values() if isinstance(value, torch.Tensor)]


def _copy_state(state: Any, held: list[torch.Tensor]) -> Any:
    """Copy a state dict, except tensors that are held, or are views of all of one that is."""
    known = {_extent(tensor) for tensor in held}
    shared = [*held, *(_tensors(state) if isinstance(state, dict) else ())]
    return copy.deepcopy(state, {id(tensor): tensor for tensor in shared if _extent(tensor) in known})


def _extent(tensor: torch.Tensor) -> object:
    if not is_dense(tensor):
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _equal(one: Any, other: Any) -> bool:
    """Whether two state dicts are known to be equal."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
