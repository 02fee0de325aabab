"""Decide when to save: schedules, and the record of a run that they decide by.

A schedule gets a `Progress` and returns whether a save is due. It does no I/O and holds no state. Schedules
are combined with `|`: a save is due if it is for any of them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

_SECONDS_OF = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
# A Budget takes its first save at this point: the steps before it tell how long an undisturbed one takes.
_FIRST_STEPS = 20
_FIRST_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run since its last save, and the cost of its saves.

    Attributes:
        step: the step given to `due`.
        steps: steps since the last save, or since the start of the run.
        seconds: seconds since the last save, or since the first call of `due`.
        saves: number of saves so far.
        cost: seconds that a save takes from the training; None before the first one is measured.
        durable: seconds from the call of `save` until the checkpoint is durable; 0 before that is measured.
        step_time: seconds that a step takes while no save is pending; None before that is measured.
    """

    step: int
    steps: int
    seconds: float
    saves: int = 0
    cost: float | None = None
    durable: float = 0.0
    step_time: float | None = None


@runtime_checkable
class Schedule(Protocol):
    """The interface of a schedule: any object with this one method."""

    def due(self, progress: Progress, /) -> bool:
        """Return whether a save is due. Once true, it should stay true until a save is taken."""


class _Combinable:
    """Gives a schedule `|`, also with a schedule that has none."""

    __slots__ = ()

    def __or__(self, other: Schedule) -> AnyOf:
        return AnyOf((*_members(self), *_members(other))) if is_schedule(other) else NotImplemented

    def __ror__(self, other: Schedule) -> AnyOf:
        return AnyOf((*_members(other), *_members(self))) if is_schedule(other) else NotImplemented


@dataclass(frozen=True, slots=True)
class AnyOf(_Combinable):
    """A save is due if it is for any of `schedules`; `|` makes it."""

    schedules: tuple[Schedule, ...] = ()

    def due(self, progress: Progress, /) -> bool:
        """Return whether a save is due for one of the schedules."""
        return any(schedule.due(progress) for schedule in self.schedules)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Every(_Combinable):
    """Save at regular intervals. Exactly one argument is given.

    Attributes:
        steps: save at each multiple of so many steps, or at the first call of `due` after it.
        seconds: save so many seconds after the last save; the first time after the first call of `due`.
        minutes: the same in minutes.
        hours: the same in hours.
    """

    steps: int | None = None
    seconds: float | None = None
    minutes: float | None = None
    hours: float | None = None

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            raise TypeError(f"Every takes exactly one of steps, seconds, minutes and hours, not {len(given)}")
        [(name, value)] = given.items()
        if name != "steps":
            _check_duration("Every", name, value)
        elif not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"Every: steps must be an int, not {value!r}")
        elif value < 1:
            raise ValueError(f"Every: steps must be at least 1, not {value}")

    def __repr__(self) -> str:
        return f"Every({', '.join(f'{name}={value!r}' for name, value in self._given().items())})"

    def due(self, progress: Progress, /) -> bool:
        """Return whether a multiple was reached, or the time is over, since the last save."""
        if progress.steps < 1:
            return False
        if self.steps is not None:
            return progress.step // self.steps > (progress.step - progress.steps) // self.steps
        [(unit, number)] = self._given().items()
        return progress.seconds >= number * _SECONDS_OF[unit]

    def _given(self) -> dict[str, float]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Budget(_Combinable):
    """Save as often as a share of the training time allows.

    The cost of a save is measured: see `Checkpointer.due`. Before the first measurement, the first save of a
    run is due after 20 steps or 60 seconds.

    Attributes:
        share: the share of the time that saves may take, such as 0.01.
        mtbf_hours: mean time between failures of the whole job, in hours. With it, saves are no more frequent
            than at the optimum of Young and Daly, where saves and lost work together cost least.
    """

    share: float
    mtbf_hours: float | None = None

    def __post_init__(self) -> None:
        _check_duration("Budget", "share", self.share)
        if self.share >= 1:
            raise ValueError(f"Budget: share must be below 1, such as 0.01 for 1 percent, not {self.share}")
        if self.mtbf_hours is not None:
            _check_duration("Budget", "mtbf_hours", self.mtbf_hours)

    def due(self, progress: Progress, /) -> bool:
        """Return whether the interval is over since the last save."""
        if progress.steps < 1:
            return False
        if progress.cost is None:
            warm = progress.steps >= _FIRST_STEPS or progress.seconds >= _FIRST_SECONDS
            return warm and progress.saves == 0
        return progress.seconds >= self.interval(progress.cost, progress.durable)

    def interval(self, cost: float, durable: float = 0.0) -> float:
        """Return the shortest interval between saves, in seconds.

        Args:
            cost: seconds that a save takes from the training.
            durable: seconds until a save is durable; an earlier save would wait for it.
        """
        cost = max(cost, 0.0)
        mtbf = (self.mtbf_hours or 0.0) * _SECONDS_OF["hours"]
        return max(cost / self.share, durable, math.sqrt(2 * cost * mtbf))


def calls_until_due(schedule: Schedule, progress: Progress, stride: int, seconds: float, limit: int) -> int:
    """Return after how many more calls of `due` a save is due for a schedule, at least 1 and at most `limit`.

    Args:
        schedule: one that stays due until a save.
        progress: at the present call.
        stride: steps from one call to the next.
        seconds: seconds from one call to the next.
        limit: the highest result.
    """

    def is_due(calls: int) -> bool:
        steps = calls * stride
        later = replace(
            progress,
            step=progress.step + steps,
            steps=progress.steps + steps,
            seconds=progress.seconds + calls * seconds,
        )
        return bool(schedule.due(later))

    return 1 + bisect_left(range(1, limit), x=True, key=is_due)


def is_schedule(candidate: object) -> bool:
    """Return whether an object can be a schedule; a class is none, though it has the method."""
    return isinstance(candidate, Schedule) and not isinstance(candidate, type)


def _members(schedule: Any) -> tuple[Schedule, ...]:
    return schedule.schedules if isinstance(schedule, AnyOf) else (schedule,)


def _check_duration(owner: str, name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be a number, not {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{owner}: {name} must be positive and finite, not {value}")
