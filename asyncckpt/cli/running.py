"""Run asynchronous functions from a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from anyio import CancelScope

from asyncckpt.engine import get_engine
from asyncckpt.threads import tasks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

S = TypeVar("S")
T = TypeVar("T")

# Small reads, of which a store takes more at once than of bulk reads.
_READERS = 8


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


async def for_each(func: Callable[[S], Awaitable[T]], items: Iterable[S]) -> list[T]:
    """Call `func` for each item, several at once; returns the results in no order."""
    results: list[T] = []
    left = iter(items)

    async def work() -> None:
        for item in left:
            results.append(await func(item))  # noqa: PERF401 - it is shared

    async with tasks() as group:
        for _ in range(_READERS):
            group.start_soon(work)
    return results
