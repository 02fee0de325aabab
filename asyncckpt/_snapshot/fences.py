"""Hooks of every optimizer step: they end copies of what the step changes, and note who steps."""

from __future__ import annotations

import os
import weakref
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from asyncckpt._threads import Condition

if TYPE_CHECKING:
    from collections.abc import Callable


class Fenced(Protocol):
    """What has to end before an optimizer steps."""

    def reads_from(self, optimizer: Optimizer) -> bool:
        """Return whether a step of `optimizer` changes what is read."""

    def fence(self) -> None:
        """End it; never raises, but for an interrupt."""


_changed = Condition()
_pending: tuple[Fenced, ...] = ()
_watchers: weakref.WeakSet[Callable[[Optimizer], object]] = weakref.WeakSet()
# Why nothing is deferred until the next step of an optimizer; empty if its hooks will run before that.
_reasons: weakref.WeakKeyDictionary[Optimizer, str] = weakref.WeakKeyDictionary()


@cache
def watch_steps() -> None:
    """Hook the steps of all optimizers of this process, once.

    The hooks stay: to remove one could change torch's dict while another thread runs its hooks.
    """
    # torch.compile would trace them, and compile anew whenever something that they read has changed.
    register_optimizer_step_pre_hook(torch.compiler.disable(asyncckpt_fence))
    register_optimizer_step_post_hook(torch.compiler.disable(asyncckpt_stepped))


def stepping() -> list[Optimizer]:
    """Return the optimizers whose last step since `watch_steps` ran the hooks, and whose next one will."""
    with _changed:
        return [optimizer for optimizer, reason in _reasons.items() if not reason]


def seen() -> list[Optimizer]:
    """Return the optimizers that have begun a step since `watch_steps`."""
    with _changed:
        return list(_reasons)


def why_not(optimizer: Optimizer) -> str:
    """Return why an optimizer is not in `stepping`."""
    return _reasons.get(optimizer) or f"no step of {type(optimizer).__name__} was seen yet"


def add(fenced: Fenced) -> None:
    """Fence something before the next step of any optimizer that changes what it reads."""
    global _pending  # noqa: PLW0603 - optimizers are hooked process-wide
    with _changed:
        _pending = (*_pending, fenced)


def remove(fenced: Fenced) -> None:
    """Fence it no more."""
    global _pending  # noqa: PLW0603
    with _changed:
        _pending = tuple(other for other in _pending if other is not fenced)


def pending() -> tuple[Fenced, ...]:
    """Return what is still to be fenced."""
    return _pending


def watch(watcher: Callable[[Optimizer], object]) -> None:
    """Call `watcher`, which is not kept alive, with an optimizer before each step, behind its fences."""
    with _changed:
        _watchers.add(watcher)


def unwatch(watcher: Callable[[Optimizer], object]) -> None:
    """Call `watcher` no more."""
    with _changed:
        _watchers.discard(watcher)


def watchers() -> list[Callable[[Optimizer], object]]:
    """Return what is called before each step."""
    with _changed:
        return list(_watchers)


def asyncckpt_fence(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Fence all copies of what a step of `optimizer` changes; its name is shown by torch.compile."""
    # A save in its closure, in a later hook or in a signal handler would not be fenced.
    _note(optimizer, f"a step of {type(optimizer).__name__} was under way")
    copies = [copy for copy in _pending if copy.reads_from(optimizer)]
    watching = watchers() if _watchers else []
    if not copies and not watching:
        return None

    def fence() -> None:
        for copy in copies:
            copy.fence()
        for watcher in watching:
            watcher(optimizer)

    # A closure computes the gradients: torch's own optimizers change nothing before it has returned once.
    if getattr(type(optimizer).step, "__wrapped__", fence).__module__.startswith("torch.optim."):
        if len(args) > 1 and callable(args[1]):
            return (args[0], _then(args[1], fence), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": _then(kwargs["closure"], fence)}
    fence()
    return None


def asyncckpt_stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Note the end of a step."""
    del args, kwargs
    captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    # Replays of a CUDA graph run no hooks.
    kind = type(optimizer).__name__
    _note(optimizer, f"the step of {kind} was captured into a CUDA graph" if captured else "")


def _note(optimizer: Optimizer, reason: str) -> None:
    with _changed:
        _reasons[optimizer] = reason


def _then(closure: Callable[..., Any], fence: Callable[[], None]) -> Callable[..., Any]:
    @wraps(closure)
    def fenced(*args: Any, **kwargs: Any) -> Any:
        result = closure(*args, **kwargs)
        fence()
        return result

    return fenced


def _reset_in_child() -> None:
    global _pending  # noqa: PLW0603
    _pending = ()
    _watchers.clear()


os.register_at_fork(after_in_child=_reset_in_child)
