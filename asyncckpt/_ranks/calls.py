"""Make calls that wait for other ranks, and that a signal handler may interrupt."""

from __future__ import annotations

import time
from _thread import start_new_thread
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from asyncckpt.errors import RankError

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._ranks.requests import Requests

T = TypeVar("T")

_SHORTEST_PAUSE = 5e-5
# Seconds in which an interrupted call tells the other ranks.
_GRACE = 5.0


class Call:
    """What a running call looks at while it waits.

    Attributes:
        stopped: whether the caller waits no longer.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._wakeup: SimpleQueue[None] = SimpleQueue()
        self._began = time.monotonic()

    def stop(self) -> None:
        """End the pause of the call, and all that follow."""
        self.stopped = True
        self._wakeup.put(None)

    def waited(self) -> float:
        """Return the seconds since the call, or `restart`."""
        return time.monotonic() - self._began

    def restart(self) -> None:
        """Wait anew."""
        self._began = time.monotonic()

    def pause(self, longest: float) -> None:
        """Sleep for an eighth of the time waited so far, in seconds, or until the call is stopped."""
        with suppress(Empty):
            self._wakeup.get(timeout=min(max(self.waited() / 8, _SHORTEST_PAUSE), longest))


class StoppedError(Exception):
    """The caller waits no longer."""


def call(work: Callable[[Call], T], undo: Callable[[], object], requests: Requests, timeout: float) -> T:
    """Call `work` on a thread of its own, and wait for its result, at any exception for `undo` after it.

    A signal handler interrupts the wait only: no request is made halfway, and a store that does not answer
    holds up nobody.

    Args:
        work: looks at the `Call` between its requests, and raises `StoppedError` soon if it was stopped.
        undo: called behind `work` if a signal handler has interrupted the wait.
        requests: that `work` makes.
        timeout: seconds that the store may take for a request.

    Raises:
        RankError: the store does not answer.
    """
    if requests.silence() > timeout:
        raise _silence_error(requests)
    running, once = Call(), Lock()
    results: list[T] = []
    errors: list[BaseException] = []
    changed: SimpleQueue[None] = SimpleQueue()
    undone: SimpleQueue[None] = SimpleQueue()

    def run() -> None:
        if not once.acquire(blocking=False):
            return
        try:
            results.append(work(running))
        except BaseException as error:  # noqa: BLE001 - raised by the caller
            errors.append(error)
        changed.put(None)

    def wait() -> None:
        while not results and not errors:
            with suppress(Empty):
                changed.get(timeout=timeout / 4)
            if requests.silence() > timeout:
                errors.append(_silence_error(requests))

    def stop() -> None:
        run()  # unless it runs
        wait()
        with suppress(RankError):
            undo()
        undone.put(None)

    try:
        _start(run)
        wait()
    except BaseException:
        running.stop()
        _start(stop)
        with suppress(Empty):
            undone.get(timeout=_GRACE)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _start(func: Callable[[], None]) -> None:
    try:
        start_new_thread(func, ())
    except RuntimeError:  # a limit, or the interpreter is shutting down
        func()


def _silence_error(requests: Requests) -> RankError:
    return RankError(
        f"the store of the process group has not answered for {requests.silence():.0f} s; is the process that"
        " hosts it (rank 0, or the launcher) stopped, or its host unreachable?"
    )
