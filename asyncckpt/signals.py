"""Turn termination signals into a flag that a training loop checks."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from asyncckpt.errors import SignalError

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from typing_extensions import Self

_DEFAULTS = (signal.SIGTERM, signal.SIGHUP)
_ENDINGS = (signal.SIG_DFL, signal.default_int_handler)
# One request reaches a worker twice: from the scheduler, which signals every process, and from torchrun.
_REPEATED_SECONDS = 1.0


class StopOnSignal:
    """Context manager that notes termination signals, so that a training loop can save and stop.

    The instance is true once a signal was received. Enter it before the `Checkpointer`, so that no signal
    ends the process during the wait for the last save::

        with StopOnSignal() as stop, Checkpointer("runs/gpt") as ckpt:
            for step in range(start, steps):
                train(step)
                if stop or step % 500 == 0:
                    ckpt.save(step, state)
                if stop:
                    break
        stop.exit()

    The handler notes the signal. Its other effects depend on the previous handler:

    - The default action, also Python's for SIGINT: a second signal of the same kind takes it, so that the
      process can be ended. Signals within a second of the first one of their kind count as one.
    - A Python function: it is called for every signal, and its exceptions are raised.
    - Ignored: SIGTERM and SIGHUP stay ignored, as SIGHUP is under nohup, unless they are given as arguments.

    Leaving restores the previous handlers, except those that were replaced meanwhile. A forked child has the
    previous handlers. Ranks of a process group receive the signal at different steps, or not at all: let them
    agree with an `all_reduce` of `bool(stop)` before they stop.

    Args:
        signals: names ("SIGUSR1", "USR1") or numbers (`signal.SIGUSR1`); by default SIGTERM and SIGHUP.

    Raises:
        SignalError: a signal is unknown.

    Attributes:
        signum: the first signal received, or None.
        received: when the first signal of each kind was received, by `time.monotonic`.
    """

    def __init__(self, *signals: str | int) -> None:
        self.signum: signal.Signals | None = None
        self.received: dict[signal.Signals, float] = {}
        self._signals = tuple(dict.fromkeys(map(_signal_of, signals or _DEFAULTS)))
        self._keep_ignored = not signals
        self._previous: dict[int, Any] = {}

    def __repr__(self) -> str:
        names = ", ".join(number.name for number in self._signals)
        return f"<{type(self).__name__} {names} received={self.signum and self.signum.name}>"

    def __bool__(self) -> bool:
        return self.signum is not None

    def __enter__(self) -> Self:
        """Set the handlers.

        Raises:
            SignalError: this is not the main thread, a handler cannot be set, or the present one was set by C
                code and could not be restored; no handler was changed.
        """
        if self in _entered:
            raise SignalError(f"{self!r} is entered already; make another one")
        _entered.append(self)
        try:
            for number in self._signals:
                self._set(number)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def exit(self) -> None:
        """If a signal was received, raise SystemExit with the shell's status for it, 128 + its number.

        Pending saves are finished, and exit handlers run.
        """
        if self.signum is not None:
            raise SystemExit(128 + self.signum)

    def _set(self, number: signal.Signals) -> None:
        previous = signal.getsignal(number)
        if previous is None:
            raise SignalError(
                f"{number.name} is handled by C code, which Python cannot restore; use another signal"
            )
        if previous == signal.SIG_IGN and self._keep_ignored:
            return
        self._previous[number] = previous
        try:
            signal.signal(number, self._handle)
        except ValueError as error:
            thread = threading.current_thread().name
            raise SignalError(
                f"handlers of signals can be set in the main thread alone, not in {thread!r}; "
                f"enter {type(self).__name__} there"
            ) from error
        except OSError as error:
            raise SignalError(f"{number.name} cannot be handled by a program; use another signal") from error

    def _leave(self) -> None:
        if self in _entered:
            _entered.remove(self)
            self._restore()

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                with suppress(ValueError):  # another thread
                    signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        entered = self in _entered  # else it could not be restored, and only passes its signals on
        if entered:
            self.received.setdefault(signal.Signals(number), now)
            if self.signum is None:
                self.signum = signal.Signals(number)
        previous = self._previous[number]
        if previous in _ENDINGS:
            if not entered or now - self.received[signal.Signals(number)] > _REPEATED_SECONDS:
                signal.signal(number, previous)
                signal.raise_signal(number)
        elif callable(previous):
            previous(number, frame)


def _signal_of(value: str | int) -> signal.Signals:
    try:
        if isinstance(value, str):
            return signal.Signals["SIG" + value.upper().removeprefix("SIG")]
        if not isinstance(value, bool):
            return signal.Signals(value)
    except (KeyError, ValueError):
        pass
    raise SignalError(f"{value!r} is not a signal; use a name such as 'SIGUSR1', or signal.SIGUSR1")


def _restore_in_child() -> None:
    """Restore the handlers in a forked child, which its parent ends by signals."""
    for entered in reversed(_entered):
        entered._restore()


_entered: list[StopOnSignal] = []
os.register_at_fork(after_in_child=_restore_in_child)
