"""Measure what saves cost a training loop, by the times between its calls of `due`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncckpt._saving.save import Save

# A long history would hide a change, such as a fuller disk.
_SAVES = 5
_STEPS = 64
_STEPS_BESIDE = 1024


@dataclass(slots=True)
class _Beside:
    """The steps beside a save, from its call on.

    Attributes:
        save: the save.
        first: seconds of the first one, which waits at the fence of an overlapped save.
        rest: seconds of the latest ones after it.
        count: number of those after it.
    """

    save: Save
    first: float | None = None
    rest: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS_BESIDE))
    count: int = 0

    def add(self, seconds: float) -> None:
        if self.first is None:
            self.first = seconds
        else:
            self.rest.append(seconds)
            self.count += 1

    def slowdown(self, alone: float) -> float:
        """Return by how many seconds the steps were longer than `alone` seconds each.

        An evaluation among them is no slowdown: of the steps after the first one the median counts, and the
        first one cannot have lost more than the time in which the save was pending.
        """
        slowdown = max((self.first or alone) - alone, 0.0)
        if self.rest:
            slowdown += self.count * max(median(self.rest) - alone, 0.0)
        stats = self.save.stats
        return min(slowdown, max(stats.durable - stats.stall, 0.0)) if stats.durable else slowdown


class CostMeter:
    """Measure saves: the stall, and by how much the steps are longer until nothing is pending.

    What a failed save cost is added to the next one that commits.
    """

    def __init__(self) -> None:
        self._began: float | None = None  # of the present step
        self._alone: deque[float] = deque(maxlen=_STEPS)
        self._beside: _Beside | None = None
        self._costs: deque[float] = deque(maxlen=_SAVES)
        self._durable: deque[float] = deque(maxlen=_SAVES)
        self._lost = 0.0  # by saves that did not commit
        self._commits = 0

    @property
    def cost(self) -> float | None:
        """Seconds that a save takes from the training: the mean of the last few; None before the first.

        Not the median: costs are skewed, and a share of the time has to pay for all of them.
        """
        return fmean(self._costs) if self._costs else None

    @property
    def durable(self) -> float:
        """Seconds until a save is durable: the mean of the last few; 0 before the first."""
        return fmean(self._durable) if self._durable else 0.0

    @property
    def between_calls(self) -> float | None:
        """Seconds between calls of `due` while nothing is pending: the median; None before there are two."""
        return median(self._alone) if self._alone else None

    def end_step(self, now: float, *, pending: bool) -> None:
        """Note the end of a step.

        Args:
            now: the present, by `time.perf_counter`.
            pending: whether a save is pending, its evictions included.
        """
        began, self._began = self._began, now
        beside = self._beside
        if began is not None:
            (self._alone.append if beside is None else beside.add)(now - began)
        if beside is not None and not pending:
            self._beside = None
            self._record(beside)

    def save_taken(self, save: Save, now: float) -> None:
        """Note a save whose call has just ended; a step begins.

        Args:
            save: the save.
            now: the present, by `time.perf_counter`.
        """
        if self._beside is not None:
            self._record(self._beside)
        self._beside = _Beside(save)
        self._began = now

    def _record(self, beside: _Beside) -> None:
        save = beside.save
        alone = self.between_calls
        cost = save.stats.stall + (0.0 if alone is None else beside.slowdown(alone))
        if not save.committed.done() or save.committed.failed():
            self._lost += cost
            return
        if self._commits == 1:
            # The first save of a process also makes its host memory ready: it does not count beside others.
            self._costs.clear()
            self._durable.clear()
        self._commits += 1
        self._costs.append(cost + self._lost)
        self._durable.append(save.stats.durable)
        self._lost = 0.0
