"""Run blocking functions off the event loop, and tasks side by side; wait for what other threads change."""

from __future__ import annotations

import os
import sys
import time
from _thread import RLock, start_new_thread
from contextlib import asynccontextmanager, suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import create_task_group, to_thread

from asyncckpt.errors import BusyError

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
    from threading import Thread

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


def uninterrupted(func: Callable[[], T]) -> T:
    """Call `func` in another thread, where signal handlers do not interrupt it, and return its result."""
    answer: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def call() -> None:
        try:
            answer.put((func(), None))
        except BaseException as error:  # noqa: BLE001 - raised by the caller
            answer.put((None, error))

    try:
        start_new_thread(call, ())
    except RuntimeError:  # a limit, or the interpreter is shutting down
        call()
    result, error = answer.get()
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def start_threads(threads: Iterable[Thread], into: list[Thread]) -> None:
    """Start threads, each of them then appended to `into`.

    An interrupted `Thread.start` would leave a thread that runs and that nobody knows of.

    Raises:
        RuntimeError: the system or a limit refuses one.
    """

    def start() -> None:
        for thread in threads:
            thread.start()
            into.append(thread)

    uninterrupted(start)


# Whoever waits looks again after this many seconds at the latest: a thread that is interrupted between a
# change and its notice would otherwise be waited for in vain.
_LOOK_AGAIN = 1.0
# One lock for all, held for moments only: so a signal handler can tell whether it broke into one of them.
_lock = RLock()


def is_locked_by_caller() -> bool:
    """Return whether the calling thread holds the lock: a signal handler that finds it held broke into that.

    Whatever other threads do then has to wait until the handler has returned, and what the lock guards may be
    half changed.
    """
    owned: bool = _lock._is_owned()  # type: ignore[attr-defined]
    return owned


def handler_error(what: str) -> BusyError:
    """Return the error that tells a signal handler that it cannot do `what` here, and what to do instead."""
    return BusyError(
        f"{what} was called by a signal handler that broke into asyncckpt, and would wait for itself; set a"
        " flag in the handler and act on it in the loop (see asyncckpt.StopOnSignal)"
    )


class Condition:
    """A condition variable that exceptions raised by signal handlers leave usable.

    `threading.Condition` does not: its `__enter__` is Python code, in which a KeyboardInterrupt may come when
    the lock is taken already, and then nobody releases it. This one is entered by C code alone, and nobody
    waits while holding the lock. A `concurrent.futures.Future` can have one in place of its own.
    """

    __enter__ = _lock.__enter__
    __exit__ = _lock.__exit__
    acquire = _lock.acquire
    release = _lock.release

    def __init__(self) -> None:
        self._bells: set[SimpleQueue[None]] = set()

    def until(self, attempt: Callable[[], T], timeout: float | None = None) -> T:
        """Call `attempt` under the lock, again after each change, until it returns something true.

        Returns:
            What it returned last; after `timeout` seconds that is something false.

        Raises:
            BusyError: this is a signal handler that broke into a use of the lock.
        """
        if is_locked_by_caller():
            raise handler_error("a wait")
        with self:
            result = attempt()
        if result or timeout == 0:
            return result
        end = None if timeout is None else time.monotonic() + timeout
        bell: SimpleQueue[None] = SimpleQueue()
        try:
            self._bells.add(bell)
            while True:
                with self:
                    result = attempt()
                left = _LOOK_AGAIN if end is None else min(end - time.monotonic(), _LOOK_AGAIN)
                if result or left <= 0:
                    return result
                with suppress(Empty):
                    bell.get(timeout=left)
        finally:
            self._bells.discard(bell)

    def notify_all(self) -> None:
        """Have all who wait try again."""
        for bell in tuple(self._bells):
            bell.put(None)


os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]


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
