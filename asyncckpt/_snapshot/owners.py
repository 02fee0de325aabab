"""Which memory holds still until an optimizer steps: its parameters, and its state."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import Optimizer

from asyncckpt._snapshot.fences import seen, stepping, watch_steps, why_not
from asyncckpt._snapshot.local_tensors import PLAIN, local_of
from asyncckpt._snapshot.ranges import is_dense

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from torch.storage import UntypedStorage

# Where wrappers of Lightning, Fabric, Accelerate and torch have the optimizer that steps.
_WRAPPED_AS = ("_optimizer", "optimizer", "optim")


class Owners:
    """The optimizers whose parameters and state may be copied until their next step.

    They are not kept alive.

    Args:
        everyone: all optimizers of the process, attached or not.
    """

    def __init__(self, *, everyone: bool = False) -> None:
        self._everyone = everyone
        self._attached: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def __contains__(self, optimizer: Optimizer) -> bool:
        return self._everyone or optimizer in self._attached

    def attach(self, optimizers: Iterable[Any]) -> None:
        """Add optimizers, or what they wrap.

        Raises:
            TypeError: one is not a `torch.optim.Optimizer` whose steps run hooks; none was added.
        """
        found = []
        for optimizer in optimizers:
            inner = hooked(optimizer)
            if inner is None:
                raise TypeError(
                    f"a {type(optimizer).__name__} is no torch.optim.Optimizer with step hooks: nothing tells"
                    " when it changes parameters; save with overlap=False"
                )
            found.append(inner)
        watch_steps()
        self._attached.update(found)

    def tensors(self, optimizers: Iterable[Optimizer] | None = None) -> dict[int, list[torch.Tensor]]:
        """Return the parameters, and the tensors of the state, of those that are `stepping`, or given.

        They are listed by the identity of their storage, a DTensor by that of its local tensor. Left out are
        tensors that are not plain otherwise, and those without a version counter (inference tensors).
        """
        owned: dict[int, list[torch.Tensor]] = {}
        for optimizer in stepping() if optimizers is None else optimizers:
            if optimizer in self:
                for tensor in _tensors_of(optimizer):
                    if (storage := _storage_of(tensor)) is not None:
                        owned.setdefault(storage, []).append(tensor)
        return owned

    def why_none(self) -> str:
        """Return why `tensors` has found nothing."""
        candidates = seen() if self._everyone else list(self._attached)
        if self._everyone and not candidates:
            return "no step of an optimizer was seen yet"
        deferred = stepping()
        missing = [optimizer for optimizer in candidates if optimizer not in deferred]
        return why_not(missing[0]) if missing else "nothing of the state belongs to an attached optimizer"


def hooked(optimizer: Any) -> Optimizer | None:
    """Return `optimizer`, or the one that it wraps, if its steps run the hooks of all optimizers."""
    if isinstance(optimizer, Optimizer) and hasattr(type(optimizer).step, "hooked"):
        return optimizer
    inner = (vars(optimizer).get(name) for name in _WRAPPED_AS if hasattr(optimizer, "__dict__"))
    return next((one for one in inner if isinstance(one, Optimizer) and hooked(one) is one), None)


class Coverage:
    """Which memory tensors take as a whole: nobody else has a part of it.

    Args:
        owned: tensors, by the identity of their storage.
    """

    def __init__(self, owned: Mapping[int, Sequence[torch.Tensor]]) -> None:
        self._owned = owned
        self._spans: dict[int, tuple[list[int], list[int]]] = {}

    def includes(self, storage: UntypedStorage, offset: int, nbytes: int) -> bool:
        """Return whether all of these bytes of a storage belong to its tensors."""
        tensors = self._owned.get(storage._cdata)
        if not tensors:
            return False
        spans = self._spans.get(storage._cdata)
        if spans is None:
            spans = self._spans[storage._cdata] = _spans(tensors)
        starts, stops = spans
        index = bisect_right(starts, offset) - 1
        return index >= 0 and offset + nbytes <= stops[index]


def _spans(tensors: Iterable[torch.Tensor]) -> tuple[list[int], list[int]]:
    """Return where tensors start and stop in their storage, those together that lie one after another."""
    starts: list[int] = []
    stops: list[int] = []
    for start, nbytes in sorted(
        (int(local.storage_offset()) * local.itemsize, local.nbytes)
        for local in map(local_of, tensors)
        if local.is_contiguous() or is_dense(local.shape, local.stride())
    ):
        stop = start + nbytes
        if stops and start <= stops[-1]:
            stops[-1] = max(stops[-1], stop)
        else:
            starts.append(start)
            stops.append(stop)
    return starts, stops


def changes(optimizer: Optimizer, storages: Collection[int], tensors: Collection[int]) -> bool:
    """Return whether a step of `optimizer` changes memory, or the version counters, of what is copied.

    Args:
        optimizer: whose parameters and state are looked at.
        storages: identities of the storages that are copied.
        tensors: identities of the tensors that had them. A parameter that was given other memory
            (`model.to(dtype)`, `p.data = x`) still shares its counter with the old one.
    """
    return any(id(tensor) in tensors or _storage_of(tensor) in storages for tensor in _tensors_of(optimizer))


def _tensors_of(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """Yield the parameters of an optimizer, then the tensors of its state, also those in lists and dicts."""
    for group in optimizer.param_groups:
        yield from group["params"]
    pending: list[Any] = [optimizer.state]
    while pending:
        value = pending.pop()
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, torch.Tensor):
                yield item
            elif isinstance(item, (dict, list, tuple)):
                pending.append(item)


def _storage_of(tensor: torch.Tensor) -> int | None:
    """Return the identity of the storage of a plain tensor, or a local one, that has a version counter."""
    local = tensor if type(tensor) in PLAIN else local_of(tensor)
    if type(local) in PLAIN and local.layout is torch.strided and not local.is_inference():
        storage: int = local.untyped_storage()._cdata
        return storage
    return None
