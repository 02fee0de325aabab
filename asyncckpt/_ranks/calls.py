"""Make calls that wait for other ranks, and that a signal handler may interrupt."""

from __future__ import annotations

import time
from _thread import start_new_thread
from contextlib import suppress
from math import inf
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

from asyncckpt._threads import held_lock
from asyncckpt.errors import RankError

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._ranks.requests import Requests

T = TypeVar("T")

_SHORTEST_PAUSE = 5e-5
# Seconds in which an interrupted call tells the other ranks.
_GRACE = 5.0
_LOOK_AGAIN = 1.0  # seconds


class Call:
    """What running work looks at while it waits.

    Attributes:
        stopped: whether the caller waits no longer.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._wakeup = held_lock()
        self._began = time.monotonic()

    def stop(self) -> None:
        """End the pause of the work."""
        self.stopped = True
        self._wakeup.release()

    def waited(self) -> float:
        """Return the seconds since the call, or `restart`."""
        return time.monotonic() - self._began

    def restart(self) -> None:
        """Wait anew."""
        self._began = time.monotonic()

    def pause(self, longest: float) -> None:
        """Sleep for an eighth of the time waited so far, in seconds, or until the caller waits no longer."""
        if self._wakeup.acquire(timeout=min(max(self.waited() / 8, _SHORTEST_PAUSE), longest)):
            self._wakeup.release()


class StoppedError(Exception):
    """The caller waits no longer."""


class _Work(Generic[T]):
    """Work on a thread of its own."""

    def __init__(self, func: Callable[[Call], T], requests: Requests) -> None:
        self._func = func
        self._requests = requests
        self._once = Lock()
        self._ended = held_lock()
        self.call = Call()
        self.results: list[T] = []
        self.errors: list[BaseException] = []

    def run(self) -> None:
        """Do it, once."""
        if not self._once.acquire(blocking=False):
            return
        try:
            self.results.append(self._func(self.call))
        except BaseException as error:  # noqa: BLE001 - raised by the caller
            self.errors.append(error)
        self._ended.release()

    def wait(self, silence: float) -> None:
        """Wait until it ends; no longer if the store is silent for so many seconds."""
        while not self.results and not self.errors:
            if self._requests.silence() > silence:
                raise _silence_error(self._requests)
            self._ended.acquire(timeout=min(silence / 4, _LOOK_AGAIN))


def call(func: Callable[[Call], T], undo: Callable[[], object], requests: Requests, timeout: float) -> T:
    """Call `func` on a thread of its own, and wait for its result.

    A signal handler interrupts the wait only: no request is made halfway, and a store that does not answer
    holds up nobody.

    Args:
        func: looks at the `Call` between its requests, and raises `StoppedError` soon if it was stopped.
        undo: called behind `func`, even if that succeeded, if the wait was broken off: by a signal handler,
            or since the store does not answer; then it is called once it does.
        requests: that `func` makes.
        timeout: seconds that the store may take for a request.

    Raises:
        RankError: the store does not answer.
    """
    if requests.silence() > timeout:
        raise _silence_error(requests)
    work = _Work(func, requests)
    undone = held_lock()

    def stop() -> None:
        work.run()  # unless it runs
        work.wait(inf)
        with suppress(RankError):
            undo()
        undone.release()

    try:
        _start(work.run)
        work.wait(timeout)
    except BaseException as error:
        work.call.stop()
        _start(stop)
        undone.acquire(timeout=0 if isinstance(error, RankError) else _GRACE)
        raise
    if work.errors:
        raise work.errors[0]
    return work.results[0]


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
