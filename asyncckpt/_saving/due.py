"""Decide whether a save is due: by a schedule, after a failed save, after a signal; the same on all ranks."""

from __future__ import annotations

import logging
import math
import time
import weakref
from signal import Signals
from typing import TYPE_CHECKING, Any

from asyncckpt._ranks.group import process_group
from asyncckpt._ranks.verdicts import Agreement, Verdict
from asyncckpt._saving.arguments import check_timing
from asyncckpt._saving.costs import CostMeter
from asyncckpt._saving.engine import get_engine
from asyncckpt.errors import BusyError
from asyncckpt.schedule import AnyOf, Progress, calls_until_due
from asyncckpt.signals import StopOnSignal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asyncckpt._saving.save import Save
    from asyncckpt._saving.saver import Saver
    from asyncckpt.schedule import Schedule

logger = logging.getLogger("asyncckpt")

# In a process group, what no schedule foresees, a signal or a failed save, is noticed after so many seconds.
_LOOK_AGAIN = 1.0
# Seconds from one call to the next in the worst case; finite, as a user's schedule may compute with them.
_LONGEST_STEP = 1e9
_MOST_CALLS = 1000  # between two verdicts of rank 0
_MOST_DOUBLINGS = 10


class Due:
    """Decide whether a save is due.

    Args:
        every: the schedule, or None.
        on_signal: a signal, or several, after which a save is due.
        grace: seconds from the latest signal for which `drain` waits at most, or None.
        saver: takes the saves.
        group: the process group; None for the default one.

    Attributes:
        signum: the latest signal that made a save due, on this rank or another one; or None.

    Raises:
        TypeError: `every` is no schedule, or `grace` no number.
        ValueError: `grace` is not positive, or is given without `on_signal`.
        SignalError: a signal is unknown.
    """

    def __init__(
        self,
        every: Schedule | None,
        on_signal: str | int | Iterable[str | int],
        grace: float | None,
        saver: Saver,
        group: Any = None,
    ) -> None:
        signals = (on_signal,) if isinstance(on_signal, (str, int)) else tuple(on_signal)
        check_timing(every, grace, has_signals=bool(signals))
        self.signum: Signals | None = None
        self._answers = every is not None or bool(signals)
        self._schedule: Schedule = AnyOf() if every is None else every
        self._stop = StopOnSignal(*signals) if signals else None
        if self._stop is not None:
            # One that is never closed must not swallow signals.
            self._leave = weakref.finalize(self, self._stop.__exit__, None, None, None)
            self._leave.atexit = False
        self._grace = grace
        self._agreed_at = -math.inf  # when another rank's signal became known
        self._seen: set[int] = set()  # signals that were acted on, or reported to rank 0
        self._asked = False  # by a signal, until a save is taken
        self._saver = saver
        self._group = group
        self._agreement: Agreement | None = None
        self._costs = CostMeter()
        self._calls = 0
        self._saves = 0
        self._step = self._stride = 0  # of the last call
        self._base = 0  # step of the last save
        self._since = 0.0  # and its time
        self._last: Save | None = None  # until its result is known
        self._failures = 0  # in a row
        self._retry: int | None = None  # the call from which on a failed save is due again

    def open(self) -> None:
        """Set the handlers of the signals.

        Raises:
            SignalError: this is not the main thread, or a handler cannot be set.
        """
        if self._stop is not None:
            self._stop.__enter__()

    def close(self) -> None:
        """Restore the handlers of the signals; idempotent."""
        if self._stop is not None:
            self._leave()
            self._hear(self._received())

    def ask(self, step: int) -> bool:
        """Return whether a save is due; see `Checkpointer.due`."""
        if not self._answers:
            raise ValueError(
                "due() needs Checkpointer(every=...), such as Every(minutes=10), or on_signal=..."
            )
        now = time.perf_counter()
        self._begin_call(step, now)
        if self._agreement is None:
            self._hear(self._received())
            return self._decide(self._progress(now))
        if not self._agreement.decides:
            for signum in self._received():
                if signum not in self._seen:
                    self._agreement.report(signum)
                    self._seen.add(signum)
        verdict = self._agreement.verdict(step, lambda: self._verdict(now))
        if verdict is None:
            return False
        if verdict.signum not in {None, self.signum}:
            self.signum, self._agreed_at = Signals(verdict.signum), time.monotonic()
            self._seen.add(self.signum)
        return verdict.due

    def save_taken(self, step: int, began: float, save: Save) -> None:
        """Begin a new interval with a save whose call has just ended.

        Args:
            step: the step of the save.
            began: the start of its call, by `time.perf_counter`.
            save: the save.
        """
        if not self._answers:
            return  # a save, with its callbacks, is not kept for nothing
        self._settle()
        self._costs.save_taken(save, time.perf_counter())
        self._last, self._retry, self._asked = save, None, False
        self._base, self._since = step, began
        self._saves += 1

    def drain(self, timeout: float | None) -> None:
        """Wait as `Saver.drain` does, and after a signal until the end of the grace period at most.

        Raises:
            BusyError: saves are pending after `timeout` seconds, and continue; the grace period is over, and
                they are given up; or it would wait for itself.
        """
        self._saver.drain(timeout, self._is_grace_over)
        if self._saver.pending and self._is_grace_over():
            raise self._give_up()

    def _begin_call(self, step: int, now: float) -> None:
        if not self._calls:
            group = process_group(self._group)
            self._agreement = None if group is None else Agreement(group)
            self._step = step - 1
            if not self._saves:
                self._base, self._since = max(step - 1, 0), now
        self._calls += 1
        self._costs.end_step(now, pending=self._saver.pending > 0)
        if step < self._base:  # an earlier checkpoint was restored
            self._base = step - 1
        self._stride, self._step = max(step - self._step, 1), step

    def _progress(self, now: float) -> Progress:
        costs = self._costs
        between = costs.between_calls
        return Progress(
            step=self._step,
            steps=self._step - self._base,
            seconds=now - self._since,
            saves=self._saves,
            cost=costs.cost,
            durable=costs.durable,
            step_time=None if between is None else between / self._stride,
        )

    def _decide(self, progress: Progress) -> bool:
        self._settle()
        retries = self._retry is not None and self._calls >= self._retry
        return self._asked or retries or bool(self._schedule.due(progress))

    def _verdict(self, now: float) -> Verdict:
        """Decide for all ranks."""
        assert self._agreement is not None  # noqa: S101 - it is what asks
        if self._stop is not None:
            unseen = [signum for signum in self._stop._signals if signum not in self._seen]
            reported = self._agreement.reported(unseen)
            if reported:
                self._agreed_at = time.monotonic()
            self._hear([*self._received(), *reported])
        progress = self._progress(now)
        if self._decide(progress):
            # The next one tells whether a save was taken.
            return Verdict(self._step, due=True, signum=self.signum)
        until = self._step + self._stride * self._calls_ahead(progress)
        return Verdict(self._step, until=until, signum=self.signum)

    def _calls_ahead(self, progress: Progress) -> int:
        """Return after how many calls the next verdict is needed."""
        between = self._costs.between_calls
        if not between:
            return 1
        soon = max(int(_LOOK_AGAIN / between), 1)
        if self._retry is not None:
            soon = min(soon, self._retry - self._calls)
        calls = calls_until_due(self._schedule, progress, self._stride, between, soon)
        if self._stop is not None or self._last is not None or self._retry is not None:
            return calls
        # Nothing but the schedule can make a save due: not before this call, however long the steps take.
        return max(calls, calls_until_due(self._schedule, progress, self._stride, _LONGEST_STEP, _MOST_CALLS))

    def _received(self) -> tuple[Signals, ...]:
        return () if self._stop is None else tuple(self._stop.received)

    def _hear(self, signals: Iterable[int]) -> None:
        """Make a save due for signals that were not seen before."""
        for signum in signals:
            if signum not in self._seen:
                self._seen.add(signum)
                self._asked = True
                self.signum = Signals(signum)

    def _settle(self) -> None:
        """Look at the result of the last save: after a failure, the next call is a save's turn again."""
        last = self._last
        if last is None or not last.committed.done():
            return
        self._last = None
        if last.skipped:  # replaced by a newer one
            return
        if last.committed.failed():
            # After failures in a row the wait doubles, or a full disk would cost a stall at each step.
            self._retry = self._calls + (1 << min(self._failures, _MOST_DOUBLINGS)) - 1
            self._failures += 1
        else:
            self._failures = 0

    def _is_grace_over(self) -> bool:
        if self._grace is None or self._stop is None:
            return False
        latest = max((self._agreed_at, *self._stop.received.values()))
        return latest > -math.inf and time.monotonic() >= latest + self._grace

    def _give_up(self) -> BusyError:
        paths = ", ".join(get_engine().give_up())
        message = f"the grace period of {self._grace} s after a signal is over: given up are {paths}"
        logger.error(message)
        return BusyError(message)
