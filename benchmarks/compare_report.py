"""Draw the tables of a comparison, in Markdown, from its JSON alone.

python benchmarks/compare_report.py benchmarks/results/compare.json    # writes table and pictures beside it
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import compare_data
from compare_data import percentile, title
from report import heading, markdown, seconds, size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeAlias

    from compare_data import Found

    Columns: TypeAlias = Mapping[str, Callable[["Row"], str]]


class Row(NamedTuple):
    """One peer in one state, or the limits there."""

    found: Found
    state: str
    peer: str

    def all(self, kind: str, name: str) -> list[Any]:
        """Return all samples of a figure."""
        return self.found.of(kind, self.state, self.peer, name)

    def middle(self, kind: str, name: str) -> float:
        """Return the median of a figure."""
        return self.found.middle(kind, self.state, self.peer, name)

    def error(self, kind: str) -> str | None:
        """Return what a measurement failed with, in words for a cell."""
        error = self.found.error(kind, self.state, self.peer)
        return None if error is None else f"failed: {shortened(error)}"

    def limit(self, name: str) -> float:
        """Return the median of what nobody can beat in this state."""
        return self.found.middle("bare", self.state, "limits", name)


def _beside(row: Row) -> str:
    ratio = row.middle("saves", "step_s") / row.middle("saves", "alone_step_s")
    return "" if row.found.peers[row.peer]["blocks"] else f"{ratio:.2f}"


def _longest(row: Row) -> str:
    longest = max(row.all("saves", "longest_step_s"))
    return "" if row.found.peers[row.peer]["blocks"] else seconds(longest)


def _lost(row: Row) -> str:
    lost = row.all("saves", "lost_s")
    return f"{seconds(row.middle('saves', 'lost_s'))} ({seconds(min(lost))} … {seconds(max(lost))})"


def _warm(row: Row) -> str:
    last = percentile(row.all("saves", "stall_s"), 0.99)
    return f"{seconds(row.middle('saves', 'stall_s'))} / {seconds(last)}"


def _over_copy(row: Row) -> str:
    return f"{row.middle('saves', 'stall_s') / row.found.copy(row.state):.1f}"


def _over_write(row: Row) -> str:
    return f"{row.middle('saves', 'durable_s') / row.limit('write_s'):.1f}"


def _memory(row: Row) -> str:
    peak = row.middle("memory", "peak_bytes")
    share = peak / row.middle("memory", "state_bytes")
    return row.error("memory") or f"{size(peak)} ({share:.2f} of the state)"


def _load(row: Row) -> str:
    return row.error("loads") or seconds(row.middle("loads", "load_s"))


def _equal(row: Row) -> str:
    found = row.all("loads", "difference")
    return next((f"no: {difference}" for difference in found if difference), "yes" if found else "")


def _ties(row: Row) -> str:
    found = row.all("loads", "ties_kept")
    return "" if not found else "yes" if all(found) else "no"


COSTS: Columns = {
    "stall, first": lambda row: seconds(row.middle("saves", "first_stall_s")),
    "stall, warm: median / p99": _warm,
    "÷ copy": _over_copy,
    "lost per save (least … greatest)": _lost,
    "step while writing ÷ alone": _beside,
    "longest step": _longest,
    "durable after": lambda row: seconds(row.middle("saves", "durable_s")),
    "÷ direct writes": _over_write,
    "durable, memory at hand": lambda row: seconds(row.middle("saves", "at_hand_durable_s")),
    "synced by itself": lambda row: "yes" if min(row.all("saves", "synced")) else "no",
}

ON_GPU = "on the GPU"
# Each with the kind of measurement that it is taken from.
TAKES: Mapping[str, tuple[str, Callable[[Row], str]]] = {
    "peak memory over the live state": ("memory", _memory),
    ON_GPU: ("memory", lambda row: size(row.middle("memory", "gpu_peak_bytes"))),
    "written": ("saves", lambda row: size(row.middle("saves", "file_bytes"))),
    "load": ("loads", _load),
    "loads what was saved": ("loads", _equal),
    "ties kept": ("loads", _ties),
}

# What a reader compares first: (kind, figure) of each.
FIGURES = {
    "stall, warm": ("saves", "stall_s"),
    "stall, first": ("saves", "first_stall_s"),
    "lost per save": ("saves", "lost_s"),
    "durable after": ("saves", "durable_s"),
    "peak memory": ("memory", "peak_bytes"),
    "load": ("loads", "load_s"),
}

GROWTH = {
    "bytes": "bytes of the state",
    "tensors": "number of tensors of 1 KiB",
    "kept": "checkpoints kept in the directory",
}


def draw(found: Found) -> str:
    """Return all tables of a comparison."""
    sections = [_heading(found)]
    for state in found.main_states():
        sections += [costs(found, state)] if state in found.states("saves") else []
        sections.append(_takes(found, state))
    sections += [_burst(found, state) for state in found.states("burst")]
    sections += [_growth(found, of) for of in GROWTH if found.points(of)]
    sections.append(_behind(found))
    return "\n\n".join(sections)


def _heading(found: Found) -> str:
    data = found.data
    lines = heading(data)
    if data["stopped"]:
        lines += ["", "Stopped before its end: what is missing was not measured."]
    if data["options"]["quick"]:
        lines += ["", "A quick run with a small state: it shows that the measuring works, and no more."]
    return "\n".join(lines)


def costs(found: Found, state: str) -> str:
    """Return the table of what saves cost in a state."""
    limits = Row(found, state, "limits")
    step = limits.limit("step_s") / limits.limit("alone_step_s")
    copy, write = seconds(found.copy(state)), seconds(limits.limit("write_s"))
    rows = [
        ["*limit: copy into warm buffers*", "", copy, "1", *[""] * 7],
        [f"*limit: {_writes(found, state)}*", *[""] * 4, f"{step:.2f}", "", write, "1", "", "yes"],
    ]
    nbytes, tensors = (limits.limit(name) for name in ("state_bytes", "tensors"))
    count = max((len(found.of("saves", state, peer, "stall_s")) for peer in found.peers), default=0)
    return "\n".join(
        [
            f"### What a save costs: {title(state)}, {size(nbytes)} in {tensors:.0f} tensors",
            "",
            *markdown(["", *COSTS], rows + _rows(found, state, "saves", COSTS)),
            "",
            f"Up to {count} warm saves of each. With fewer than a hundred, p99 is the greatest.",
        ]
    )


def _writes(found: Found, state: str) -> str:
    direct = all(found.of("bare", state, "limits", "direct"))
    return "parallel direct writes + fsync" if direct else "parallel writes + fsync (no O_DIRECT there)"


def _takes(found: Found, state: str) -> str:
    kinds = {kind for kind in ("memory", "loads", "saves") if state in found.states(kind)}
    columns = {name: cell for name, (kind, cell) in TAKES.items() if kind in kinds}
    if not found.data["gpu"]:
        columns.pop(ON_GPU, None)
    head = f"### What it takes, and what comes back: {title(state)}"
    rows = [
        [_name(found, peer), *(cell(Row(found, state, peer)) for cell in columns.values())]
        for peer in found.peers
        if any(found.measured(kind, state, peer) for kind in kinds)
    ]
    return "\n".join([head, "", *markdown(["", *columns], rows)])


def _burst(found: Found, state: str) -> str:
    def stall(turn: int) -> Callable[[Row], str]:
        return lambda row: seconds(row.all("burst", "stall_s")[turn])

    count = max((len(found.of("burst", state, peer, "stall_s")) for peer in found.peers), default=0)
    columns = {f"stall of save {turn + 1}": stall(turn) for turn in range(count)}
    columns["all complete"] = lambda row: seconds(row.middle("burst", "all_complete_s"))
    columns["peak memory over the live state"] = lambda row: size(row.middle("burst", "peak_bytes"))
    head = f"### {count} saves back to back: {title(state)}"
    return "\n".join([head, "", *markdown(["", *columns], _rows(found, state, "burst", columns))])


def _growth(found: Found, of: str) -> str:
    kind, points = "kept" if of == "kept" else "saves", found.points(of)

    def cell(row: Row) -> str:
        times = seconds(row.middle(kind, "stall_s")), seconds(row.middle(kind, "complete_s"))
        return row.error(kind) or " / ".join(times)

    rows = [["*limit: copy*", *(seconds(found.copy(point)) for point in points)]] if of != "kept" else []
    for peer in found.peers:
        measured = [Row(found, point, peer) for point in points]
        if any(row.all(kind, "stall_s") or row.error(kind) for row in measured):
            rows.append([_name(found, peer), *map(cell, measured)])
    head = ["", *(_count(point) for point in points)]
    return "\n".join([f"### Stall / complete, by {GROWTH[of]}", "", *markdown(head, rows)])


def _behind(found: Found) -> str:
    """Say where asyncckpt is not the first."""
    lines = []
    for state in found.main_states():
        for what, (kind, name) in FIGURES.items():
            show = size if name.endswith("_bytes") else seconds
            values = {peer: found.middle(kind, state, peer, name) for peer in found.peers}
            own = min((v for p, v in values.items() if found.own(p) and v == v), default=math.inf)  # noqa: PLR0124
            ahead = [f"{found.label(p)} {show(v)}" for p, v in values.items() if not found.own(p) and v < own]
            if ahead:
                lines.append(f"- {title(state)}, {what}: asyncckpt {show(own)}; {', '.join(ahead)}")
    return "\n".join(["### Where asyncckpt is not the first", "", *(lines or ["Nowhere in this run."])])


def _rows(found: Found, state: str, kind: str, columns: Columns) -> list[list[str]]:
    """Return a row for each peer; what failed says so instead of its figures."""
    rows = []
    for peer in found.peers:
        row = Row(found, state, peer)
        if row.all(kind, "stall_s"):
            name = _name(found, peer) + (f" ({error})" if (error := row.error(kind)) else "")
            rows.append([name, *(cell(row) for cell in columns.values())])
        elif error := row.error(kind):
            rows.append([_name(found, peer), error, *[""] * (len(columns) - 1)])
    return rows


def _name(found: Found, peer: str) -> str:
    return f"**{found.label(peer)}**" if found.own(peer) else found.label(peer)


def _count(point: str) -> str:
    kind, _, number = point.partition(":")
    return size(float(number)) if kind == "bytes" else f"{int(number):,}"


def shortened(error: str) -> str:
    """Return the first line of an error, cut where it is too long for a table."""
    line = error.strip().splitlines()[0]
    return line if len(line) <= 120 else line[:119] + "…"


def write(path: Path) -> None:
    """Write tables and pictures beside the JSON of a comparison."""
    import compare_pictures  # noqa: PLC0415 - whoever only reads tables needs no matplotlib

    found = compare_data.read(path)
    path.with_suffix(".md").write_text(draw(found) + "\n", encoding="utf-8")
    compare_pictures.write(found, path)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
