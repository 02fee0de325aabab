"""Run asynchronous functions from a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from anyio import CancelScope

from asyncckpt.engine import get_engine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")


def call(func: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Run an async function on the engine's loop and wait for its result; Ctrl-C ends it."""
    scopes: list[CancelScope] = []
    results: list[T] = []

    async def run() -> None:
        with CancelScope() as scope:
            scopes.append(scope)
            results.append(await func(*args))

    async def cancel() -> None:
        for scope in scopes:
            scope.cancel()

    try:
        get_engine().call(run)
    except KeyboardInterrupt:
        # Otherwise the process would not end before all is read.
        get_engine().call(cancel)
        raise
    return results[0]
