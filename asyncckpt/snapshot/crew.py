"""A few threads that copy or compare memory together, kept from one snapshot to the next."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from asyncckpt.snapshot.memory import memmove

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

P = TypeVar("P")

# More than this do not copy faster: the memory is the limit.
_MOST = 4


def copy_pieces(pieces: Sequence[tuple[int, int, int]], report: Callable[[int], None]) -> None:
    """Copy pieces of memory, this thread and its helpers each taking the next one, and wait for all of them.

    Args:
        pieces: target address, source address and length in bytes of each; targets ascending.
        report: called, under a lock, with the end of the last piece before which all are there.
    """
    work = _Work(pieces, report)
    _together(work.carry_on, work.stop, len(pieces))


def all_of(test: Callable[[P], bool], pieces: Sequence[P]) -> bool:
    """Return whether every piece passes a test, this thread and its helpers sharing the work."""
    left = iter(pieces)
    taking = threading.Lock()
    stopped = threading.Event()
    passed = True

    def carry_on() -> None:
        nonlocal passed
        while not stopped.is_set():
            with taking:
                piece = next(left, None)
            if piece is None:
                return
            if not test(piece):
                passed = False
                stopped.set()

    _together(carry_on, stopped.set, len(pieces))
    return passed


def _together(carry_on: Callable[[], None], stop: Callable[[], None], count: int) -> None:
    """Do `count` pieces of work on this thread and its helpers; all have stopped when this returns."""
    helpers = [_helpers().submit(carry_on) for _ in range(min(_MOST, _cores(), count) - 1)]
    try:
        carry_on()
    finally:
        # Helpers use a buffer of the caller's: nothing may return before they have stopped.
        stop()
        for helper in helpers:
            helper.result()


class _Work:
    def __init__(self, pieces: Sequence[tuple[int, int, int]], report: Callable[[int], None]) -> None:
        self._pieces = pieces
        self._report = report
        self._lock = threading.Lock()
        self._next = 0
        self._done = [False] * len(pieces)
        self._front = 0  # how many pieces, from the first on, are all there

    def carry_on(self) -> None:
        while (index := self._take()) is not None:
            memmove(*self._pieces[index])
            self._finish(index)

    def stop(self) -> None:
        with self._lock:
            self._next = len(self._pieces)

    def _take(self) -> int | None:
        with self._lock:
            index = self._next
            self._next += 1
        return index if index < len(self._pieces) else None

    def _finish(self, index: int) -> None:
        with self._lock:
            self._done[index] = True
            before = self._front
            while self._front < len(self._done) and self._done[self._front]:
                self._front += 1
            if self._front > before:
                target, _, length = self._pieces[self._front - 1]
                self._report(target + length)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _helpers() -> ThreadPoolExecutor:
    global _pool  # noqa: PLW0603 - one crew for the process
    if _pool is None:
        _pool = ThreadPoolExecutor(_MOST - 1, thread_name_prefix="asyncckpt-copy")
    return _pool


def _forget_in_child() -> None:
    global _pool  # noqa: PLW0603
    _pool = None


_pool: ThreadPoolExecutor | None = None
os.register_at_fork(after_in_child=_forget_in_child)
