"""The copies of overlapped saves, at a pace that a test sets."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from asyncckpt._snapshot import fences, lanes
from asyncckpt._threads import Condition

if TYPE_CHECKING:
    from collections.abc import Callable

_memmove = lanes.memmove
_PATIENCE = 30.0


def copy_threads() -> list[threading.Thread]:
    """Return the threads that copy now."""
    return [thread for thread in threading.enumerate() if thread.name == "asyncckpt-copy"]


class Copier:
    """Stands in for `memmove` in host lanes: background threads copy what the test allows.

    Attributes:
        yields: whether a piece that a fence copies on the calling thread lets all others pass.
        behind: pieces copied in the background so far.
        fenced: pieces copied on the threads of fences so far.
    """

    def __init__(self) -> None:
        self.yields = True
        self.behind = self.fenced = 0
        self._changed = Condition()  # an interrupt leaves it usable
        self._opened = True
        self._allowed = self._held = 0

    def __call__(self, target: int, source: int, nbytes: int) -> None:
        """Copy a piece, once it is allowed."""
        behind = threading.current_thread().name == "asyncckpt-copy"
        if behind:
            self._pass()
        elif self.yields:
            self.open()
        _memmove(target, source, nbytes)
        with self._changed:
            self.behind += behind
            self.fenced += not behind
        self._changed.notify_all()

    def hold(self) -> None:
        """Hold back pieces to come."""
        with self._changed:
            self._opened, self._allowed = False, 0

    def open(self) -> None:
        """Let all pieces pass."""
        self._opened = True
        self._changed.notify_all()

    def release(self, pieces: int = 1) -> None:
        """Let so many pieces pass; return once they are copied."""
        with self._changed:
            expected = self.behind + pieces
            self._allowed += pieces
        self._changed.notify_all()
        self._until(lambda: self.behind >= expected)

    def wait_for_arrival(self) -> None:
        """Return once a piece is held back."""
        self._until(lambda: self._held > 0)

    def _pass(self) -> None:
        def attempt() -> bool:
            passes = self._opened or self._allowed > 0
            self._allowed -= passes and not self._opened
            return passes

        with self._changed:
            self._held += 1
        self._changed.notify_all()
        try:
            self._until(attempt)
        finally:
            with self._changed:
                self._held -= 1

    def _until(self, attempt: Callable[[], bool]) -> None:
        assert self._changed.until(attempt, _PATIENCE), self


def assert_nothing_is_left() -> None:
    """Fail if a copy is still to be fenced, or a copy thread does not end."""
    assert fences.pending() == ()
    for thread in copy_threads():
        thread.join(_PATIENCE)
        assert not thread.is_alive()
