"""Group checkpoints by series, and look up the metrics that options name."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import typer

from asyncckpt._inspection.texts import clean
from asyncckpt._naming import NameTemplate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asyncckpt.retention import Mode
    from asyncckpt.types import Checkpoint


def by_series(checkpoints: Iterable[Checkpoint]) -> dict[str | None, list[Checkpoint]]:
    """Return the checkpoints of each series, in the order given.

    Files without a sequence number and copies under other names are of no series. A file of an old version,
    which does not hold its template, is of the series whose template makes its name; those that fit none form
    one series, None.
    """
    committed = [checkpoint for checkpoint in checkpoints if checkpoint.sequence]
    templates = {}
    for filename in dict.fromkeys(checkpoint.filename for checkpoint in committed):
        with suppress(ValueError):  # not written by a Checkpointer
            templates.update({} if filename is None else {filename: NameTemplate(filename)})
    found: dict[str | None, list[Checkpoint]] = {}
    for checkpoint in committed:
        owner = next((key for key, names in templates.items() if names.owns(checkpoint)), None)
        if owner is not None or checkpoint.filename is None:
            found.setdefault(owner, []).append(checkpoint)
    return found


def series_text(key: str | None) -> str:
    """Return a series as a cell of a table."""
    return "(unknown)" if key is None else clean(key)


def parse_metric(text: str) -> tuple[str, Mode]:
    """Return the name and the mode of METRIC[:min|max]."""
    name, _, mode = text.rpartition(":")
    if mode == "max":
        return name, "max"
    return (name, "min") if mode == "min" else (text, "min")


def require_metric(metric: str, checkpoints: Iterable[Checkpoint], option: str, where: str = "") -> None:
    """Raise typer.BadParameter unless one of `checkpoints` has `metric`; the message lists their metrics.

    Args:
        metric: its name, which may be mistyped.
        checkpoints: the checkpoints to search.
        option: the option that gave the metric.
        where: suffix for "no checkpoint" in the message.
    """
    names = metric_names(checkpoints)
    if metric not in names:
        there = ", ".join(map(clean, names)) or "none at all"
        raise typer.BadParameter(
            f"no checkpoint{where} has a metric {metric!r}; there are: {there}", param_hint=option
        )


def metric_names(checkpoints: Iterable[Checkpoint]) -> list[str]:
    """Return the names of all metrics in order of appearance, without empty ones."""
    return list(dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.metrics if name))
