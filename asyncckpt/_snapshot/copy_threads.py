"""A few threads that copy and touch memory together, kept from one snapshot to the next."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

from asyncckpt._threads import Condition, start_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

P = TypeVar("P")

# More than this do not copy faster: the memory is the limit.
_MOST = 4


def for_each_piece(
    do: Callable[[P], object], pieces: Sequence[P], report: Callable[[int], object] = lambda _: None
) -> None:
    """Call `do` with every piece; this thread and the copy threads each take the next one.

    Returns or raises once no thread works on a piece any more.

    Args:
        do: lets go of the interpreter.
        pieces: what it is called with.
        report: called, under a lock, with how many pieces from the first on are done.
    """
    _Work(do, pieces, report).carry_out()


def end_copy_threads() -> None:
    """End the threads once they have done what is queued; the next snapshot starts new ones."""
    global _current  # noqa: PLW0603 - one pool per process
    with _lock:
        ended = _current
        try:
            _current = _Pool()
        finally:
            for _ in ended.threads:
                ended.jobs.put(None)
    for thread in ended.threads:
        thread.join()


class _Work(Generic[P]):
    """Pieces that several threads take one after another."""

    def __init__(
        self, do: Callable[[P], object], pieces: Sequence[P], report: Callable[[int], object]
    ) -> None:
        self._do = do
        self._pieces = pieces
        self._report = report
        self._changed = Condition()
        self._next = 0
        self._working = 0  # copy threads that may be using what the pieces are of
        self._done = [False] * len(pieces)
        self._front = 0  # how many pieces, from the first on, are all done
        self._error: BaseException | None = None

    def carry_out(self) -> None:
        try:
            _submit(self._help, min(_MOST, _cores(), len(self._pieces)) - 1)
            self._run()
        finally:
            self._stop()
            self._changed.until(lambda: not self._working)
        if self._error is not None:
            raise self._error

    def _help(self) -> None:
        with self._changed:
            if self._next >= len(self._pieces):
                return
            self._working += 1
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001 - raised by the caller
            self._error = error
            self._stop()
        with self._changed:
            self._working -= 1
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                index = self._next
                if index >= len(self._pieces):
                    return
                self._next += 1
            self._do(self._pieces[index])
            with self._changed:
                self._done[index] = True
                before = self._front
                while self._front < len(self._done) and self._done[self._front]:
                    self._front += 1
                if self._front > before:
                    self._report(self._front)

    def _stop(self) -> None:
        with self._changed:
            self._next = len(self._pieces)


class _Pool:
    """Threads that take jobs off one queue, each until it takes a None."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.threads: list[threading.Thread] = []


def _submit(job: Callable[[], None], count: int) -> None:
    """Have `job` called in up to `count` threads, as far as they can be started."""
    with _lock:
        missing = range(count - len(_current.threads))
        more = [
            threading.Thread(target=_run_jobs, args=(_current.jobs,), name="asyncckpt-copy", daemon=True)
            for _ in missing
        ]
        if more:
            with suppress(RuntimeError):  # a limit, or the interpreter is shutting down
                start_threads(more, _current.threads)
        for _ in range(min(count, len(_current.threads))):
            _current.jobs.put(job)


def _run_jobs(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # it would keep the buffer until the next one comes


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _forget_in_child() -> None:
    global _current, _lock
    _current, _lock = _Pool(), threading.RLock()


_current = _Pool()
_lock = threading.RLock()  # a signal handler that saves may break in
os.register_at_fork(after_in_child=_forget_in_child)
