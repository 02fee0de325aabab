"""Copy and touch memory by several threads at once, which end when that is done."""

from __future__ import annotations

import os
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING, Generic, TypeVar

from asyncckpt._threads import Condition, is_locked_by_caller, start_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

P = TypeVar("P")

# More than this do not copy faster: the memory is the limit.
_MOST = 4


def for_each_piece(
    do: Callable[[P], object],
    pieces: Sequence[P],
    report: Callable[[int], object] = lambda _: None,
    may_use_last_core: Callable[[], bool] = lambda: True,
) -> None:
    """Call `do` with every piece; this thread and a few more each take the next one.

    Returns or raises once no thread works on a piece any more.

    Args:
        do: lets go of the interpreter.
        pieces: what it is called with.
        report: called, under a lock, with how many pieces from the first on are done.
        may_use_last_core: asked between pieces until it is true; before, one core is left to others.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    work = _Work(do, pieces, report)
    threads = min(_MOST, cores, len(pieces))
    at_once = threads if may_use_last_core() else min(threads, max(cores - 1, 1))
    try:
        work.start_helpers(at_once - 1)
        if at_once < threads:
            work.run(may_use_last_core)
            work.start_helpers(threads - at_once)
        work.run()
    finally:
        work.end()
    if work.error is not None:
        raise work.error


class _Work(Generic[P]):
    """Pieces that several threads take one after another."""

    def __init__(
        self, do: Callable[[P], object], pieces: Sequence[P], report: Callable[[int], object]
    ) -> None:
        self.error: BaseException | None = None
        self._do = do
        self._pieces = pieces
        self._report = report
        self._changed = Condition()
        self._next = 0
        self._helping = 0  # threads that may be using what the pieces are of
        self._done = [False] * len(pieces)
        self._front = 0  # how many pieces, from the first on, are all done

    def start_helpers(self, count: int) -> None:
        if count > 0 and self._next < len(self._pieces):
            with suppress(RuntimeError):  # a limit, or the interpreter is shutting down
                start_threads(
                    [Thread(target=self.help, name="asyncckpt-copy", daemon=True) for _ in range(count)], []
                )

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        while not until() and (index := self._take()) is not None:
            self._do(self._pieces[index])
            with self._changed:
                self._done[index] = True
                before = self._front
                while self._front < len(self._done) and self._done[self._front]:
                    self._front += 1
                if self._front > before:
                    self._report(self._front)

    def help(self) -> None:
        with self._changed:
            if self._next >= len(self._pieces):
                return
            self._helping += 1
        try:
            self.run()
        except BaseException as error:  # noqa: BLE001 - raised by the caller
            self.error = error
            self._stop()
        with self._changed:
            self._helping -= 1
        self._changed.notify_all()

    def end(self) -> None:
        interrupt: BaseException | None = None
        while True:
            try:
                self._stop()
                self._changed.until(lambda: not self._helping)
                break
            except BaseException as error:
                if is_locked_by_caller():
                    raise
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _take(self) -> int | None:
        with self._changed:
            index = self._next
            self._next += 1
        return index if index < len(self._pieces) else None

    def _stop(self) -> None:
        with self._changed:
            self._next = len(self._pieces)
