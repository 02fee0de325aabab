"""The one engine of a process: an event loop in a thread, the arena, and an ordered line of operations."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 - its exit hook must be there before ours, to run after it
import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from anyio.from_thread import start_blocking_portal

from asyncckpt.errors import BusyError, SaveError
from asyncckpt.snapshot.buffers import Arena
from asyncckpt.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AbstractContextManager

    from anyio.from_thread import BlockingPortal

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
    """

    run: Callable[[], Awaitable[None]]
    effects: Mapping[str, bool] = field(default_factory=dict)


class Engine:
    """Carries operations out one after another, in the order they were submitted, in the background."""

    def __init__(self, memory_limit: int | None = None) -> None:
        self.arena = Arena(memory_limit)
        self._starting = threading.RLock()  # a signal handler that saves may break in anywhere
        self._changed = threading.Condition()
        self._line: deque[Operation] = deque()
        self._current: Operation | None = None
        self._closing = False
        self.given_up = False
        self._portal: BlockingPortal | None = None
        self._portal_context: AbstractContextManager[BlockingPortal] | None = None

    def __repr__(self) -> str:
        return f"<Engine depth={self.depth()} arena={self.arena!r}>"

    def depth(self) -> int:
        """Return how many operations are not yet carried out."""
        with self._changed:
            return len(self._line) + (self._current is not None)

    def submit(self, operation: Operation) -> None:
        """Append `operation` to the line.

        The caller does not let go of the interpreter here, as it would if it woke the event loop itself: the
        thread that waits for operations gets its turn when the caller next blocks.
        """
        self._started()
        with self._changed:
            self._line.append(operation)
            self._changed.notify_all()

    def withdraw(self, operation: Operation) -> bool:
        """Take `operation` out of the line; returns whether it had not begun."""
        with self._changed:
            if operation not in self._line:
                return False
            self._line.remove(operation)
            return True

    def pending(self, path: str) -> bool | None:
        """Return whether `path` will exist after all that is in the line, or None if none of it tells."""
        with self._changed:
            operations = [*([self._current] if self._current else []), *self._line]
        return next((op.effects[path] for op in reversed(operations) if path in op.effects), None)

    def settle(self, operation: Operation) -> None:
        """Say that what `operation` does to its paths is done, or will not be: the store can be asked."""
        with self._changed:
            operation.effects = {}

    def call(self, func: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run an async function on the engine's loop, beside the line, and wait for its result."""
        return self._started().call(func, *args)

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until the line is empty; returns whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._line and self._current is None, timeout)

    def give_up(self) -> list[str]:
        """Let the process end without what is still in the line; returns the paths that it was to make."""
        self.given_up = True
        with self._changed:
            operations = [*([self._current] if self._current else []), *self._line]
        return [path for operation in operations for path, made in operation.effects.items() if made]

    def close(self) -> None:
        """Finish what is in the line, and end the engine's threads."""
        self.drain()
        if self._portal_context is not None:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._portal_context.__exit__(None, None, None)
            self._portal = self._portal_context = None
        self.arena.close()

    async def _work(self) -> None:
        while (operation := await in_thread(self._next)) is not None:
            _carrying_out.set(True)
            try:
                await operation.run()
            except Exception:
                logger.exception("an operation of asyncckpt failed and nobody was told")

    def _next(self) -> Operation | None:
        """Wait for the next operation and make it the current one; None when the engine closes."""
        with self._changed:
            self._current = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._line or self._closing)
            self._current = self._line.popleft() if self._line else None
            return self._current

    def _started(self) -> BlockingPortal:
        with self._starting:
            if self._portal is None:
                if _ended:
                    raise SaveError("the interpreter is shutting down; save, load and list before it does")
                self._closing = False
                self._portal_context = start_blocking_portal()
                self._portal = self._portal_context.__enter__()
                self._portal.call(_set_file_threads)
                self._portal.start_task_soon(self._work)
            return self._portal


# True in an operation, and in callbacks that it calls on worker threads.
_carrying_out = ContextVar("asyncckpt.engine.carrying_out", default=False)


def refuse_to_wait_in_callback() -> None:
    """Raise if the caller is a callback of an operation, which would wait for itself.

    Raises:
        BusyError: it is.
    """
    if _carrying_out.get():
        raise BusyError("a callback of a save cannot wait for saves: it would wait for itself")


def wait_for_pending() -> None:
    """Wait until everything submitted in this process is carried out; a callback of a save does not wait."""
    if _engine is not None and not _carrying_out.get():
        _engine.drain()


def get_engine() -> Engine:
    """Return the engine of this process, made on first use and anew in a forked child."""
    global _engine  # noqa: PLW0603 - one per process is the point
    with _engine_lock:
        if _engine is None:
            _engine = Engine(_default_limit())
        return _engine


def current_engine() -> Engine | None:
    """Return the engine of this process if one was made."""
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


def _default_limit() -> int:
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _SHARE_OF_MEMORY)


async def _set_file_threads() -> None:
    executor = ThreadPoolExecutor(_FILE_THREADS, thread_name_prefix="asyncckpt-files")
    together = threading.Barrier(_FILE_THREADS + 1)
    for _ in range(_FILE_THREADS):
        executor.submit(together.wait)
    together.wait()
    asyncio.get_running_loop().set_default_executor(executor)


def _finish_at_exit() -> None:
    global _ended  # noqa: PLW0603
    _ended = True
    if _engine is not None and not _engine.given_up:
        depth = _engine.depth()
        began = time.monotonic()
        _engine.close()
        if depth:
            logger.info("finished %d pending operations at exit in %.1f s", depth, time.monotonic() - began)


def _forget_in_child() -> None:
    global _engine, _engine_lock  # noqa: PLW0603
    _engine_lock = threading.RLock()
    parents, _engine = _engine, None
    if parents is not None:
        parents.arena.abandon()


_engine: Engine | None = None
_ended = False
_engine_lock = threading.RLock()
threading._register_atexit(_finish_at_exit)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_forget_in_child)
