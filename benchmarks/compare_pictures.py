"""Draw the pictures of a comparison from its JSON alone: stalls, steps beside a save, and growth."""

from __future__ import annotations

import math
from itertools import cycle
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from compare_plan import GROWING

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from compare_data import Found

OWN, OTHERS, LIMIT = "#1a7f37", "#6e7781", "#cf222e"
GROWN = ("#1f77b4", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")
STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def write(found: Found, path: Path) -> None:
    """Write the pictures beside the JSON at `path`, which gives them their names."""
    with mpl.rc_context(STYLE):
        for name, figure in (("stall", stall(found)), ("steps", steps(found)), ("growth", growth(found))):
            if figure is not None:
                figure.savefig(path.with_name(f"{path.stem}_{name}.png"), dpi=110)


def stall(found: Found) -> Figure | None:
    """Draw the standstill of each peer, and when its checkpoint is durable, for the first of the states."""
    state = next(iter(found.main_states()), "")
    peers = [peer for peer in reversed(found.peers) if found.of("saves", state, peer, "stall_s")]
    if not peers:
        return None
    figure = Figure(figsize=(9, 0.42 * len(peers) + 1.4), layout="constrained")
    axes = figure.subplots()
    for row, peer in enumerate(peers):
        warm, first, durable = (
            found.middle("saves", state, peer, name) for name in ("stall_s", "first_stall_s", "durable_s")
        )
        color = OWN if found.own(peer) else OTHERS
        axes.barh(row, warm, height=0.6, color=color)
        axes.plot(first, row, "|", color=color, markersize=14)
        axes.plot(durable, row, "D", color=color, markersize=4, fillstyle="none")
        axes.annotate(
            f" {warm * 1e3:.0f} ms", (warm, row), va="center", fontsize=8, color="white", ha="right"
        )
    axes.axvline(found.copy(state), color=LIMIT, linewidth=1, label="limit: copy into warm buffers")
    write_s = found.middle("bare", state, "limits", "write_s")
    axes.axvline(
        write_s, color=LIMIT, linewidth=1, linestyle=":", label="limit: parallel direct writes + fsync"
    )
    axes.set_xscale("log")
    axes.set_xlim(left=min(found.middle("saves", state, peer, "stall_s") for peer in peers) / 2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("seconds. Bar: training stands still, warm. |: the first save. ◇: durable")
    axes.set_yticks(range(len(peers)), [found.label(peer) for peer in peers])
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def steps(found: Found) -> Figure | None:
    """Draw each training step around one save, a panel for each of some peers."""
    traces = {run["peer"]: run["samples"]["trace"][0] for run in found.data["runs"] if _has_trace(run)}
    peers = [peer for peer in GROWING if peer in traces]
    if not peers:
        return None
    figure = Figure(figsize=(9, 1.5 * len(peers) + 0.6), layout="constrained")
    panels = figure.subplots(len(peers), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, peer in zip(panels, peers, strict=True):
        _steps(axes, traces[peer], OWN if found.own(peer) else OTHERS)
        axes.set_title(found.label(peer), loc="left", fontsize="medium")
        axes.set_ylabel("ms")
    panels[-1].set_xlabel("seconds from the call of save. Each dot is a step; the bar is the standstill")
    return figure


def _has_trace(run: dict[str, Any]) -> bool:
    return run["kind"] == "saves" and "trace" in run.get("samples", {})


def _steps(axes: Axes, trace: dict[str, Any], color: str) -> None:
    at = -sum(trace["before"])
    times, heights = [], []
    for step in trace["before"]:
        times.append(at)
        heights.append(step)
        at += step
    axes.bar(0, trace["stall"], width=trace["stall"] / 1e3, align="edge", color=color, alpha=0.35)
    at = trace["stall"]
    for step in [*trace["beside"], *trace["after"]]:
        times.append(at)
        heights.append(step)
        at += step
    axes.plot([time / 1e3 for time in times], heights, ".", markersize=2, color=color)
    axes.axvline((trace["stall"] + sum(trace["beside"])) / 1e3, color=color, linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def growth(found: Found) -> Figure | None:
    """Draw how stall and completion grow with bytes, with the number of tensors, and with what is kept."""
    panels = [
        (of, kind, name)
        for of, kind in (("bytes", "saves"), ("tensors", "saves"), ("kept", "kept"))
        for name in ("stall_s", "complete_s")
        if any(state.startswith(f"{of}:") for state in found.states(kind))
    ]
    if not panels:
        return None
    figure = Figure(figsize=(9, 2.4 * math.ceil(len(panels) / 2)), layout="constrained")
    grid = figure.subplots(math.ceil(len(panels) / 2), 2, squeeze=False).flatten()
    for axes, (of, kind, name) in zip(grid, panels, strict=True):
        points = [state for state in found.states(kind) if state.startswith(f"{of}:")]
        numbers = [float(point.partition(":")[2]) for point in points]
        for color, peer in zip(cycle(GROWN), found.peers):  # a peer has one color in all panels
            values = [found.middle(kind, point, peer, name) for point in points]
            if not all(math.isnan(value) for value in values):
                own = found.own(peer)
                style = {"color": OWN if own else color, "linewidth": 2.2 if own else 1.0}
                axes.plot(numbers, values, marker=".", label=found.peers[peer]["name"], **style)
        if kind == "saves" and name == "stall_s":
            copies = [found.copy(point) for point in points]
            axes.plot(numbers, copies, color=LIMIT, linestyle=":", label="limit: copy")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(
            {"stall_s": "stall, s", "complete_s": "complete, s"}[name], loc="left", fontsize="medium"
        )
        axes.set_xlabel({"bytes": "bytes", "tensors": "tensors of 1 KiB", "kept": "checkpoints kept"}[of])
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure
