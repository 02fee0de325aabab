"""Draw the step times of a run: asyncckpt above `torch.save`, on the same axes."""

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
    """The saves of one kind: name, color, stall of each save by its step, median stall, and a remark."""

    name: str
    color: str
    stalls: dict[int, float]
    middle: float
    remark: str


def draw(events: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the run that `events` describe, and write the picture to `path`.

    The run saves alternately with asyncckpt and with `torch.save`, and each has a panel. Steps after a save
    of the panel's own kind are dark, with the stall stacked on the step that saved. Steps after a save of the
    other kind are light and without that save's stall.
    """
    resumed_at = next(e["step"] for e in events if e["event"] == "start" and e["part"] > 1)
    kept = [e for e in events if e["part"] > 1 or e.get("step", 0) <= resumed_at]
    seconds = {e["step"]: e["seconds"] for e in kept if e["event"] == "step"}
    reserved = ", ".join(f"{e['seconds'] * 1e3:.0f} ms" for e in events if e["event"] == "reserve")
    ours, theirs = (
        Saves(
            name,
            color,
            {event["step"]: event["stall"] for event in kept if event["event"] == kind},
            median(event["stall"] for event in events if event["event"] == kind),
            remark,
        )
        for name, color, kind, remark in (
            ("asyncckpt", "#1a7f37", "save", f"; reserve() before the first: {reserved}"),
            ("torch.save", "#cf222e", "torch.save", ""),
        )
    )

    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        upper, lower = figure.subplots(2, sharex=True, sharey=True)
        figure.suptitle("Duration of each training step with its save. Dark: steps after a save of this kind")
        _panel(upper, seconds, ours, theirs)
        _panel(lower, seconds, theirs, ours)
        for axes in (upper, lower):
            axes.axvline(resumed_at + 0.5, color="black", linewidth=0.8, linestyle=":")
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
        upper.annotate("killed; resumed from here", (resumed_at + 0.5, 1), (4, 0), **where)
        lower.set_xlabel("step")
        lower.margins(x=0.01)
        # Every step with a save fits in; the first step of a process, which warms up, may not.
        highest = max(seconds[step] + stall for step, stall in [*ours.stalls.items(), *theirs.stalls.items()])
        lower.set_ylim(0, 1.25 * highest)
        figure.savefig(path, dpi=150)


def _panel(axes: Axes, seconds: Mapping[int, float], own: Saves, other: Saves) -> None:
    """Draw all steps, with the stalls of one kind of save stacked on theirs."""
    saves = sorted([*own.stalls, *other.stalls])
    for step, height in seconds.items():
        last_save = max((save for save in saves if save <= step), default=None)
        axes.bar(step, height, width=0.9, color=DARK if last_save in own.stalls else LIGHT)
    for step, stall in own.stalls.items():
        axes.bar(step, stall, bottom=seconds[step], width=0.9, color=own.color)
    title = f"{own.name}: a save stalls training for {own.middle * 1e3:.0f} ms (median){own.remark}"
    axes.set_title(title, loc="left", color=own.color, fontsize="medium", fontweight="bold")
    axes.set_ylabel("seconds")
