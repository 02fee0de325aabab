"""What puts live objects back as they were before a restore."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from asyncckpt._loading.fitting import is_plain_tensor, is_stock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Step = Callable[[], object]


@dataclass(slots=True)
class Undo:
    """The steps that put back what was changed, the last change first."""

    _steps: list[tuple[str, list[Step]]] = field(default_factory=list)

    def keep(self, path: str, steps: list[Step]) -> None:
        """Note what puts the entry at `path` back; before it is changed."""
        self._steps.append((path, steps))

    def put_back(self) -> list[str]:
        """Run every step; returns a line for each that failed."""
        failures = []
        for path, steps in reversed(self._steps):
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


def hold_container(container: Any) -> Step:
    """Return what gives a dict or a list the entries back that it has now."""
    content = list(container) if isinstance(container, list) else dict(container)
    return lambda: refill(container, content)


def hold_tensor(tensor: torch.Tensor) -> list[Step]:
    """Return what gives a tensor its values and its memory back, with a copy of the values."""
    value: Any = tensor
    if is_traceable_wrapper_subclass(value):
        return _hold_wrapper(value)
    kind: type = type(tensor)
    data = tensor.data
    if is_lazy(tensor):

        def dematerialize() -> None:
            tensor.data = data
            tensor.__class__ = kind

        return [dematerialize]
    content = data.clone()
    dense = is_plain_tensor(tensor) and tensor.layout is torch.strided and not tensor.is_quantized

    def put_back() -> None:
        with torch.no_grad():
            (data if dense else tensor).copy_(content)
        if dense and _extent(tensor) != _extent(data):
            tensor.data = data

    return [put_back]


def _hold_wrapper(tensor: Any) -> list[Step]:
    steps: list[Step] = []
    for name in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, name)
        steps += [*hold_tensor(inner), partial(setattr, tensor, name, inner)]
    return steps


def hold_stateful(target: Any) -> list[Step]:
    """Return what puts an object back as it is now.

    Attributes are bound again to what they were; modules and optimizers get their tensors back, of the same
    identity. If code of others keeps state elsewhere, it loads its old state dict, too.
    """
    attributes, containers, tensors = _parts(target)
    bind = [hold_container(names) for names in attributes]
    hold = [hold_container(container) for container in containers]
    for tensor in tensors:
        hold += hold_tensor(tensor)
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


def _parts(target: Any) -> tuple[list[Any], list[Any], list[torch.Tensor]]:
    """Return what holds the state of `target`: attributes, containers, tensors that may be written into."""
    if isinstance(target, torch.nn.Module):
        parts = list(target.modules())
        names = [names for part in parts for names in (part._parameters, part._buffers, part._modules)]
        return [vars(part) for part in parts], _containers(names), [*target.parameters(), *target.buffers()]
    if isinstance(target, torch.optim.Optimizer):
        inner = _containers([*target.state.values(), *target.param_groups])
        # torch's own load_state_dict replaces the tensors.
        written = [] if is_stock(target) else [value for each in inner for value in _tensors(each)]
        return [], [vars(target), target.state, target.param_groups, *inner], written
    return _containers([getattr(target, "__dict__", None)]), [], []


def _containers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, (dict, list))]


def _tensors(container: Any) -> list[torch.Tensor]:
    values = container.values() if isinstance(container, dict) else container
    return [value for value in values if isinstance(value, torch.Tensor)]


def _copy_state(state: Any, held: list[torch.Tensor]) -> Any:
    """Copy a state dict, except tensors that are held, or are views of all of one that is."""
    known = {_extent(tensor) for tensor in held}
    shared = [*held, *(_tensors(state) if isinstance(state, dict) else ())]
    return copy.deepcopy(state, {id(tensor): tensor for tensor in shared if _extent(tensor) in known})


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


def _extent(tensor: torch.Tensor) -> object:
    if not is_plain_tensor(tensor) or tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
