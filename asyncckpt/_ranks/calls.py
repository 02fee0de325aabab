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


class Running(Generic[T]):
    """A call on a thread of its own, for whose result the caller waits now or later.

    A signal handler interrupts the wait only: no request is made halfway, and a store that does not answer
    holds up nobody.

    Args:
        func: looks at the `Call` between its requests, and raises `StoppedError` soon if it was stopped.
        undo: called behind `func`, even if that succeeded, if the call is given up, with the reason; if the
            store does not answer, once it does.
        requests: that `func` makes.
        timeout: seconds that the store may take for a request.
    """

    def __init__(
        self,
        func: Callable[[Call], T],
        undo: Callable[[str | None], object],
        requests: Requests,
        timeout: float,
    ) -> None:
        self._work = _Work(func, requests)
        self._undo = undo
        self._requests = requests
        self._timeout = timeout
        self._is_given_up = False

    def call(self) -> T:
        """Start it, and return its result; see `result`."""
        if self._requests.silence() > self._timeout:
            raise _silence_error(self._requests)
        return self._finish(self.start)

    def start(self) -> None:
        """Begin, and do not wait."""
        _start(self._work.run)

    def result(self) -> T:
        """Wait for the result; an exception in the caller (Ctrl-C) gives the call up.

        Raises:
            RankError: the store does not answer; or what `func` raised.
        """
        return self._finish(lambda: None)

    def _finish(self, begin: Callable[[], None]) -> T:
        try:
            begin()
            self._work.wait(self._timeout)
            if self._work.results:
                return self._work.results[0]
        except BaseException as error:
            self.give_up(seconds=0 if isinstance(error, RankError) else _GRACE)
            raise
        raise self._work.errors[0]

    def give_up(self, why: str | None = None, seconds: float = _GRACE) -> None:
        """Stop and undo it, in the background if that takes more than so many seconds; raises no error.

        Args:
            why: the reason; None for an interrupt.
            seconds: how long to wait.
        """
        if self._is_given_up:
            return
        self._is_given_up = True
        undone = held_lock()

        def stop() -> None:
            self._work.run()  # unless it runs
            self._work.wait(inf)
            with suppress(RankError):
                self._undo(why)
            undone.release()

        self._work.call.stop()
        _start(stop)
        undone.acquire(timeout=seconds)


def call(
    func: Callable[[Call], T], undo: Callable[[str | None], object], requests: Requests, timeout: float
) -> T:
    """Call `func`, and wait for its result; the arguments are those of `Running`."""
    return Running(func, undo, requests, timeout).call()


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
