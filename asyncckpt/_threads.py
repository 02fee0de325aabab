"""Run blocking functions off the event loop and tasks concurrently; wait for changes by other threads."""

from __future__ import annotations

import os
import sys
import time
from _thread import LockType, RLock, allocate_lock, start_new_thread
from contextlib import asynccontextmanager, suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import create_task_group, sleep_forever, to_thread

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

    From Python 3.12 on no thread can be started during the shutdown of the interpreter, in which the last
    saves are finished. `func` then runs on the calling thread.
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


def held_lock() -> LockType:
    """Return a lock to wait for, which its holder releases.

    CPython's `SimpleQueue.get` waits forever if its timeout is over when it has taken a lock that was free,
    or when a signal handler has returned that interrupted it.
    """
    lock = allocate_lock()
    lock.acquire()
    return lock


def uninterrupted(func: Callable[[], T]) -> T:
    """Call `func` in another thread, where no signal handler interrupts it, and return its result."""
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
    """Start threads, and append each one to `into`.

    A `Thread.start` that a signal handler interrupts would leave a running thread without a reference to it.

    Raises:
        RuntimeError: the system or a limit refuses one.
    """

    def start() -> None:
        for thread in threads:
            thread.start()
            into.append(thread)

    uninterrupted(start)


# Waiters check again after this many seconds: a thread may be interrupted between a change and its notice.
_LOOK_AGAIN = 1.0
# One lock for all conditions, held only briefly: a signal handler can check whether it interrupted a holder.
_lock = RLock()


def is_locked_by_caller() -> bool:
    """Return whether the calling thread holds the lock; in a signal handler, whether it interrupted a holder.

    Other threads then wait for the lock until the handler returns, and guarded data may be half changed.
    """
    owned: bool = _lock._is_owned()  # type: ignore[attr-defined]
    return owned


def handler_error(what: str) -> BusyError:
    """Return the error for a signal handler that called `what` while it interrupted asyncckpt."""
    return BusyError(
        f"{what} was called by a signal handler that interrupted asyncckpt, and would wait for itself; set a"
        " flag in the handler and act on it in the loop (see asyncckpt.StopOnSignal)"
    )


class Condition:
    """A condition variable that stays usable when a signal handler raises an exception.

    `threading.Condition` does not: its `__enter__` is Python code, in which a KeyboardInterrupt can leave the
    lock taken forever. This one is entered in C code only, and waits without holding the lock. It can replace
    the condition of a `concurrent.futures.Future`.
    """

    __enter__ = _lock.__enter__
    __exit__ = _lock.__exit__
    acquire = _lock.acquire
    release = _lock.release

    def __init__(self) -> None:
        self._wakeups: set[LockType] = set()

    def until(self, attempt: Callable[[], T], timeout: float | None = None) -> T:
        """Call `attempt` under the lock, and again after each change, until its result is true.

        Returns:
            The last result, which is false after `timeout` seconds.

        Raises:
            BusyError: called by a signal handler that interrupted a holder of the lock.
        """
        if is_locked_by_caller():
            raise handler_error("a wait")
        with self:
            result = attempt()
        if result or timeout == 0:
            return result
        end = None if timeout is None else time.monotonic() + timeout
        wakeup = held_lock()
        try:
            self._wakeups.add(wakeup)
            while True:
                with self:
                    result = attempt()
                left = _LOOK_AGAIN if end is None else min(end - time.monotonic(), _LOOK_AGAIN)
                if result or left <= 0:
                    return result
                wakeup.acquire(timeout=left)
        finally:
            self._wakeups.discard(wakeup)

    def notify_all(self) -> None:
        """Wake all waiters."""
        for wakeup in tuple(self._wakeups):
            with suppress(RuntimeError):  # it was woken, and has not looked yet
                wakeup.release()


os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]


@asynccontextmanager
async def tasks() -> AsyncIterator[TaskGroup]:
    """Open a task group that raises the first error of its tasks instead of an exception group."""
    try:
        async with create_task_group() as group:
            yield group
    except BaseExceptionGroup as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from first.__cause__


async def for_each(func: Callable[[S], Awaitable[T]], items: Iterable[S], at_once: int) -> list[T]:
    """Call `func` with each item, `at_once` at a time; return the results in any order."""
    results: list[T] = []
    left = iter(items)

    async def work() -> None:
        for item in left:
            results.append(await func(item))  # noqa: PERF401 - the list is shared

    async with tasks() as group:
        for _ in range(at_once):
            group.start_soon(work)
    return results


async def for_each_in_threads(func: Callable[[S], object], items: Iterable[S], at_once: int) -> None:
    """Call blocking `func` with each item, on `at_once` threads; each takes the next item itself.

    That saves a task switch an item. A cancelled caller waits for the calls that run, and no others begin.

    Args:
        func: what to call.
        items: several threads advance their iterator; that of a list allows it.
        at_once: how many threads.
    """
    stopped = False
    left = iter(items)

    def work() -> None:
        nonlocal stopped
        try:
            for item in left:
                if stopped:
                    return
                func(item)
        except BaseException:
            stopped = True
            raise

    async def stop_if_cancelled() -> None:
        nonlocal stopped
        try:
            await sleep_forever()
        finally:
            stopped = True

    async with tasks() as group:
        group.start_soon(stop_if_cancelled)
        async with tasks() as workers:
            for _ in range(at_once):
                workers.start_soon(in_thread, work)
        group.cancel_scope.cancel()
