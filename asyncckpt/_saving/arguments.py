"""Check the arguments of a Checkpointer."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from asyncckpt.schedule import is_schedule


def checked_step(step: Any, state: Any) -> int:
    """Return a step as an int; raise TypeError if it is not one, for example if swapped with the state."""
    try:
        number = operator.index(step)
    except TypeError:
        hint = "; the arguments are save(step, state)" if isinstance(state, int) else ""
        raise TypeError(f"step must be an int, not {type(step).__name__}{hint}") from None
    if isinstance(step, bool):
        raise TypeError("step must be an int, not bool")
    return number


def checked_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """Return metrics as floats by name; raise TypeError if one is not a number."""
    numbers: dict[str, float] = {}
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be a mapping of names to numbers, not {metrics!r}")
    for name, value in (metrics or {}).items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metric {name!r} must be a number, not {value!r}") from error
    return numbers


def check_options(max_in_flight: int, when_busy: str, on_error: object, on_commit: object) -> None:
    """Raise TypeError or ValueError for invalid options of a saver."""
    if isinstance(max_in_flight, bool) or not isinstance(max_in_flight, int):
        raise TypeError(f"max_in_flight must be an int, not {max_in_flight!r}")
    if max_in_flight < 1:
        raise ValueError(f"max_in_flight must be at least 1, not {max_in_flight}")
    if when_busy not in {"wait", "skip", "replace"}:
        raise ValueError(f'when_busy must be "wait", "skip" or "replace", not {when_busy!r}')
    if when_busy == "replace" and max_in_flight < 2:  # noqa: PLR2004 - one being written, one to replace
        raise ValueError(
            'when_busy="replace" needs max_in_flight=2 or more: one is written, one can be replaced'
        )
    if on_error != "raise" and not callable(on_error):
        raise TypeError(f'on_error must be "raise" or a callable, not {on_error!r}')
    if on_commit is not None and not callable(on_commit):
        raise TypeError(f"on_commit must be a callable, not {on_commit!r}")


def check_rank_timeout(timeout: object) -> None:
    """Raise TypeError or ValueError if the time that a rank waits for others is invalid."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"rank_timeout must be a number of seconds, not {timeout!r}")
    if not 0 < timeout < math.inf:
        raise ValueError(f"rank_timeout must be positive and finite, not {timeout}")


def check_timing(every: object, grace: object, *, has_signals: bool) -> None:
    """Raise TypeError or ValueError for an invalid schedule or grace period."""
    if every is not None and not is_schedule(every):
        raise TypeError(
            "every must be a schedule such as Every(steps=500) or Budget(0.01), or an object with a method"
            f" due(); it is {every!r}"
        )
    if grace is None:
        return
    if isinstance(grace, bool) or not isinstance(grace, (int, float)):
        raise TypeError(f"grace must be a number of seconds, not {grace!r}")
    if not 0 < grace < math.inf:
        raise ValueError(f"grace must be positive and finite, not {grace}")
    if not has_signals:
        raise ValueError("grace counts from a signal; name the signals, such as on_signal=('SIGTERM',)")
