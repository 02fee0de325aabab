"""A few threads that copy, compare and touch memory together, kept from one snapshot to the next."""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

from asyncckpt._threads import Condition, start_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

P = TypeVar("P")
T = TypeVar("T")

# More than this do not copy faster: the memory is the limit.
_MOST = 4

_libc = ctypes.CDLL(None)
# (target, source, bytes); lets go of the interpreter meanwhile.
memmove = _libc.memmove
memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
memmove.restype = None


def copy_pieces(pieces: Sequence[tuple[int, int, int]], report: Callable[[int], None]) -> None:
    """Copy pieces of memory, this thread and its helpers each taking the next one, and wait for all of them.

    Args:
        pieces: target address, source address and length in bytes of each; targets ascending.
        report: called, under a lock, with the end of the last piece before which all are there.
    """

    def report_front(count: int) -> None:
        target, _, length = pieces[count - 1]
        report(target + length)

    _Work(pieces, lambda piece: memmove(*piece), report_front).carry_out()


def for_each_piece(do: Callable[[P], object], pieces: Sequence[P]) -> None:
    """Call `do` with every piece, this thread and its helpers sharing the work."""
    _Work(pieces, do, lambda _: None).carry_out()


def all_of(test: Callable[[P], bool], pieces: Sequence[P]) -> bool:
    """Return whether every piece passes a test, this thread and its helpers sharing the work."""
    passed = True

    def look(piece: P) -> None:
        nonlocal passed
        if not test(piece):
            passed = False
            work.stop()

    work = _Work(pieces, look, lambda _: None)
    work.carry_out()
    return passed


def on_helper(func: Callable[[], T]) -> T:
    """Call `func` on a helper and wait for its result: signal handlers do not break in there."""
    answer: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def call() -> None:
        try:
            answer.put((func(), None))
        except BaseException as error:  # noqa: BLE001 - raised by the caller
            answer.put((None, error))

    if _start_helpers(min(_MOST, _cores())):  # this one, and those that help it
        _errands.put(call)
    else:
        call()
    result, error = answer.get()
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


class _Work(Generic[P]):
    """Pieces that several threads take one after another."""

    def __init__(self, pieces: Sequence[P], do: Callable[[P], object], report: Callable[[int], None]) -> None:
        self._pieces = pieces
        self._do = do
        self._report = report
        self._changed = Condition()
        self._next = 0
        self._working = 0  # helpers that may be using what the pieces are of
        self._done = [False] * len(pieces)
        self._front = 0  # how many pieces, from the first on, are all done
        self._error: BaseException | None = None

    def carry_out(self) -> None:
        """Do all pieces; no helper works on one any more when this returns or raises."""
        try:
            for _ in range(_start_helpers(min(_MOST, _cores(), len(self._pieces)) - 1)):
                _errands.put(self._help)
            self._carry_on()
        finally:
            self.stop()
            self._changed.until(lambda: not self._working)
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Begin no further piece."""
        self._next = len(self._pieces)

    def _help(self) -> None:
        with self._changed:
            if self._next >= len(self._pieces):
                return
            self._working += 1
        try:
            self._carry_on()
        except BaseException as error:  # noqa: BLE001 - raised by the caller
            self._error = error
            self.stop()
        with self._changed:
            self._working -= 1
            self._changed.notify_all()

    def _carry_on(self) -> None:
        while (index := self._take()) is not None:
            self._do(self._pieces[index])
            self._finish(index)

    def _take(self) -> int | None:
        with self._changed:
            index = self._next
            self._next += 1
        return index if index < len(self._pieces) else None

    def _finish(self, index: int) -> None:
        with self._changed:
            self._done[index] = True
            before = self._front
            while self._front < len(self._done) and self._done[self._front]:
                self._front += 1
            if self._front > before:
                self._report(self._front)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_helpers(count: int) -> int:
    """Have `count` helpers, as far as threads can be started; returns how many there are of them."""
    with _starting:
        more = [
            threading.Thread(target=_run_errands, args=(_errands,), name="asyncckpt-copy", daemon=True)
            for _ in range(count - len(_helpers))
        ]
        if more:
            with suppress(RuntimeError):  # a limit, or the interpreter is shutting down
                start_threads(more, _helpers)
        return min(count, len(_helpers))


def end_helpers() -> None:
    """End the helpers; they are started anew when they are needed."""
    with _starting:
        for _ in _helpers:
            _errands.put(None)
        while _helpers:
            _helpers.pop().join()


def _run_errands(errands: SimpleQueue[Callable[[], None] | None]) -> None:
    while (errand := errands.get()) is not None:
        errand()
        del errand  # it would keep the buffer until the next one comes


def _forget_in_child() -> None:
    global _errands, _starting
    _errands, _starting = SimpleQueue(), threading.RLock()
    _helpers.clear()


_errands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
_helpers: list[threading.Thread] = []
_starting = threading.RLock()
os.register_at_fork(after_in_child=_forget_in_child)
