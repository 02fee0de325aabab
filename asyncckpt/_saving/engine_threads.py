"""The threads of the engine: one runs its event loop, one hands it an operation after the other."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from asyncckpt._threads import start_threads
from asyncckpt.errors import BusyError, SaveError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    # What carries an operation out, and what is to be called then.
    Next = tuple[Callable[[], Awaitable[None]], Callable[[], object]]

T = TypeVar("T")

logger = logging.getLogger("asyncckpt")

# Threads for aiofiles. They are made at once, since none can be made while the interpreter shuts down.
_FILE_THREADS = 2

# True in an operation, and in callbacks that it calls on worker threads.
_carrying_out = ContextVar("asyncckpt._saving.engine.carrying_out", default=False)


def in_callback() -> bool:
    """Return whether the caller is a callback of an operation, for which nothing later is carried out."""
    return _carrying_out.get()


class EngineThreads:
    """The threads of an engine, from its first use to its end.

    They are daemons, so that a process which gives up what is pending can end; otherwise they are waited for.

    Args:
        take: waits for the next operation; None once `ending` is true.
        after: called on the last of them when the others have ended.

    Attributes:
        ending: whether the threads are to end.
    """

    def __init__(self, take: Callable[[EngineThreads], Next | None], after: Callable[[], object]) -> None:
        self.ending = False
        self._take = take
        self._after = after
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
            start_threads((self._loop_thread,), self._started)
            self._wait_for_loop()
            start_threads((self._line_thread,), self._started)
        except BaseException as error:
            self.ending = True
            self._stop()
            if not isinstance(error, RuntimeError):
                raise
            raise SaveError(
                f"asyncckpt cannot start its threads: {error}; raise the limit (ulimit -u, or the pids"
                " limit of the container)"
            ) from error

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

    def join(self) -> None:
        """Wait for the threads to end."""
        self._line_thread.join()

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
            if getattr(thread, "loop", None) is self._loop:  # a worker of anyio, which has been told to end
                thread.join()

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
        while (taken := self._take(self)) is not None:
            run, finished = taken
            done: SimpleQueue[None] = SimpleQueue()
            self._post(partial(self._carry_out, run, done))
            done.get()
            finished()
            del taken, run, finished  # they would keep the last operation until the next one comes
        self._stop()
        self._loop_thread.join()
        self._after()

    async def _carry_out(self, run: Callable[[], Awaitable[None]], done: SimpleQueue[None]) -> None:
        _carrying_out.set(True)
        try:
            await run()
        except BaseException:
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


def _file_threads() -> ThreadPoolExecutor:
    executor = ThreadPoolExecutor(_FILE_THREADS, thread_name_prefix="asyncckpt-files")
    together = threading.Barrier(_FILE_THREADS + 1)
    for _ in range(_FILE_THREADS):
        executor.submit(together.wait)
    together.wait()
    return executor
