"""Draw the step times along a run: background saving above `torch.save`, on the same axes."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

DARK, LIGHT = "#6e7781", "#d8dee4"


class Saves(NamedTuple):
    """The saves of one kind: their name, their color, the stall of each by its step, and the median stall."""

    name: str
    color: str
    stalls: dict[int, float]
    middle: float


def draw(events: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the run that `events` tell of, and write the picture to `path`.

    The run saves alternately in the background and by `torch.save`. Each panel has the steps that follow a
    save of its own kind in dark, so that what it does to them is seen where it belongs; those that follow one
    of the other kind are light, and without what that one cost.
    """
    resumed_at = next(e["step"] for e in events if e["event"] == "start" and e["part"] > 1)
    kept = [e for e in events if e["part"] > 1 or e.get("step", 0) <= resumed_at]
    seconds = {e["step"]: e["seconds"] for e in kept if e["event"] == "step"}
    ours, theirs = (
        Saves(
            name,
            color,
            {event["step"]: event["stall"] for event in kept if event["event"] == kind},
            median(event["stall"] for event in events if event["event"] == kind),
        )
        for name, color, kind in (
            ("asyncckpt, in the background", "#1a7f37", "save"),
            ("torch.save", "#cf222e", "torch.save"),
        )
    )

    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        upper, lower = figure.subplots(2, sharex=True, sharey=True)
        figure.suptitle("Time of each training step, with what saving added to it. Dark: steps after a save")
        _panel(upper, seconds, ours, theirs)
        _panel(lower, seconds, theirs, ours)
        for axes in (upper, lower):
            axes.axvline(resumed_at + 0.5, color="black", linewidth=0.8, linestyle=":")
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
        upper.annotate("killed, and resumed from here", (resumed_at + 0.5, 1), (4, 0), **where)
        lower.set_xlabel("step")
        lower.margins(x=0.01)
        # Steps with a save fit in; a process's first step, which warms up, may not.
        highest = max(seconds[step] + stall for step, stall in [*ours.stalls.items(), *theirs.stalls.items()])
        lower.set_ylim(0, 1.25 * highest)
        figure.savefig(path, dpi=150)


def _panel(axes: Axes, seconds: Mapping[int, float], own: Saves, other: Saves) -> None:
    """Draw all steps, with the saves of one kind stacked on theirs."""
    saves = sorted([*own.stalls, *other.stalls])
    for step, height in seconds.items():
        last_save = max((save for save in saves if save <= step), default=None)
        axes.bar(step, height, width=0.9, color=DARK if last_save in own.stalls else LIGHT)
    for step, stall in own.stalls.items():
        axes.bar(step, stall, bottom=seconds[step], width=0.9, color=own.color)
    title = f"{own.name}: training stands still for {own.middle * 1e3:.0f} ms (median)"
    axes.set_title(title, loc="left", color=own.color, fontsize="medium", fontweight="bold")
    axes.set_ylabel("seconds")
