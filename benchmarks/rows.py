"""The targets, what the samples of a run show of each, and the table of that."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from report import heading
from report import seconds as written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    Samples = Mapping[str, Sequence[float]]

MIB = 2**20
SIGNS = {"<=": "≤", ">=": "≥"}


@dataclass(frozen=True)
class Target:
    """What one figure is to reach.

    Attributes:
        key: names it in the JSON.
        what: names it in the table.
        relation: on which side of `limit` it is to lie.
        limit, unit: where.
    """

    key: str
    what: str
    relation: Literal["<=", ">="]
    limit: float
    unit: str

    def met_by(self, value: float) -> bool:
        """Whether `value` lies on the right side."""
        return value <= self.limit if self.relation == "<=" else value >= self.limit


TARGETS = (
    Target("warm_stall", "stall of a warm save() / plain copy", "<=", 1.15, "x"),
    Target("first_stall_reserved", "first save() of a process, after reserve / copy", "<=", 1.5, "x"),
    Target("first_stall_unreserved", "first save() of a process, without / copy", "<=", 8.0, "x"),
    Target("durable_rate", "bytes/s until durable / bare writes + fsync", ">=", 0.9, "x"),
    Target("step_time", "step time beside a save / beside bare writes", "<=", 1.10, "x"),
    Target("longest_pause", "longest pause of the loop beside a save", "<=", 10.0, "ms"),
    Target("background_cpu", "background CPU", "<=", 0.4, "core-s/GB"),
    Target("memory", "host memory over the live state - its size", "<=", 64.0, "MiB"),
    Target("tensors_values", "10,000 tensors of 1 KiB, values changed", "<=", 5.0, "µs each"),
    Target("tensors_numbers", "10,000 tensors of 1 KiB, numbers changed too", "<=", 15.0, "µs each"),
    Target("small_state", "1 MB state, warm: until save() returns", "<=", 1.0, "ms"),
    Target("overlap_call", "save(overlap=True) / (5 ms + 3 µs a tensor)", "<=", 1.0, "x"),
    Target("overlap_lost", "lost per save, Checkpointer(overlap=True) / blocking", "<=", 1.1, "x"),
    Target("load_rate", "load(): bytes/s / bare reads", ">=", 0.8, "x"),
    Target("load_speedup", "load(): faster than torch.load", ">=", 1.0, "x"),
    Target("restore_rate", "restore(): bytes/s / bare reads", ">=", 0.8, "x"),
    Target("restore_speedup", "restore(): faster than load + load_state_dict", ">=", 1.0, "x"),
)


class Figure(NamedTuple):
    """What was measured.

    Attributes:
        value: a median, or a ratio of medians.
        low, high: least and greatest of the single repetitions.
        details: where it comes from, line by line.
    """

    value: float
    low: float
    high: float
    details: tuple[str, ...]


def rows(samples: Mapping[str, Samples]) -> list[dict[str, Any]]:
    """Judge the samples of all measurements; returns a row for each target."""
    figures = {
        **_stalls(samples),
        **durable_figures(samples["warm_saves"]),
        **_steps(samples["steps"]),
        **_memory(samples["memory"]),
        **_tensors(samples["many_tensors"]),
        **_small(samples["small"]),
        **_overlapped(samples["overlapped"]),
        **load_figures(samples["loads"]),
    }
    return [
        {**vars(target), **figures[target.key]._asdict(), "met": target.met_by(figures[target.key].value)}
        for target in TARGETS
    ]


def summary(samples: Samples) -> dict[str, dict[str, float]]:
    """Return number, median, least and greatest of each kind of sample."""
    return {
        name: {"n": len(values), "median": median(values), "least": min(values), "greatest": max(values)}
        for name, values in samples.items()
    }


def draw(data: Mapping[str, Any]) -> str:
    """Return what is shown of a run, whose data are those that go into the JSON."""
    met = sum(row["met"] for row in data["rows"])
    closing = [
        f"{met} of {len(data['rows'])} met. Medians; least and greatest are those of single repetitions."
    ]
    if data["options"]["quick"]:
        closing.append(
            "A quick run with a small state: it shows that the measuring works, not what is reached."
        )
    return "\n".join([*heading(data), "", *table(data["rows"]), "", *closing])


def table(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table of rows, which have the names of `Target` and of `Figure`, and `met`.

    `met` is None if there is no figure; the details then say why.
    """
    yield f"{'':<48}{'target':>16}{'measured':>17}{'(least … greatest)':>21}"
    for row in rows:
        target = f"{SIGNS[row['relation']]} {row['limit']:g} {row['unit']}"
        measured = spread = ""
        if row["met"] is not None:
            measured = f"{_number(row['value'])} {row['unit']}"
            spread = f"({_number(row['low'])} … {_number(row['high'])})"
        yield f"{row['what']:<48}{target:>16}{measured:>17}{spread:>21}  {_verdict(row)}"
        for detail in row["details"]:
            yield f"      {detail}"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _verdict(row: Mapping[str, Any]) -> str:
    if row["met"] is None:
        return "not measured"
    if row["met"]:
        return "met"
    if not row["limit"]:
        return "MISSED"
    return f"MISSED: {row['value'] / row['limit']:.2f} of the target"


def _stalls(samples: Mapping[str, Samples]) -> dict[str, Figure]:
    warm, reserved, unreserved = (samples[n] for n in ("warm_saves", "first_reserved", "first_unreserved"))
    return {
        "warm_stall": _copied(
            warm,
            f"the plain copy by one thread: {_ms(warm['copy_by_one_thread_s'])}",
            "Save.stats: " + _parts(warm, "stall", "wait", "freeze", "copy"),
        ),
        "first_stall_reserved": _copied(reserved, f"reserve() itself: {_ms(reserved['reserve_s'])}"),
        "first_stall_unreserved": _copied(unreserved),
    }


def _copied(samples: Samples, *details: str) -> Figure:
    beside = f"save() {_ms(samples['stall_s'])}, plain copy {_ms(samples['copy_s'])}"
    return ratio(samples["stall_s"], samples["copy_s"], beside, *details)


def durable_figures(warm: Samples) -> dict[str, Figure]:
    """Return the rate until durable beside bare writes, from the samples of `measure_saves.warm_saves`."""
    how = "O_DIRECT writes" if warm["direct"][0] else "buffered writes (O_DIRECT is refused here)"
    ours, bare = (_rate(warm["file_bytes"][0], warm[name]) for name in ("durable_s", "bare_write_s"))
    details = (
        f"from the call of save() {ours}, bare parallel {how} + fsync {bare}",
        "Save.stats: " + _parts(warm, "write", "sync", "commit", "checksum", "durable"),
    )
    return {"durable_rate": ratio(warm["bare_write_s"], warm["durable_s"], *details)}


def _steps(steps: Samples) -> dict[str, Figure]:
    kinds = {"save": "beside a save", "bare": "beside bare writes", "undisturbed": "undisturbed"}

    def told(figure: str, form: Callable[[Sequence[float]], str]) -> str:
        return ", ".join(f"{name} {form(steps[f'{kind}_{figure}'])}" for kind, name in kinds.items())

    pauses = told("pause_s", lambda seconds: f"{_ms(seconds)} (worst {_ms([max(seconds)])})")
    return {
        "step_time": ratio(
            steps["save_step_s"],
            steps["bare_step_s"],
            f"mean step {told('step_s', _ms)}",
            f"median step {told('median_s', _ms)}",
        ),
        "longest_pause": plain(
            steps["save_pause_s"], 1e3, "median of the longest pause in each of the repetitions", pauses
        ),
        "background_cpu": plain(
            steps["save_cpu_s_per_gb"], 1, f"the bare writer takes {median(steps['bare_cpu_s_per_gb']):.2f}"
        ),
    }


def _memory(memory: Samples) -> dict[str, Figure]:
    state = memory["state_bytes"][0]
    peak, held = (median(memory[name]) / MIB for name in ("peak_bytes", "held_bytes"))
    details = (
        f"peak {peak:,.0f} MiB over a live state of {state / MIB:,.0f} MiB, held after it {held:,.0f} MiB"
    )
    return {"memory": plain([peak - state for peak in memory["peak_bytes"]], 1 / MIB, details)}


def _tensors(tensors: Samples) -> dict[str, Figure]:
    return {
        f"tensors_{case}": plain(
            tensors[f"{case}_s"], 1e6 / tensors["tensors"][0], f"save() {_ms(tensors[f'{case}_s'])}"
        )
        for case in ("values", "numbers")
    }


def _small(small: Samples) -> dict[str, Figure]:
    stalls = small["stall_s"]
    details = f"{small['state_bytes'][0] / 1e6:.2f} MB in 16 tensors, {len(stalls)} saves"
    return {"small_state": plain(stalls, 1e3, details)}


def _overlapped(samples: Samples) -> dict[str, Figure]:
    calls, step = samples["overlapped_call_s"], median(samples["step_s"])
    allowed = 5e-3 + 3e-6 * samples["tensors"][0]
    lost = {
        kind: [seconds - step for seconds in samples[f"{kind}_step_s"]]
        for kind in ("blocking", "overlapped", "chosen")
    }
    chosen = "overlapped" if median(samples["chosen_was_overlapped"]) else "blocking"
    losses = ", ".join(f"{kind} {_ms(values)}" for kind, values in lost.items())
    details = (
        f"iteration {_ms(samples['step_s'])}; lost per save: {losses} (decided: {chosen})",
        f"fence of an overlapped save {_ms(samples['overlapped_fence_s'])}",
    )
    return {
        "overlap_call": ratio(calls, [allowed] * len(calls), f"the call {_ms(calls)}"),
        "overlap_lost": ratio(lost["chosen"], lost["blocking"], *details),
    }


def load_figures(loads: Samples) -> dict[str, Figure]:
    """Return the figures of loading and restoring, from the samples of `measure_loads.loads`."""
    nbytes = loads["file_bytes"][0]
    fresh, warm = (_rate(nbytes, loads[f"bare_{memory}_s"]) for memory in ("fresh", "warm"))
    bare = f"bare parallel reads {fresh} into fresh memory (the measure), {warm} into warm memory"
    figures = {}
    for way, stock in (("load", "torch.load"), ("restore", "torch.load + load_state_dict")):
        ours, theirs = loads[f"{way}_s"], loads[f"torch_{way}_s"]
        figures[f"{way}_rate"] = ratio(loads["bare_fresh_s"], ours, f"{way}() {_rate(nbytes, ours)}", bare)
        figures[f"{way}_speedup"] = ratio(theirs, ours, f"{way}() {_ms(ours)}, {stock} {_ms(theirs)}")
    return figures


def ratio(top: Sequence[float], bottom: Sequence[float], *details: str) -> Figure:
    """Return the ratio of medians as a figure; its spread is that of the single pairs."""
    pairs = [a / b for a, b in zip(top, bottom, strict=True)]
    return Figure(median(top) / median(bottom), min(pairs), max(pairs), details)


def plain(values: Sequence[float], scale: float, *details: str) -> Figure:
    """Return the median of samples as a figure, all times `scale`."""
    return Figure(median(values) * scale, min(values) * scale, max(values) * scale, details)


def _parts(warm: Samples, *names: str) -> str:
    return ", ".join(f"{name} {_ms(warm[f'stats_{name}_s'])}" for name in names)


def _ms(seconds: Sequence[float]) -> str:
    return written(median(seconds))


def _rate(nbytes: float, seconds: Sequence[float]) -> str:
    return f"{nbytes / median(seconds) / 1e9:.2f} GB/s"
