"""Decide which checkpoints stay: policies, and the pure function that evicts what none of them keeps.

A policy gets all committed checkpoints after each commit and returns those that it keeps. It does no I/O and
holds no state. Policies are combined with `|`: a checkpoint stays if any of them keeps it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

Mode = Literal["min", "max"]

_PUNCTUATION = re.compile(r"[\W_]+")


@runtime_checkable
class Policy(Protocol):
    """What every policy is: any object with this one method."""

    def keep(self, checkpoints: Sequence[Checkpoint], /) -> Collection[Checkpoint]:
        """Return those of `checkpoints` that are to stay."""


class _Combinable:
    """Gives a policy `|`, also with a policy that has none."""

    __slots__ = ()

    def __or__(self, other: Policy) -> AnyOf:
        return AnyOf((*_members(self), *_members(other))) if _is_policy(other) else NotImplemented

    def __ror__(self, other: Policy) -> AnyOf:
        return AnyOf((*_members(other), *_members(self))) if _is_policy(other) else NotImplemented


@dataclass(frozen=True, slots=True)
class AnyOf(_Combinable):
    """Keep what any of `policies` keeps; `|` makes it."""

    policies: tuple[Policy, ...]

    def keep(self, checkpoints: Sequence[Checkpoint], /) -> Collection[Checkpoint]:
        """Return the union of what the policies keep, each checkpoint once."""
        kept = {_identity(c): c for policy in self.policies for c in _kept_by(policy, checkpoints)}
        return list(kept.values())


@dataclass(frozen=True, slots=True)
class KeepAll(_Combinable):
    """Keep every checkpoint."""

    def keep(self, checkpoints: Sequence[Checkpoint], /) -> Collection[Checkpoint]:
        """Return all of `checkpoints`."""
        return checkpoints


@dataclass(frozen=True, slots=True)
class LastN(_Combinable):
    """Keep the `n` checkpoints that were committed last."""

    n: int

    def __post_init__(self) -> None:
        _check_count(self, "n", self.n)

    def keep(self, checkpoints: Sequence[Checkpoint], /) -> Collection[Checkpoint]:
        """Return the last `n` in order of commit."""
        return _in_order(checkpoints)[-self.n :]


@dataclass(frozen=True, slots=True)
class EveryN(_Combinable):
    """Keep the checkpoints whose step is a multiple of `n`; one without a step is none of them."""

    n: int

    def __post_init__(self) -> None:
        _check_count(self, "n", self.n)

    def keep(self, checkpoints: Sequence[Checkpoint], /) -> Collection[Checkpoint]:
        """Return those at steps 0, n, 2n and so on."""
        return [c for c in checkpoints if c.step is not None and c.step % self.n == 0]


@dataclass(frozen=True, slots=True)
class BestK(_Combinable):
    """Keep the `k` checkpoints that are best by `metric`, in the order that `rank` gives.

    Attributes:
        k: how many.
        metric: a name among the metrics given to `save`; a checkpoint without it is no candidate.
        mode: "min" where lower is better, "max" where higher is.
    """

    k: int
    metric: str
    mode: Mode = "min"

    def __post_init__(self) -> None:
        _check_count(self, "k", self.k)
        _check_ranking(self.metric, self.mode)

    def keep(self, checkpoints: Sequence[Checkpoint], /) -> Collection[Checkpoint]:
        """Return the best `k`."""
        return rank(checkpoints, self.metric, self.mode)[: self.k]


def rank(checkpoints: Iterable[Checkpoint], metric: str, mode: Mode = "min") -> list[Checkpoint]:
    """Return the checkpoints that have `metric`, best first.

    NaN is worse than every number, the infinities included. Of equally good checkpoints the one committed
    later is the better: it has trained longer.

    Args:
        checkpoints: in any order.
        metric: a name among the metrics given to `save`.
        mode: "min" where lower is better, "max" where higher is.
    """
    _check_ranking(metric, mode)
    sign = 1.0 if mode == "min" else -1.0

    def badness(checkpoint: Checkpoint) -> tuple[bool, float]:
        value = float(checkpoint.metrics[metric])
        return (True, 0.0) if math.isnan(value) else (False, sign * value)

    newest_first = reversed(_in_order(c for c in checkpoints if metric in c.metrics))
    return sorted(newest_first, key=badness)


def check_metrics(policy: object, metrics: Mapping[str, float]) -> None:
    """Raise if a checkpoint with these metrics would be evicted because of a wrong name.

    It needs a metric that a `BestK` ranks by. Where another policy decides, too, it may do without, but not
    with a name that differs in punctuation or case alone.

    Raises:
        ValueError: names the metric that is missing, and the nearest that is there.
    """

    def letters(name: str) -> str:
        return _PUNCTUATION.sub("", name).lower()

    members = _members(policy)
    wanted = [member.metric for member in members if isinstance(member, BestK)]
    missing = [metric for metric in wanted if metric not in metrics]
    may_do_without = len(wanted) < len(members) or len(missing) < len(wanted)
    given = {letters(name): name for name in metrics if name not in wanted}
    for metric in missing:
        same = given.get(letters(metric))
        if same is None and may_do_without:
            continue
        near = [same] if same else [given[n] for n in get_close_matches(letters(metric), given, n=1)]
        hint = f"; did you mean {near[0]!r}?" if near else ""
        there = ", ".join(map(repr, metrics)) or "none"
        raise ValueError(f"keep ranks by the metric {metric!r}, and metrics has {there}{hint}")


def first_best(policy: object) -> BestK | None:
    """Return the first `BestK` in `policy`, itself or a member of a union: what "best" means by default."""
    return next((member for member in _members(policy) if isinstance(member, BestK)), None)


def evict(policy: Policy, checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints that `policy` does not keep, in order of commit.

    The one committed last, by sequence number, is never among them, so that a run can always resume. Where
    several share the highest number, all of them stay.

    Args:
        policy: gets the checkpoints in order of commit.
        checkpoints: all committed ones of a series, in any order.

    Raises:
        TypeError: the policy returned something else than checkpoints that it was given. Like whatever it
            raises itself, this comes before anything was deleted.
    """
    committed = tuple(_in_order(checkpoints))
    if not committed:
        return []
    kept = {_identity(checkpoint) for checkpoint in _kept_by(policy, committed)}
    newest = committed[-1].sequence
    return [c for c in committed if _identity(c) not in kept and c.sequence != newest]


def _kept_by(policy: Policy, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return what `policy` keeps; raise TypeError for anything but checkpoints that it was given."""
    given = {_identity(c) for c in checkpoints}
    answer: object = policy.keep(checkpoints)
    if not isinstance(answer, Iterable):
        raise TypeError(f"{policy!r}.keep() must return checkpoints, not {answer!r}; nothing was evicted")
    kept = list(answer)
    for checkpoint in kept:
        if not isinstance(checkpoint, Checkpoint) or _identity(checkpoint) not in given:
            raise TypeError(
                f"{policy!r}.keep() must return some of the checkpoints that it was given, and nothing else;"
                f" {checkpoint!r} is none of them; nothing was evicted"
            )
    return kept


def _is_policy(candidate: object) -> bool:
    # A class has the method, too, and is none: `LastN(2) | LastN`.
    return isinstance(candidate, Policy) and not isinstance(candidate, type)


def _members(policy: object) -> tuple[Any, ...]:
    return policy.policies if isinstance(policy, AnyOf) else (policy,)


def _in_order(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    return sorted(checkpoints, key=_identity)


def _identity(checkpoint: Checkpoint) -> tuple[int, str]:
    return checkpoint.sequence, checkpoint.path


def _check_count(policy: object, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{type(policy).__name__}: {name} must be an int, not {value!r}")
    if value < 1:
        raise ValueError(f"{type(policy).__name__}: {name} must be at least 1, not {value}")


def _check_ranking(metric: object, mode: object) -> None:
    if not isinstance(metric, str):
        raise TypeError(f"metric must be a str, the name of a metric given to save(), not {metric!r}")
    if not metric:
        raise ValueError("metric must be the name of a metric given to save(), not an empty string")
    if not isinstance(mode, str):
        raise TypeError(f'mode must be "min" or "max", not {mode!r}')
    if mode not in get_args(Mode):
        raise ValueError(f'mode must be "min" (lower is better) or "max" (higher is better), not {mode!r}')
