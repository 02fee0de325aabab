"""The one engine of a process: an event loop in a thread, the arena, and an ordered line of operations."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread as executors  # its exit hook must be there before ours, to run after it
import logging
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from asyncckpt.errors import BusyError, SaveError
from asyncckpt.snapshot.buffers import Arena
from asyncckpt.snapshot.copy_threads import end_helpers
from asyncckpt.threads import Condition, handler_error, is_locked_by_caller, start_threads

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

T = TypeVar("T")
logger = logging.getLogger("asyncckpt")

# Left to the rest of the job when no limit is set, as a share of the physical memory.
_SHARE_OF_MEMORY = 0.75
# Threads for aiofiles. They are made at once, since none can be made while the interpreter shuts down.
_FILE_THREADS = 2


@dataclass(slots=True, eq=False)
class Operation:
    """One entry of the line.

    Attributes:
        run: carries it out on the engine's event loop; deals with its own errors.
        effects: path -> whether something is there once this has been carried out.
        awaits_caller: returns whether it cannot end before the calling thread goes on copying.
        begun: whether it is being carried out, or has been.
        withdrawn: whether it is not to be carried out.
    """

    run: Callable[[], Awaitable[None]]
    effects: Mapping[str, bool] = field(default_factory=dict)
    awaits_caller: Callable[[], bool] = lambda: False
    begun: bool = False
    withdrawn: bool = False


class Engine:
    """Carries operations out one after another, in the order they were submitted, in the background."""

    def __init__(self, memory_limit: int | None = None) -> None:
        self.arena = Arena(memory_limit)
        self.given_up = False
        self._starting = threading.RLock()  # a signal handler that saves may break in anywhere
        self._changed = Condition()
        self._line: list[Operation] = []  # the first one may have begun
        self._life: _Life | None = None

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
        self._started()
        with self._changed:
            if not operation.withdrawn:
                self._line.append(operation)
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

    def settle(self, operation: Operation) -> None:
        """Say that what `operation` does to its paths is done, or will not be: the store can be asked."""
        operation.effects = {}

    def call(self, func: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run an async function on the engine's loop, beside the line, and wait for its result.

        An exception that a signal handler raises meanwhile cancels it.

        Raises:
            BusyError: this is a signal handler, and the loop may be waiting for what it broke into.
        """
        if is_locked_by_caller():
            raise handler_error("a look at the store")
        return self._started().call(func, *args)

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until the line is empty; returns whether it is."""
        return self._changed.until(lambda: not self._line, timeout)

    def refuse_to_wait(self, what: str, broken_into: bool = False) -> None:  # noqa: FBT001, FBT002
        """Raise if the calling thread would wait for itself.

        Args:
            what: is called.
            broken_into: whether the caller knows that this is a signal handler which broke into a save.

        Raises:
            BusyError: it is in a callback of an operation, or in a signal handler that broke into a copy.
        """
        if _carrying_out.get():
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

    def close(self) -> None:
        """Finish what is in the line, and end the engine's threads."""
        self.drain()
        with self._starting:
            life, self._life = self._life, None
        if life is not None:
            life.ending = True
            self._changed.notify_all()
            life.end()
        end_helpers()
        self.arena.close()

    def _started(self) -> _Life:
        with self._starting:
            if self._life is None:
                if _ended:
                    raise SaveError("the interpreter is shutting down; save, load and list before it does")
                life = _Life(self._next, self._finished)
                try:
                    life.begin()
                except BaseException:
                    life.end(wait=False)
                    raise
                self._life = life
            return self._life

    def _next(self, life: _Life) -> Operation | None:
        """Wait for the next operation and begin it; None when the engine ends."""

        def attempt() -> Operation | None:
            if self._line:
                self._line[0].begun = True
                return self._line[0]
            return None

        found = self._changed.until(lambda: life.ending or attempt())
        return found if isinstance(found, Operation) else None

    def _finished(self, operation: Operation) -> None:
        with self._changed:
            self._line.remove(operation)
        self._changed.notify_all()


class _Life:
    """The threads of an engine, from its first use to its end: one runs the event loop, one the line.

    They are daemons, so that a process which gives up what is pending can end; otherwise they are waited for.
    """

    def __init__(
        self, take: Callable[[_Life], Operation | None], finished: Callable[[Operation], None]
    ) -> None:
        self.ending = False
        self._take = take
        self._finished = finished
        self._stop: Callable[[], object] = _nothing
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready: SimpleQueue[BaseException | None] = SimpleQueue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop_thread = threading.Thread(target=self._run_loop, name="asyncckpt-loop", daemon=True)
        self._line_thread = threading.Thread(target=self._run_line, name="asyncckpt-line", daemon=True)
        self._started: list[threading.Thread] = []

    def begin(self) -> None:
        """Start the threads; returns once they are at work.

        Raises:
            SaveError: no thread can be started.
        """
        try:
            start_threads((self._loop_thread, self._line_thread), self._started)
            failure = self._ready.get()
        except RuntimeError as error:
            failure = error
        if failure is not None:
            raise SaveError(
                f"asyncckpt cannot start its threads: {failure}; raise the limit (ulimit -u, or the pids"
                " limit of the container)"
            ) from failure

    def call(self, func: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run an async function on the loop and wait for its result."""
        if threading.current_thread() in self._started:
            raise BusyError("a callback that runs on the engine's own thread cannot wait for it")
        answer: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        scopes: list[anyio.CancelScope] = []

        async def run() -> None:
            error: BaseException | None = None
            result: T | None = None
            try:
                with anyio.CancelScope() as scope:
                    scopes.append(scope)
                    result = await func(*args)
            except BaseException as raised:  # noqa: BLE001 - raised by the caller
                error = raised
            answer.put((result, error))

        def cancel() -> None:
            for scope in scopes:
                scope.cancel()

        try:
            self._post(run)
            result, error = answer.get()
        except BaseException:
            # The caller does not wait for it; the process would at its end.
            self._loop_of().call_soon_threadsafe(cancel)
            raise
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def end(self, *, wait: bool = True) -> None:
        """End the threads once the current operation is carried out; nobody calls or submits any more."""
        self.ending = True
        if wait:
            self._line_thread.join()
        self._stop()
        if wait:
            self._loop_thread.join()

    def _run_loop(self) -> None:
        try:
            anyio.run(self._serve)
        except BaseException as error:  # noqa: BLE001 - told to whoever starts it
            self._ready.put(error)

    async def _serve(self) -> None:
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        self._loop = loop
        self._stop = lambda: loop.call_soon_threadsafe(stopped.set)
        files = _file_threads()
        loop.set_default_executor(files)
        self._ready.put(None)
        if not self.ending:
            await stopped.wait()
        files.shutdown()

    def _run_line(self) -> None:
        while (operation := self._take(self)) is not None:
            done: SimpleQueue[None] = SimpleQueue()
            self._post(partial(self._carry_out, operation, done))
            done.get()
            self._finished(operation)

    async def _carry_out(self, operation: Operation, done: SimpleQueue[None]) -> None:
        _carrying_out.set(True)
        try:
            await operation.run()
        except Exception:
            logger.exception("an operation of asyncckpt failed and nobody was told")
        finally:
            done.put(None)

    def _post(self, func: Callable[[], Any]) -> None:
        loop = self._loop_of()

        def start() -> None:
            task = loop.create_task(func())
            self._tasks.add(task)  # the loop itself holds tasks weakly
            task.add_done_callback(self._tasks.discard)

        loop.call_soon_threadsafe(start)

    def _loop_of(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None  # noqa: S101 - `begin` has returned
        return self._loop


def _nothing() -> None:
    pass


# True in an operation, and in callbacks that it calls on worker threads.
_carrying_out = ContextVar("asyncckpt.engine.carrying_out", default=False)


def in_callback() -> bool:
    """Return whether the caller is a callback of an operation, for which nothing later is carried out."""
    return _carrying_out.get()


def wait_for_pending() -> None:
    """Wait until everything submitted in this process is carried out; a callback of a save does not wait.

    Raises:
        BusyError: this is a signal handler that broke into a copy.
    """
    if _engine is not None and not _carrying_out.get():
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


def at_exit(report: Callable[[], object]) -> None:
    """Have `report` called at the exit of the interpreter, once everything pending is carried out."""
    _reports.append(report)


def _default_limit() -> int:
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _SHARE_OF_MEMORY)


def _file_threads() -> ThreadPoolExecutor:
    executor = ThreadPoolExecutor(_FILE_THREADS, thread_name_prefix="asyncckpt-files")
    together = threading.Barrier(_FILE_THREADS + 1)
    for _ in range(_FILE_THREADS):
        executor.submit(together.wait)
    together.wait()
    return executor


def _finish_at_exit() -> None:
    """Finish what is pending when the main thread has ended; Ctrl-C gives it up, and says what it was."""
    global _ended  # noqa: PLW0603
    # Threads that go on training may go on saving: Python waits for them, too, but only after this.
    while others := [thread for thread in threading.enumerate() if _is_waited_for(thread)]:
        others[0].join()
    _ended = True  # a daemon thread that keeps saving does not keep the process
    engine = _engine
    try:
        if engine is not None and not engine.given_up:
            depth, began = engine.depth(), time.monotonic()
            engine.close()
            if depth:
                logger.info(
                    "finished %d pending operations at exit in %.1f s", depth, time.monotonic() - began
                )
        for report in _reports:
            report()
    except BaseException as error:
        if engine is not None:
            for path in engine.give_up():
                sys.stderr.write(f"asyncckpt: {path} is given up, at {type(error).__name__}\n")
        raise


def _is_waited_for(thread: threading.Thread) -> bool:
    """Return whether Python waits for a thread; those of executors are told to end only after our hook."""
    of_processes = getattr(sys.modules.get("concurrent.futures.process"), "_threads_wakeups", ())
    mine = thread in {threading.current_thread(), threading.main_thread()}
    return not (mine or thread.daemon or thread in executors._threads_queues or thread in of_processes)


def _forget_in_child() -> None:
    global _engine, _engine_lock  # noqa: PLW0603
    _engine_lock = threading.RLock()
    parents, _engine = _engine, None
    if parents is not None:
        parents.arena.abandon()


_engine: Engine | None = None
_ended = False
_engine_lock = threading.RLock()
_reports: list[Callable[[], object]] = []
threading._register_atexit(_finish_at_exit)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_forget_in_child)
