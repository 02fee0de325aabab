"""Turn termination signals into a flag that a training loop looks at."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from asyncckpt.errors import SignalError

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from typing_extensions import Self

_DEFAULTS = (signal.SIGTERM, signal.SIGHUP)
_ENDINGS = (signal.SIG_DFL, signal.default_int_handler)
# A worker gets one request twice: from the scheduler, which signals every process, and from torchrun.
_REPEATED_SECONDS = 1.0


class StopOnSignal:
    """Note signals that ask the process to end, so that a loop can save and leave. Use it as a context.

    It is true once a signal came. Enter it before the `Checkpointer`, so that a signal does not end the
    process while the last save is waited for::

        with StopOnSignal() as stop, Checkpointer("runs/gpt") as ckpt:
            for step in range(start, steps):
                train(step)
                if stop or step % 500 == 0:
                    ckpt.save(step, state)
                if stop:
                    break
        stop.exit()

    The handler only notes the signal. What happens besides depends on the handler that was there before:

    - The default action, also Python's for SIGINT: a second signal of the kind takes it, so that the process
      can be ended. A signal that comes within a second of the first one of its kind counts as the same.
    - A Python function: it is called for every signal, as it would be without this, and what it raises is
      raised.
    - Ignored: SIGTERM and SIGHUP stay ignored, as SIGHUP is under nohup, unless they are given as arguments.

    Leaving restores the handlers that were there, except where another one has been set meanwhile. A forked
    child has the former handlers. Each rank of a process group gets the signal at another step, or not at
    all: let all ranks agree, with an `all_reduce` of `bool(stop)`, before they stop.

    Args:
        signals: names ("SIGUSR1", "USR1") or numbers (`signal.SIGUSR1`); by default SIGTERM and SIGHUP.

    Raises:
        SignalError: a signal is not known.

    Attributes:
        signum: the signal that came first, or None.
    """

    def __init__(self, *signals: str | int) -> None:
        self.signum: signal.Signals | None = None
        self._signals = tuple(dict.fromkeys(map(_signal_of, signals or _DEFAULTS)))
        self._keep_ignored = not signals
        self._previous: dict[int, Any] = {}
        self._first: dict[int, float] = {}  # when the first of each kind came

    def __repr__(self) -> str:
        names = ", ".join(number.name for number in self._signals)
        return f"<{type(self).__name__} {names} received={self.signum and self.signum.name}>"

    def __bool__(self) -> bool:
        return self.signum is not None

    def __enter__(self) -> Self:
        """Set the handlers.

        Raises:
            SignalError: this is not the main thread, a handler cannot be set, or it could not be restored
                later because C code has set the present one; no handler was changed.
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
        """End the process with the status that the signal gives in a shell, 128 + its number, if one came.

        This raises SystemExit: what is pending is finished, and exit handlers run.
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
        _entered.remove(self)
        self._restore()

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._first.setdefault(number, now)
        if self.signum is None:
            self.signum = signal.Signals(number)
        previous = self._previous[number]
        if previous in _ENDINGS:
            if now - first > _REPEATED_SECONDS:
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
    """Let signals end a forked child, whose parent sends them to end it."""
    for entered in reversed(_entered):
        entered._restore()


_entered: list[StopOnSignal] = []
os.register_at_fork(after_in_child=_restore_in_child)
