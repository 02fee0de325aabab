"""Signals that wait while a state is neither the old nor the new one."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self


class DeferredSignals:
    """Defers the Python signal handlers of the main thread to the end of a `with` block.

    A handler may raise (Ctrl-C does) at any line. Signals without a Python handler act as always, and other
    threads run no handlers.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._pending: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # SIG_DFL, SIG_IGN and handlers of C code are not callable.
            found = {number: signal.getsignal(number) for number in signal.valid_signals()}
            self._handlers = {number: handler for number, handler in found.items() if callable(handler)}
        try:
            for number in self._handlers:
                signal.signal(number, self._note)
        except BaseException:  # of a handler that was not replaced yet
            self._reinstate()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._reinstate()
        self._deliver()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Let signals through inside this block, those deferred until now first."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _reinstate(self) -> None:
        try:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        except BaseException:  # of a handler that is back already
            self._reinstate()
            raise

    def _note(self, number: int, frame: Any) -> None:
        self._pending[number] = frame

    def _deliver(self) -> None:
        if self._pending:
            number, frame = self._pending.popitem()
            try:
                # Not by raising the signal anew: an event loop's wakeup descriptor has been told already.
                self._handlers[number](number, frame)
            finally:
                self._deliver()
