"""Which storages hold still until an optimizer steps: its parameters, and its state."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import Optimizer

from asyncckpt._snapshot.fences import seen, stepping, watch_steps, why_not

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from torch.storage import UntypedStorage

# Where wrappers of Lightning, Fabric, Accelerate and torch have the optimizer that steps.
_WRAPPED_AS = ("_optimizer", "optimizer", "optim")
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


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

        They are listed by the identity of their storage. Left out are tensors that are not plain, and those
        without a version counter (inference tensors).
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


def is_covered(storage: UntypedStorage, tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether `tensors` take all bytes of their storage: nobody else has a part of it."""
    if not tensors or any(tensor.nbytes == storage.nbytes() for tensor in tensors):
        return bool(tensors)
    spans = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor.is_contiguous())
    end = storage.data_ptr()
    for start, nbytes in spans:
        if start > end:
            return False
        end = max(end, start + nbytes)
    return end == storage.data_ptr() + storage.nbytes()


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
    """Return the identity of the storage of a plain tensor that has a version counter."""
    if type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_inference():
        storage: int = tensor.untyped_storage()._cdata
        return storage
    return None
