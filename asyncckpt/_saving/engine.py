"""The one engine of a process: an event loop in a thread, the arena, and an ordered line of operations."""

from __future__ import annotations

import atexit
import concurrent.futures.thread as executors  # its exit hook must be there before ours, to run after it
import logging
import os
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from asyncckpt._saving.engine_threads import EngineThreads, in_callback
from asyncckpt._snapshot.arena import Arena
from asyncckpt._threads import Condition, handler_error, is_locked_by_caller
from asyncckpt.errors import BusyError, SaveError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from asyncckpt._saving.engine_threads import Next

T = TypeVar("T")
logger = logging.getLogger("asyncckpt")

# Left to the rest of the job when no limit is set, as a share of the physical memory.
_SHARE_OF_MEMORY = 0.75
_SHUTTING_DOWN = "the interpreter is shutting down; save, load and list before it does"


class Operation(ABC):
    """One entry of the line.

    Args:
        effects: path -> whether something is there once this has been carried out; cleared when that is so,
            or will not be.

    Attributes:
        begun: whether it is being carried out, or has been.
        withdrawn: whether it is not to be carried out.
    """

    begun = False
    withdrawn = False

    def __init__(self, effects: Mapping[str, bool]) -> None:
        self.effects = effects

    @abstractmethod
    async def run(self) -> None:
        """Carry it out, on the engine's event loop; deals with its own errors."""

    def left(self) -> None:  # noqa: B027 - most need not know
        """Called when it has been carried out and is out of the line."""

    def awaits_caller(self) -> bool:
        """Return whether it cannot end before the calling thread goes on copying."""
        return False


@dataclass(frozen=True, slots=True)
class Statistics:
    """What asyncckpt holds in this process.

    Attributes:
        pending: saves and removals that are not carried out yet.
        threads: threads that run, those that copy included.
        memory: bytes of host memory, in use and free.
        in_use: of those, bytes of snapshots that are being taken or written.
    """

    pending: int
    threads: int
    memory: int
    in_use: int


class Engine:
    """Carries operations out one after another, in the order they were submitted, in the background."""

    def __init__(self, memory_limit: int | None = None) -> None:
        self.arena = Arena(memory_limit)
        self.given_up = False
        self._starting = threading.RLock()  # a signal handler that saves may break in anywhere
        self._changed = Condition()
        self._line: list[Operation] = []  # the first one may have begun
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._calls: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()
        self._releasing = False
        self._threads: EngineThreads | None = None

    def __repr__(self) -> str:
        return f"<Engine depth={self.depth()} arena={self.arena!r}>"

    def depth(self) -> int:
        """Return how many operations are not yet carried out."""
        return len(self._line)

    def submit(self, operation: Operation) -> None:
        """Append `operation` to the line.

        The caller does not let go of the interpreter here, as it would if it woke the event loop itself: the
        thread that waits for operations gets its turn when the caller next blocks.
        """
        if _ended:
            raise SaveError(_SHUTTING_DOWN)
        with self._changed:
            if not operation.withdrawn:
                self._line.append(operation)
        try:
            self._started()
        except BaseException:
            self.withdraw(operation)
            raise
        self._changed.notify_all()

    def withdraw(self, operation: Operation) -> bool:
        """Take `operation` out of the line, where it may not be yet; returns false if it has begun."""
        with self._changed:
            if operation.begun:
                return False
            operation.withdrawn = True
            if operation in self._line:
                self._line.remove(operation)
        self._changed.notify_all()
        return True

    def pending(self, path: str) -> bool | None:
        """Return whether `path` will exist after all that is in the line, or None if none of it tells."""
        with self._changed:
            return next((op.effects[path] for op in reversed(self._line) if path in op.effects), None)

    def call(self, func: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run an async function on the engine's loop, beside the line, and wait for its result.

        An exception that a signal handler raises meanwhile cancels it.

        Raises:
            BusyError: this is a signal handler, and the loop may be waiting for what it broke into.
        """
        if is_locked_by_caller():
            raise handler_error("a look at the store")
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
        """Wait until the line is empty; returns whether it is."""
        return self._changed.until(lambda: not self._line, timeout)

    def refuse_to_wait(self, what: str, *, broken_into: bool = False) -> None:
        """Raise if the calling thread would wait for itself.

        Args:
            what: is called.
            broken_into: whether the caller knows that this is a signal handler which broke into a save.

        Raises:
            BusyError: it is in a callback of an operation, or in a signal handler that broke into a copy.
        """
        if in_callback():
            raise BusyError(
                f"{what} was called in a callback of a save, which would wait for itself; do it in the loop,"
                " or in a thread of its own"
            )
        with self._changed:
            copying = any(operation.awaits_caller() for operation in self._line)
        if broken_into or copying or is_locked_by_caller():
            raise handler_error(what)

    def give_up(self) -> list[str]:
        """Let the process end without what is still in the line; returns the paths that it was to make."""
        self.given_up = True
        with self._changed:
            return [path for operation in self._line for path, made in operation.effects.items() if made]

    def use(self, user: object) -> None:
        """Keep threads and host memory between operations until `user` leaves, or is collected."""
        self._releasing = False
        if user not in self._users:
            weakref.finalize(user, self._release_if_unused).atexit = False
            self._users.add(user)

    def leave(self, user: object) -> None:
        """End a use. With the last one threads and host memory go, as soon as the line is empty."""
        self._users.discard(user)
        self._release_if_unused()
        if self._releasing and not self._line and not self._calls:
            self._wait_for_release()

    def release(self) -> None:
        """Carry out what is in the line, then end the threads and unmap what is free of the host memory.

        The next operation starts them anew.
        """
        self.drain()
        self._releasing = True
        self._changed.notify_all()
        self._wait_for_release()

    def statistics(self) -> Statistics:
        """Return what the engine holds now."""
        arena = self.arena.statistics()
        names = [thread.name for thread in threading.enumerate()]
        return Statistics(
            pending=len(self._line),
            threads=sum(name.startswith("asyncckpt") for name in names),
            memory=arena.mapped,
            in_use=arena.leased,
        )

    def _release_if_unused(self) -> None:
        # Called by the garbage collector, too: nothing is done here that waits.
        if self._is_unused():
            self._releasing = True
            self._changed.notify_all()

    def _is_unused(self) -> bool:
        return not list(self._users)  # one that is being collected may still be counted

    def _wait_for_release(self) -> None:
        """Wait until the threads have ended, unless somebody goes on using them."""
        threads = self._threads
        if threads is None:
            self.arena.release()  # what was taken without them
        else:
            self._changed.until(lambda: self._threads is not threads or not self._releasing)
            if self._threads is not threads:
                threads.join()

    def _started(self) -> EngineThreads:
        with self._starting:
            if self._threads is None:
                if _ended:
                    raise SaveError(_SHUTTING_DOWN)
                threads = EngineThreads(self._next, self.arena.release)
                threads.begin()
                self._threads, self._releasing = threads, False
            return self._threads

    def _next(self, threads: EngineThreads) -> Next | None:
        """Wait for the next operation and begin it; None when the threads are to end."""
        taken: list[Operation] = []

        def attempt() -> bool:
            if self._line and not threads.ending:
                self._line[0].begun = True
                taken.append(self._line[0])
            elif self._releasing and (_ended or not self._calls) and self._threads is threads:
                threads.ending, self._threads = True, None
            return bool(taken) or threads.ending

        self._changed.until(attempt)
        return (taken[0].run, partial(self._finished, taken[0])) if taken else None

    def _finished(self, operation: Operation) -> None:
        with self._changed:
            self._line.remove(operation)
        operation.left()
        self._changed.notify_all()


def wait_for_pending() -> None:
    """Wait until everything submitted in this process is carried out; a callback of a save does not wait.

    Raises:
        BusyError: this is a signal handler that broke into a copy.
    """
    if _engine is not None and not in_callback():
        _engine.refuse_to_wait("a load")
        _engine.drain()


def get_engine() -> Engine:
    """Return the engine of this process, made on first use and anew in a forked child."""
    global _engine  # noqa: PLW0603 - one per process is the point
    with _engine_lock:
        if _engine is None:
            _engine = Engine(_default_limit())
        return _engine


def set_memory_limit(nbytes: int | None) -> None:
    """Cap the host memory that all snapshots of this process take together.

    The default is three quarters of the physical memory. A save that finds no room waits for an earlier one
    to be written; one that is larger than the cap fails.

    Args:
        nbytes: the cap in bytes, or None for no cap.
    """
    if nbytes is not None and nbytes <= 0:
        raise ValueError(f"the memory limit must be positive or None, not {nbytes}")
    get_engine().arena.set_limit(nbytes)


def release() -> None:
    """Carry out what is pending, then give host memory back and end the threads of asyncckpt.

    Otherwise that happens when the last `Checkpointer` or plugin of the process is closed or collected. The
    next save takes them anew.

    Raises:
        BusyError: called in a callback, or by a signal handler that broke into a save.
    """
    engine = get_engine()
    engine.refuse_to_wait("release()")
    engine.release()


def statistics() -> Statistics:
    """Return what asyncckpt holds in this process: pending operations, threads and host memory."""
    return get_engine().statistics()


def at_exit(report: Callable[[], object]) -> None:
    """Have `report` called at the exit of the interpreter, once everything pending is carried out."""
    _reports.append(report)


def _default_limit() -> int:
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _SHARE_OF_MEMORY)


def _finish_at_exit() -> None:
    """Finish what is pending when the main thread has ended; Ctrl-C gives it up, and says what it was."""
    try:
        _finish()
    finally:
        _tell_what_is_given_up()


def _tell_what_is_given_up() -> None:
    """Print what is still pending, once; at last in an `atexit` function, if all before was interrupted."""
    if _engine is not None and not _engine.given_up:
        for path in _engine.give_up():
            sys.stderr.write(f"asyncckpt: {path} is given up, as the exit was interrupted\n")


def _finish() -> None:
    global _ended  # noqa: PLW0603
    # Threads that go on training may go on saving: Python waits for them, too, but only after this.
    while others := [thread for thread in threading.enumerate() if _is_waited_for(thread)]:
        others[0].join()
    _ended = True  # a daemon thread that keeps saving does not keep the process
    if _engine is not None and not _engine.given_up:
        depth, began = _engine.depth(), time.monotonic()
        _engine.release()
        if depth:
            logger.info("finished %d pending operations at exit in %.1f s", depth, time.monotonic() - began)
    for report in _reports:
        report()


def _is_waited_for(thread: threading.Thread) -> bool:
    """Return whether Python waits for a thread; those of executors are told to end only after our hook."""
    of_processes = getattr(sys.modules.get("concurrent.futures.process"), "_threads_wakeups", ())
    mine = thread in {threading.current_thread(), threading.main_thread()}
    return not (mine or thread.daemon or thread in executors._threads_queues or thread in of_processes)


def _forget_in_child() -> None:
    global _engine, _engine_lock  # noqa: PLW0603
    _engine_lock = threading.RLock()
    _engine = None


_engine: Engine | None = None
_ended = False
_engine_lock = threading.RLock()
_reports: list[Callable[[], object]] = []
threading._register_atexit(_finish_at_exit)  # type: ignore[attr-defined]
atexit.register(_tell_what_is_given_up)
os.register_at_fork(after_in_child=_forget_in_child)
