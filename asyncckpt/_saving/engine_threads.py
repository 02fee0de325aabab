"""The threads of the engine: one runs the event loop, one feeds it the operations of the queue."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from asyncckpt._threads import start_threads
from asyncckpt.errors import BusyError, SaveError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    # The function that runs an operation, and one to call afterwards.
    Next = tuple[Callable[[], Awaitable[None]], Callable[[], object]]

T = TypeVar("T")

logger = logging.getLogger("asyncckpt")

# Threads of aiofiles. Started in advance, as none can be started while the interpreter shuts down.
_FILE_THREADS = 2

# True in a running operation, and in the callbacks that it calls on worker threads.
_carrying_out = ContextVar("asyncckpt._saving.engine.carrying_out", default=False)


def in_callback() -> bool:
    """Return whether the caller is a callback of an operation: later operations run only after it."""
    return _carrying_out.get()


class EngineThreads:
    """The threads of an engine, from its first use to its end.

    They are daemon threads, so that a process can end with operations pending; otherwise exit waits for them.

    Args:
        take: waits for the next operation; returns None once `ending` is true.
        after: called on the last thread when the others have ended.

    Attributes:
        ending: whether the threads have to end.
    """

    def __init__(self, take: Callable[[EngineThreads], Next | None], after: Callable[[], object]) -> None:
        self.ending = False
        self._take = take
        self._after = after
        self._stopped: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready: SimpleQueue[BaseException | None] = SimpleQueue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop_thread = threading.Thread(target=self._run_loop, name="asyncckpt-loop", daemon=True)
        self._queue_thread = threading.Thread(target=self._run_queue, name="asyncckpt-queue", daemon=True)
        self._started: list[threading.Thread] = []

    def begin(self) -> None:
        """Start the threads; return once they run.

        Raises:
            SaveError: a thread cannot be started.
        """
        try:
            start_threads((self._loop_thread,), self._started)
            self._wait_for_loop()
            start_threads((self._queue_thread,), self._started)
        except BaseException as error:
            self.ending = True
            if self._queue_thread.ident is None:  # otherwise that one ends the loop, after its operation
                self._stop()
            if not isinstance(error, (RuntimeError, OSError)):
                raise
            raise SaveError(
                f"asyncckpt cannot start its threads: {error}; raise the limit (ulimit -u, or the pids"
                " limit of the container)"
            ) from error

    def call(self, func: Callable[..., Awaitable[T]], *args: Any) -> T:
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
            # Otherwise the exit of the process would wait for it.
            self._loop_of().call_soon_threadsafe(cancel)
            raise
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def join(self) -> None:
        self._queue_thread.join()

    def owns_caller(self) -> bool:
        """Return whether the calling thread is one of these, for which `join` would wait."""
        thread = threading.current_thread()
        others = ("asyncckpt-files", "asyncckpt-prepare")
        return thread in self._started or self.is_worker(thread) or thread.name.startswith(others)

    def is_worker(self, thread: threading.Thread) -> bool:
        """Return whether anyio runs blocking functions of the loop on a thread."""
        return self._loop is not None and getattr(thread, "loop", None) is self._loop

    def _wait_for_loop(self) -> None:
        failure = self._ready.get()
        if failure is not None:
            raise failure

    def _run_loop(self) -> None:
        try:
            anyio.run(self._serve)
        except BaseException as error:  # noqa: BLE001 - raised by `begin`
            self._ready.put(error)
        for thread in threading.enumerate():
            if self.is_worker(thread):  # which is ending
                thread.join()

    def _stop(self) -> None:
        if self._loop is not None and self._stopped is not None:
            with suppress(RuntimeError):  # it is closed: `begin` was interrupted, and has stopped it
                self._loop.call_soon_threadsafe(self._stopped.set)

    async def _serve(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        files = _file_threads()
        self._loop.set_default_executor(files)
        self._ready.put(None)
        if not self.ending:
            await self._stopped.wait()
        files.shutdown()

    def _run_queue(self) -> None:
        while (taken := self._take(self)) is not None:
            run, finished = taken
            done: SimpleQueue[None] = SimpleQueue()
            self._post(partial(self._carry_out, run, done))
            done.get()
            finished()
            del taken, run, finished  # not to hold the last operation until the next one
        self._stop()
        self._loop_thread.join()
        self._after()

    async def _carry_out(self, run: Callable[[], Awaitable[None]], done: SimpleQueue[None]) -> None:
        _carrying_out.set(True)
        try:
            await run()
        except BaseException:
            logger.exception("an operation of asyncckpt failed without reporting its error")
        finally:
            done.put(None)

    def _post(self, func: Callable[[], Any]) -> None:
        loop = self._loop_of()

        def start() -> None:
            task = loop.create_task(func())
            self._tasks.add(task)  # the loop holds only weak references to tasks
            task.add_done_callback(self._tasks.discard)

        loop.call_soon_threadsafe(start)

    def _loop_of(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None  # noqa: S101 - `begin` has returned
        return self._loop


def _file_threads() -> ThreadPoolExecutor:
    executor = ThreadPoolExecutor(_FILE_THREADS, thread_name_prefix="asyncckpt-files")
    together = threading.Barrier(_FILE_THREADS + 1)
    try:
        for _ in range(_FILE_THREADS):
            executor.submit(together.wait)
        together.wait()
    except BaseException:
        together.abort()  # one that waits would never end, nor would the exit of the process
        executor.shutdown(wait=False)
        raise
    return executor
