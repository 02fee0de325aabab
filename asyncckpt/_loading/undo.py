"""Hold what a restore is about to change, so that it can be put back."""

from __future__ import annotations

import copy
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from asyncckpt._loading.fitting import is_dense, is_stock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    """Return what gives a tensor its present memory and values back; the values are copied."""
    kind: type = type(tensor)
    data = tensor.data
    content = None if is_lazy(tensor) else data.clone()

    def write() -> None:
        if content is None or is_dense(tensor):
            tensor.data = data
            tensor.__class__ = kind  # a lazy one becomes another when it is filled
        if content is not None:
            with torch.no_grad():
                tensor.copy_(content)

    return [write]


def hold_stateful(target: Any) -> list[Step]:
    """Return what puts an object back as it is now.

    Attributes are bound again to what they were. Modules get their parameters and buffers back, of the same
    identity. If code of others takes part in its loading, the object loads its old state dict, too.
    """
    containers = [vars(target)] if hasattr(target, "__dict__") else []
    tensors: list[torch.Tensor] = []
    if isinstance(target, torch.nn.Module):
        for part in target.modules():
            containers += [vars(part), part._parameters, part._buffers, part._modules]
        tensors = [*target.parameters(), *target.buffers()]
    hold = [step for container in containers for step in hold_container(container)]
    hold += [step for tensor in tensors for step in hold_tensor(tensor)]
    if is_stock(target):
        return hold
    state = target.state_dict()
    # What is held above is not copied again.
    held = {tensor.data_ptr() for tensor in tensors if is_dense(tensor)}
    values = [value for value in state.values() if isinstance(value, torch.Tensor)] if tensors else []
    memo = {id(value): value for value in values if is_dense(value) and value.data_ptr() in held}
    state = copy.deepcopy(state, memo)

    def load() -> None:
        with suppress(Exception):  # what cannot be compared is loaded
            if _equal(target.state_dict(), state):
                return
        target.load_state_dict(state)

    # A module may put other tensors in their places again.
    return [*hold, load, *(hold if tensors else [])]


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
