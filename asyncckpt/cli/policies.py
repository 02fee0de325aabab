"""Policies and metrics as they are typed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from asyncckpt._inspection.texts import clean
from asyncckpt.retention import BestK, EveryN, LastN

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asyncckpt.retention import Mode, Policy
    from asyncckpt.types import Checkpoint


def parse_policy(spec: str) -> Policy:
    """Return the policy that best:K:METRIC[:min|max], last:N or every:N means."""
    kind, _, rest = spec.partition(":")
    count, _, metric = rest.partition(":")
    try:
        if kind == "best":
            return BestK(int(count), *parse_metric(metric))
        if kind == "last":
            return LastN(int(rest))
        if kind == "every":
            return EveryN(int(rest))
    except ValueError:
        pass
    raise typer.BadParameter(
        f"{spec!r} is no policy; use best:K:METRIC[:min|max], last:N or every:N", param_hint="--keep"
    )


def parse_metric(text: str) -> tuple[str, Mode]:
    """Return the metric that METRIC[:min|max] means, and which of its values are the better ones."""
    name, _, mode = text.rpartition(":")
    if mode == "max":
        return name, "max"
    return (name, "min") if mode == "min" else (text, "min")


def require_metric(metric: str, checkpoints: Iterable[Checkpoint], option: str, where: str = "") -> None:
    """Raise unless one of `checkpoints` has `metric`, which may be a slip of the keyboard.

    Args:
        metric: its name.
        checkpoints: where to look for it.
        option: by which it was given.
        where: what to add to "no checkpoint".

    Raises:
        typer.BadParameter: names the metrics that there are; ends the command with status 2.
    """
    names = metric_names(checkpoints)
    if metric not in names:
        there = ", ".join(map(clean, names)) or "none at all"
        raise typer.BadParameter(
            f"no checkpoint{where} has a metric {metric!r}; there are: {there}", param_hint=option
        )


def metric_names(checkpoints: Iterable[Checkpoint]) -> list[str]:
    """Return the names of all metrics, in the order in which they come up; one that is empty is none."""
    return list(dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.metrics if name))
