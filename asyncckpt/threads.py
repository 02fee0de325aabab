"""Run blocking functions off the event loop, also while the interpreter is shutting down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from anyio import to_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio import CapacityLimiter

T = TypeVar("T")


async def in_thread(func: Callable[..., T], *args: Any, limiter: CapacityLimiter | None = None) -> T:
    """Call `func` on a worker thread; a cancelled caller waits until it has returned.

    From Python 3.12 on no thread is started once the interpreter has begun to shut down, which is when the
    last saves are finished. Then `func` runs where it is.
    """
    called = False

    def call() -> T:
        nonlocal called
        called = True
        return func(*args)

    try:
        return await to_thread.run_sync(call, limiter=limiter)
    except RuntimeError:
        if called:
            raise
        return func(*args)
