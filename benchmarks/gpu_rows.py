"""What is to be reached on a GPU, and what the samples of a run show of each."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from report import seconds as written
from report import size
from rows import MIB, Figure, Target, durable_figures, load_figures, plain, ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Samples = Mapping[str, Sequence[Any]]

NOISE = 1e-4  # seconds: who loses less is taken to lose as much, so that a ratio has a meaning

WAYS = {
    "overlapped": "overlapped",
    "roomy": "overlapped, device_memory of 1 GiB",
    "blocking": "blocking",
    "bare": "bare blocking copy",
    "handmade": "copy beside, only the optimizer waits",
    "cloned": "clone on the device, copied behind",
}


class Judged(NamedTuple):
    """A target and where its figure comes from.

    Attributes:
        target: what is to be reached.
        parts: measurements that it needs.
        figure: takes the samples of each of those.
    """

    target: Target
    parts: tuple[str, ...]
    figure: Callable[..., Figure]


def rows(samples: Mapping[str, Samples], errors: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a row for each target, those included that could not be measured.

    Args:
        samples: of each measurement, by its name.
        errors: why others have none.
    """
    return [_row(judged, samples, errors) for judged in JUDGED]


def _row(judged: Judged, samples: Mapping[str, Samples], errors: Mapping[str, str]) -> dict[str, Any]:
    missing = [part for part in judged.parts if part not in samples]
    if missing:
        why = tuple(f"{part}: {errors.get(part, 'left out')}" for part in missing)
        return {**vars(judged.target), "value": None, "low": None, "high": None, "details": why, "met": None}
    figure = judged.figure(*(samples[part] for part in judged.parts))
    return {**vars(judged.target), **figure._asdict(), "met": judged.target.met_by(figure.value)}


def _call(lost: Samples) -> Figure:
    stats = ", ".join(f"{part} {_ms(lost[f'overlapped_stats_{part}_s'])}" for part in ("freeze", "copy"))
    return plain(
        lost["overlapped_call_s"],
        1e3,
        f"{size(lost['state_bytes'][0])} in {lost['tensors'][0]:.0f} tensors; Save.stats: {stats}",
        f"blocking {_ms(lost['blocking_call_s'])}, bare blocking copy {_ms(lost['bare_call_s'])}",
    )


def _lost(lost: Samples) -> Figure:
    return plain(lost["overlapped_lost_s"], 1e3, *_ways(lost), *_overlap(lost, "overlapped"))


def _ways(lost: Samples) -> tuple[str, ...]:
    steps = f"steps of {_ms(lost['step_s'])}, {lost['batch'][0]:.0f} sequences each"
    return steps, *(f"{name}: {_ms(lost[f'{way}_lost_s'])}" for way, name in WAYS.items())


def _overlap(lost: Samples, way: str) -> tuple[str, str]:
    overlapped = lost[f"{way}_stats_overlapped"]
    reasons = sorted({reason for reason in lost[f"{way}_stats_reason"] if reason})
    times = ", ".join(
        f"{part.replace('_', ' ')} {_ms(lost[f'{way}_stats_{part}_s'])}"
        for part in ("deferred", "fence", "device_fence")
    )
    nbytes = ", ".join(
        f"{part} {size(median(lost[f'{way}_stats_{part}_bytes']))}" for part in ("deferred", "spilled")
    )
    count = f"overlapped {sum(overlapped)} of {len(overlapped)} saves"
    return "; ".join([count, *reasons]), f"Save.stats: {times}; {nbytes}"


def _ratio(way: str, other: str) -> Callable[[Samples], Figure]:
    """Return what compares the time lost in two ways."""

    def figure(lost: Samples) -> Figure:
        ours, others = (lost[f"{one}_lost_s"] for one in (way, other))
        return ratio(
            ours,
            [max(seconds, NOISE) for seconds in others],
            f"{_ms(ours)}; {WAYS[other]} {_ms(others)}",
        )

    return figure


def _short(lost: Samples) -> Figure:
    figure = _ratio("roomy", "bare")(lost)
    return figure._replace(details=(*_ways(lost), *_overlap(lost, "roomy")))


def _tensors(tensors: Samples) -> Figure:
    count = tensors["tensors"][0]
    return plain(
        tensors["values_s"],
        1e6 / count,
        f"save() of {count:,.0f} tensors {_ms(tensors['values_s'])}, numbers changed too "
        f"{_ms(tensors['numbers_s'])}",
    )


def _freeze(lost: Samples) -> Figure:
    stalls, waits, copies = (lost[f"blocking_stats_{part}_s"] for part in ("stall", "wait", "copy"))
    rest = [stall - wait - copy for stall, wait, copy in zip(stalls, waits, copies, strict=True)]
    frozen = _ms(lost["blocking_stats_freeze_s"])
    details = (
        f"the stall of a blocking save less wait and copy: {_ms(rest)}, Save.stats.freeze of it {frozen}"
    )
    return plain(rest, 1e6 / lost["tensors"][0], details)


def _first(lost: Samples) -> Figure:
    (first,), warm = lost["first_call_s"], lost["overlapped_call_s"]
    return Figure(
        first / median(warm),
        first / max(warm),
        first / min(warm),
        (
            f"the call: {_ms([first])}, warm {_ms(warm)}",
            f"time lost: {_ms(lost['first_lost_s'])}, warm {_ms(lost['overlapped_lost_s'])}",
        ),
    )


def _reserved(ours: Samples, reserved: Samples) -> Figure:
    one, other = reserved["lost_s"], ours["lost_s"]
    return Figure(
        median(one) / median(other),
        min(one) / max(other),
        max(one) / min(other),
        (
            f"lost per blocking save: after reserve {_ms(one)}, without {_ms(other)}",
            f"stall: after reserve {_ms(reserved['stall_s'])}, without {_ms(ours['stall_s'])}",
            f"first stall: {_ms(reserved['first_stall_s'])}, {_ms(ours['first_stall_s'])}",
        ),
    )


def _memory(memory: Samples) -> Figure:
    beyond = memory["update_beyond_bytes"] + memory["step_beyond_bytes"]  # type: ignore[operator] # lists
    spilled = ", ".join(
        f"{size(budget)}: {size(nbytes)}"
        for budget, nbytes in zip(memory["budget_bytes"][::2], memory["update_spilled_bytes"], strict=True)
    )
    worst = max(beyond) / MIB
    return Figure(worst, min(beyond) / MIB, worst, (f"the greatest; spilled, by budget: {spilled}",))


def _interference(ours: Samples) -> Figure:
    beyond = [lost - stall for lost, stall in zip(ours["lost_s"], ours["stall_s"], strict=True)]
    return plain(
        beyond,
        1e3,
        f"steps of {_ms(ours['alone_step_s'])}, beside a save {_ms(ours['step_s'])}; "
        f"lost {_ms(ours['lost_s'])}, stall {_ms(ours['stall_s'])}",
    )


def _ms(values: Sequence[float]) -> str:
    return written(median(values))


JUDGED = (
    Judged(Target("call", "save(overlap=True): the call", "<=", 5.0, "ms"), ("lost",), _call),
    Judged(
        Target("lost", "lost per overlapped save, one in 8 long steps", "<=", 10.0, "ms"), ("lost",), _lost
    ),
    Judged(
        Target("lost_bare", "the same / bare blocking copy", "<=", 0.15, "x"),
        ("lost",),
        _ratio("overlapped", "bare"),
    ),
    Judged(
        Target("lost_handmade", "the same / hand-made overlap", "<=", 1, "x"),
        ("lost",),
        _ratio("overlapped", "handmade"),
    ),
    Judged(
        Target("short_bare", "steps shorter than the copy / bare copy", "<=", 0.5, "x"),
        ("short",),
        _short,
    ),
    Judged(
        Target("short_blocking", "the same / a blocking save", "<=", 1.0, "x"),
        ("short",),
        _ratio("roomy", "blocking"),
    ),
    Judged(
        Target("tensors", "20,000 tensors of 1 KiB, blocking", "<=", 4.0, "µs each"),
        ("gpu_tensors",),
        _tensors,
    ),
    Judged(Target("freeze", "freeze of model and optimizer", "<=", 3.0, "µs/tensor"), ("lost",), _freeze),
    Judged(Target("first", "first save, overlapped, no reserve / warm", "<=", 2.0, "x"), ("lost",), _first),
    Judged(
        Target("reserved", "later saves after reserve / without", "<=", 1.1, "x"),
        ("ours", "ours_reserved"),
        _reserved,
    ),
    Judged(
        Target("memory", "device memory beyond the budget", "<=", 0.0, "MiB"), ("device_memory",), _memory
    ),
    Judged(
        Target("load", "load() to the device: bytes/s / bare reads", ">=", 0.8, "x"),
        ("loads",),
        lambda samples: load_figures(samples)["load_rate"],
    ),
    Judged(
        Target("restore", "restore(): bytes/s / bare reads", ">=", 0.8, "x"),
        ("loads",),
        lambda samples: load_figures(samples)["restore_rate"],
    ),
    Judged(
        Target("durable", "bytes/s until durable / bare writes + fsync", ">=", 0.9, "x"),
        ("warm_saves",),
        lambda samples: durable_figures(samples)["durable_rate"],
    ),
    Judged(
        Target("interference", "lost beyond the stall, steps of about 1 ms", "<=", 20.0, "ms"),
        ("ours",),
        _interference,
    ),
)
