"""The copies of overlapped saves, at a pace that a test sets."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from asyncckpt._snapshot import fences, lanes

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
        self._changed = threading.Condition()
        self._opened = True
        self._allowed = self._held = 0

    def __call__(self, target: int, source: int, nbytes: int) -> None:
        """Copy a piece, once it is allowed."""
        behind = threading.current_thread() in copy_threads()
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
        with self._changed:
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
        with self._changed:
            self._until(lambda: self._held > 0)

    def _pass(self) -> None:
        with self._changed:
            self._held += 1
            self._changed.notify_all()
            try:
                self._until(lambda: self._opened or self._allowed > 0)
            finally:
                self._held -= 1
            if not self._opened:
                self._allowed -= 1
            self._changed.notify_all()

    def _until(self, condition: Callable[[], bool]) -> None:
        assert self._changed.wait_for(condition, _PATIENCE), self


def assert_nothing_is_left() -> None:
    """Fail if a copy is still to be fenced, or a copy thread does not end."""
    assert fences.pending() == ()
    for thread in copy_threads():
        thread.join(_PATIENCE)
        assert not thread.is_alive()
