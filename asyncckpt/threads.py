"""Run blocking functions off the event loop, and tasks side by side; errors come out as themselves."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import create_task_group, to_thread

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from anyio import CapacityLimiter
    from anyio.abc import TaskGroup

S = TypeVar("S")
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


@asynccontextmanager
async def tasks() -> AsyncIterator[TaskGroup]:
    """Open a task group that raises the first error of its tasks, rather than a group of all of them."""
    try:
        async with create_task_group() as group:
            yield group
    except BaseExceptionGroup as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from first.__cause__


async def for_each(func: Callable[[S], Awaitable[T]], items: Iterable[S], at_once: int) -> list[T]:
    """Call `func` with each item, in order, and with several at once; returns the results in no order."""
    results: list[T] = []
    left = iter(items)

    async def work() -> None:
        for item in left:
            results.append(await func(item))  # noqa: PERF401 - it is shared

    async with tasks() as group:
        for _ in range(at_once):
            group.start_soon(work)
    return results
