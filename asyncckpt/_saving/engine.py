"""The one engine of a process: an event loop in a thread, the arena, and an ordered queue of operations."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from asyncckpt._saving.engine_threads import EngineThreads, in_callback
from asyncckpt._snapshot.arena import Arena
from asyncckpt._threads import Condition, handler_error, is_locked_by_caller
from asyncckpt.errors import BusyError, SaveError
from asyncckpt.types import Statistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from asyncckpt._saving.engine_threads import Next

T = TypeVar("T")
logger = logging.getLogger("asyncckpt")

# Default limit, as a share of the physical memory.
_SHARE_OF_MEMORY = 0.75
_SHUTTING_DOWN = "the interpreter is shutting down; save, load and list earlier"


class Operation(ABC):
    """One entry of the queue.

    Args:
        effects: path -> whether it will exist after this operation; empty once the outcome is known.

    Attributes:
        begun: whether it runs, or has run.
        withdrawn: whether it was withdrawn before it began.
    """

    begun = False
    withdrawn = False

    def __init__(self, effects: Mapping[str, bool]) -> None:
        self.effects = effects

    @abstractmethod
    async def run(self) -> None:
        """Run on the engine's event loop, and handle all errors."""

    def finished(self) -> None:  # noqa: B027 - most have nothing to do then
        """Called after it has run and was removed from the queue."""

    def awaits_caller(self) -> bool:
        """Return whether it cannot end before the calling thread continues its copy."""
        return False


class Engine:
    """Run operations in the background, one after another, in the order of submission."""

    def __init__(self, memory_limit: int | None = None) -> None:
        self.arena = Arena(memory_limit)
        self.given_up = False
        self._starting = threading.RLock()  # a signal handler that saves may break in anywhere
        self._changed = Condition()
        self._queue: list[Operation] = []  # the first one may have begun
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._calls: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()
        self._releasing = False
        self._threads: EngineThreads | None = None

    def __repr__(self) -> str:
        return f"<Engine depth={self.depth()} arena={self.arena!r}>"

    def depth(self) -> int:
        """Return the number of pending operations, the running one included."""
        return len(self._queue)

    def submit(self, operation: Operation) -> None:
        """Append `operation` to the queue.

        This does not wake the event loop itself, which would take the interpreter from the caller: the queue
        thread runs when the caller next blocks.
        """
        if _ended:
            raise SaveError(_SHUTTING_DOWN)
        self.given_up = False  # what is given up is what was pending
        with self._changed:
            if not operation.withdrawn:
                self._queue.append(operation)
        try:
            self._started()
        except BaseException:
            self.withdraw(operation)
            raise
        self._changed.notify_all()

    def withdraw(self, operation: Operation) -> bool:
        """Remove `operation` from the queue, or keep it from being queued; return False if it has begun."""
        with self._changed:
            if operation.begun:
                return False
            operation.withdrawn = True
            if operation in self._queue:
                self._queue.remove(operation)
        self._changed.notify_all()
        return True

    def pending(self, path: str) -> bool | None:
        """Return whether `path` will exist after all queued operations; None if none of them changes it."""
        with self._changed:
            return next((op.effects[path] for op in reversed(self._queue) if path in op.effects), None)

    def call(self, func: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run an async function on the engine's loop, not in the queue, and return its result.

        An exception that a signal handler raises meanwhile cancels it.

        Raises:
            BusyError: called by a signal handler that interrupted a holder of the lock.
        """
        if is_locked_by_caller():
            raise handler_error("access to the store")
        calling = partial(func, *args)
        with self._changed:
            unused = self._threads is None and self._is_unused()
            self._calls.add(calling)
        try:
            return self._started().call(calling)
        finally:
            self._calls.discard(calling)
            if unused:
                self._release_if_unused()
            self._changed.notify_all()

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until the queue is empty; return whether it is."""
        return self._changed.until(lambda: not self._queue, timeout)

    def refuse_to_wait(self, what: str, *, broken_into: bool = False) -> None:
        """Raise if the calling thread would wait for itself.

        Args:
            what: the call, for the message.
            broken_into: whether the caller is known to be a signal handler that interrupted a save.

        Raises:
            BusyError: called in a callback of an operation, or in a signal handler that interrupted a copy.
        """
        if in_callback():
            raise BusyError(
                f"{what} was called in a callback of a save and would wait for itself; call it in the"
                " training loop or in another thread"
            )
        with self._changed:
            copying = any(operation.awaits_caller() for operation in self._queue)
        if broken_into or copying or is_locked_by_caller():
            raise handler_error(what)

    def give_up(self) -> list[str]:
        """Let the process end with operations pending; return the paths that they would have created."""
        self.given_up = True
        with self._changed:
            return [path for operation in self._queue for path, made in operation.effects.items() if made]

    def use(self, user: object) -> None:
        """Keep threads and host memory between operations until `user` leaves or is garbage-collected."""
        if _ended:
            raise SaveError(_SHUTTING_DOWN)
        with self._changed:
            self._releasing = False
            if user not in self._users:
                weakref.finalize(user, self._release_if_unused).atexit = False
                self._users.add(user)

    def start(self) -> None:
        """Start the threads, which release host memory once nobody uses it."""
        self._started()

    def leave(self, user: object) -> None:
        """End a use; after the last one, release threads and host memory once the queue is empty."""
        with self._changed:
            self._users.discard(user)
        self._release_if_unused()
        if self._releasing and not self._is_busy():
            self._wait_for_release()

    def release(self) -> None:
        """Finish the queue, then end the threads and unmap free host memory.

        The next operation starts them again.
        """
        self.drain()
        self._releasing = True
        self._changed.notify_all()
        self._wait_for_release()

    def statistics(self) -> Statistics:
        """Return what the engine holds now."""
        arena = self.arena.statistics()
        threads = self._threads
        return Statistics(
            pending=len(self._queue),
            threads=sum(
                thread.name.startswith("asyncckpt") or (threads is not None and threads.is_worker(thread))
                for thread in threading.enumerate()
            ),
            memory=arena.mapped,
            in_use=arena.leased,
        )

    def _release_if_unused(self) -> None:
        # Also called by the garbage collector, so it must not wait.
        if self._is_unused():
            self._releasing = True
            self._changed.notify_all()

    def _is_unused(self) -> bool:
        with self._changed:
            return not list(self._users)  # the length may count one that is being collected

    def _is_busy(self) -> bool:
        return bool(self._queue or self._calls) and not _ended

    def _wait_for_release(self) -> None:
        """Wait until the threads have ended, unless a new use keeps them."""
        threads = self._threads
        if threads is None:
            self.arena.release()  # memory can be reserved without threads
        elif not threads.owns_caller():  # a finalizer that closes may run on any of them
            self._changed.until(
                lambda: self._threads is not threads or not self._releasing or self._is_busy()
            )
            if self._threads is not threads:
                threads.join()

    def _started(self) -> EngineThreads:
        with self._starting:
            if self._threads is None:
                if _ended:
                    raise SaveError(_SHUTTING_DOWN)
                threads = EngineThreads(self._next, self.arena.release)
                try:
                    threads.begin()
                    self._adopt(threads)
                finally:
                    if self._threads is not threads:  # interrupted; or a signal handler has started others
                        threads.ending = True
                        self._changed.notify_all()
            return self._threads or threads

    def _adopt(self, threads: EngineThreads) -> None:
        if self._threads is None:
            self._threads, self._releasing = threads, False

    def _next(self, threads: EngineThreads) -> Next | None:
        """Wait for the next operation and mark it as begun; None if the threads have to end."""
        taken: list[Operation] = []

        def attempt() -> bool:
            if self._queue and not self._queue[0].begun and not threads.ending:
                self._queue[0].begun = True
                taken.append(self._queue[0])
            elif (
                self._releasing
                and not self._queue
                and (_ended or not self._calls)
                and self._threads is threads
            ):
                threads.ending, self._threads = True, None
            return bool(taken) or threads.ending

        self._changed.until(attempt)
        if taken:
            return taken[0].run, partial(self._finished, taken[0])
        self._changed.notify_all()  # to those who wait for the end of the threads
        return None

    def _finished(self, operation: Operation) -> None:
        with self._changed:
            self._queue.remove(operation)
        operation.finished()
        self._changed.notify_all()


def wait_for_pending() -> None:
    """Wait for all pending operations of this process; in a callback of a save, return at once.

    Raises:
        BusyError: called by a signal handler that interrupted a copy.
    """
    if _engine is not None and not in_callback():
        _engine.refuse_to_wait("a load")
        _engine.drain()


def get_engine() -> Engine:
    """Return the engine of this process, created on first use; a forked child creates its own."""
    global _engine  # noqa: PLW0603 - one per process is the point
    with _engine_lock:
        if _engine is None:
            _engine = Engine(_default_limit())
        return _engine


def set_memory_limit(nbytes: int | None) -> None:
    """Limit the host memory of all snapshots of this process together.

    The default is three quarters of the physical memory. A save that does not fit waits until earlier ones
    are written; one that is larger than the limit fails.

    Args:
        nbytes: the limit in bytes, or None for no limit.
    """
    if nbytes is not None and nbytes <= 0:
        raise ValueError(f"the memory limit must be positive or None, not {nbytes}")
    get_engine().arena.set_limit(nbytes)


def release() -> None:
    """Wait for pending operations, then release host memory and end the threads of asyncckpt.

    Without this call, that happens when the last `Checkpointer` or plugin of the process is closed or
    garbage-collected. The next save allocates and starts them again.

    Raises:
        BusyError: called in a callback, or by a signal handler that interrupted a save.
    """
    engine = get_engine()
    engine.refuse_to_wait("release()")
    engine.release()


def statistics() -> Statistics:
    """Return what asyncckpt holds in this process: pending operations, threads and host memory."""
    return get_engine().statistics()


def at_exit(report: Callable[[], object]) -> None:
    """Call `report` at the exit of the interpreter, after all pending operations."""
    _reports.append(report)


def _default_limit() -> int:
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _SHARE_OF_MEMORY)


def finish_at_exit() -> None:
    """Finish pending operations when no other thread saves any more; Ctrl-C abandons and prints them."""
    try:
        _finish()
    finally:
        _print_given_up()


def _print_given_up() -> None:
    """Print pending paths, once. Also an `atexit` function, in case the exit hook was interrupted."""
    if _engine is not None and not _engine.given_up:
        for path in _engine.give_up():
            sys.stderr.write(f"asyncckpt: {path} is given up, as the exit was interrupted\n")


def _finish() -> None:
    global _ended  # noqa: PLW0603
    _ended = True  # from here on saves of daemon threads are refused
    if _engine is not None and not _engine.given_up:
        depth, began = _engine.depth(), time.monotonic()
        _engine.release()
        if depth:
            logger.info("finished %d pending operations at exit in %.1f s", depth, time.monotonic() - began)
    for report in _reports:
        report()


def _reset_in_child() -> None:
    global _engine, _engine_lock  # noqa: PLW0603
    _engine_lock = threading.RLock()
    _engine = None


_engine: Engine | None = None
_ended = False
_engine_lock = threading.RLock()
_reports: list[Callable[[], object]] = []
atexit.register(_print_given_up)
os.register_at_fork(after_in_child=_reset_in_child)
