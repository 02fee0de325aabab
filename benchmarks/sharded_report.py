"""What a run of `sharded.py` shows: the targets, and the tables beside DCP."""

from __future__ import annotations

import math
from itertools import chain
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import rows
from peers.ranks import PEERS, REPLICATED
from report import heading, markdown, seconds, size
from rows import Figure, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from peers.base import Peer

STATS = ("wait", "agreement", "freeze", "copy", "checksum", "write", "sync", "commit", "durable")
OWN, ALONE, DIVIDED = "ours", "ours_alone", "ours_divided"
LOADS = {
    "bare": "*limit: each rank reads its file by direct reads into warm memory*",
    "ours": "**asyncckpt restore**",
    "dcp": "DCP load, of a checkpoint of its own",
    "dcp_of_ours": "DCP load, of one of asyncckpt",
}


class Found:
    """The samples of all ranks.

    Args:
        samples: of each part, for each rank, by name.
    """

    def __init__(self, samples: Mapping[str, Sequence[Mapping[str, list[Any]]]]) -> None:
        self._samples = samples

    def by_turn(self, part: str, name: str) -> list[tuple[float, ...]]:
        """Return for each turn what the ranks measured; empty if they did not."""
        return list(zip(*(rank.get(name, ()) for rank in self._samples.get(part, ())), strict=True))

    def each(self, part: str, name: str) -> list[float]:
        """Return what all ranks measured in all turns."""
        return list(chain.from_iterable(self.by_turn(part, name)))

    def slowest(self, part: str, name: str) -> list[float]:
        """Return the greatest of the ranks for each turn."""
        return [max(values) for values in self.by_turn(part, name)]

    def least(self, part: str, name: str) -> list[float]:
        """Return the least of the ranks for each turn."""
        return [min(values) for values in self.by_turn(part, name)]

    def together(self, part: str, key: str) -> list[float]:
        """Return for each turn the time from the first call on a rank until all ranks were done."""
        pairs = zip(self.least(part, f"{key}_began"), self.slowest(part, f"{key}_ended"), strict=True)
        return [ended - began for began, ended in pairs]

    def of_rank_0(self, part: str, name: str) -> list[float]:
        """Return what rank 0 measured in all turns."""
        ranks = self._samples.get(part)
        return ranks[0].get(name, []) if ranks else []

    def total(self, part: str, name: str) -> float:
        """Return the first sample of all ranks together."""
        return sum(self.by_turn(part, name)[0])


class Judged(NamedTuple):
    """A target, and how its figure is found; IndexError or StatisticsError if it was not measured."""

    target: Target
    figure: Callable[[Found], Figure]


def _stall(found: Found) -> Figure:
    stalls, copies = found.each("saves", f"{OWN}_stall_s"), found.each("saves", "copy_s")
    slowest = _ms(found.slowest("saves", f"{OWN}_stall_s")), _ms(found.slowest("saves", "copy_s"))
    return rows.ratio(
        stalls,
        copies,
        f"save() {_ms(stalls)}, bare copy {_ms(copies)}; of the slowest rank {' and '.join(slowest)}",
        "Save.stats: " + _stats(found, "saves", OWN),
    )


def _agreement(found: Found) -> Figure:
    name = f"{OWN}_stats_agreement_s"
    last, first = _ms(found.least("saves", name)), _ms(found.slowest("saves", name))
    waits = f"the last rank to come waits {last}, the first one {first}"
    return rows.plain(found.each("saves", name), 1e3, waits)


def _durable(found: Found) -> Figure:
    nbytes = found.total("saves", "bytes")
    ours, bare = found.together("saves", OWN), found.slowest("saves", "write_s")
    how = "O_DIRECT writes" if all(found.each("saves", "direct")) else "buffered writes (no O_DIRECT here)"
    details = f"from the first call of save() {_rate(nbytes, ours)}, bare {how} + fsync {_rate(nbytes, bare)}"
    return rows.ratio(bare, ours, details)


def _divided(found: Found) -> Figure:
    divided, alone = (found.slowest("ddp", f"{key}_stall_s") for key in (DIVIDED, ALONE))
    part, whole = (found.slowest("ddp", f"copy_{what}_s") for what in ("part", "whole"))
    copies = f"bare copies: a part on each rank {_ms(part)}, all on rank 0 {_ms(whole)}: here the limit is"
    return rows.ratio(
        divided,
        alone,
        f"sharded=True {_ms(divided)}, rank 0 alone {_ms(alone)}",
        f"{copies} {median(part) / median(whole):.2f}",
        "Save.stats: " + _stats(found, "ddp", DIVIDED),
    )


JUDGED = (
    Judged(Target("sharded_stall", "FSDP2: stall of a warm save() / bare copy", "<=", 1.25, "x"), _stall),
    Judged(Target("sharded_agreement", "FSDP2: coordination in it", "<=", 1.0, "ms"), _agreement),
    Judged(
        Target("sharded_durable", "FSDP2: bytes/s until durable / bare writers", ">=", 0.8, "x"), _durable
    ),
    Judged(Target("ddp_stall", "DDP, sharded=True: stall / rank 0 saving alone", "<=", 0.35, "x"), _divided),
)


def judge(found: Found) -> list[dict[str, Any]]:
    """Return a row for each target; `met` is None if it was not measured."""
    judged = []
    for target, figure in JUDGED:
        try:
            measured = figure(found)
        except (IndexError, ValueError):  # statistics.StatisticsError is one
            nothing = Figure(math.nan, math.nan, math.nan, ())
            judged.append({**vars(target), **nothing._asdict(), "met": None})
        else:
            judged.append({**vars(target), **measured._asdict(), "met": target.met_by(measured.value)})
    return judged


def draw(data: Mapping[str, Any]) -> str:
    """Return all that is shown of a run, whose data are those that go into the JSON."""
    found = Found(data["samples"])
    lines = [*heading(data), "", *rows.table(data["rows"]), ""]
    tables = {"saves": _saves, "steps": _steps, "memory": _memory, "loads": _loads, "ddp": _ddp}
    for part, table in tables.items():
        if any(name.startswith(part) for name in data["samples"]):
            lines += [*table(found), ""]
    lines += [f"{part} failed: {error}" for part, error in data["errors"].items()]
    lines.append(
        "Medians of all ranks and saves, unless a rank is named; of warm saves, unless it says first."
    )
    if data["options"]["quick"]:
        lines.append(
            "A quick run with a small state: it shows that the measuring works, not what is reached."
        )
    return "\n".join(lines)


def _saves(found: Found) -> Iterator[str]:
    copy, write = found.each("saves", "copy_s"), found.slowest("saves", "write_s")
    columns = (
        "FSDP2",
        "stall, first",
        "stall, warm / slowest rank",
        "÷ copy",
        "durable after",
        "÷ direct writes",
    )
    slowest = _ms(found.slowest("saves", "copy_s"))
    lines = [
        ["*limit: copy of the rank's bytes*", "", f"{_ms(copy)} / {slowest}", "1", "", ""],
        ["*limit: direct writes of all ranks*", *[""] * 3, _ms(write), "1"],
    ]
    for key, peer in PEERS.items():
        if stalls := found.each("saves", f"{key}_stall_s"):
            first, slowest = (_ms(found.slowest("saves", f"{key}_{what}_s")) for what in ("first", "stall"))
            together = found.together("saves", key)
            over = f"{median(stalls) / median(copy):.1f}", f"{median(together) / median(write):.1f}"
            lines.append(
                [_name(key, peer), first, f"{_ms(stalls)} / {slowest}", over[0], _ms(together), over[1]]
            )
    yield from markdown(columns, lines)


def _steps(found: Found) -> Iterator[str]:
    names = {"bare": "*limit: direct writes of all ranks*"}
    names |= {key: _name(key, peer) for key, peer in PEERS.items()}
    lines = []
    for key, name in names.items():
        if lost := found.each("steps", f"{key}_lost_s"):
            step, alone = (median(found.each("steps", f"{key}_{what}_s")) for what in ("step", "alone"))
            longest = _ms(found.slowest("steps", f"{key}_longest_s"))
            lines.append([name, _ms(lost), f"{step / alone:.2f}", longest])
    columns = ("FSDP2, beside training steps", "lost per save", "step while writing ÷ alone", "longest step")
    yield from markdown(columns, lines)


def _memory(found: Found) -> Iterator[str]:
    lines = []
    for key, peer in PEERS.items():
        if peaks := found.of_rank_0(f"memory_{key}", "peak_bytes"):
            share = median(peaks) / found.total(f"memory_{key}", "bytes")
            lines.append([_name(key, peer), size(median(peaks)), f"{share:.2f}"])
    yield from markdown(("FSDP2", "peak memory of all ranks over the live state", "÷ state"), lines)


def _loads(found: Found) -> Iterator[str]:
    nbytes = found.total("loads", "bytes")
    ours = found.slowest("loads", "ours_s")
    lines = []
    for key, name in LOADS.items():
        times = found.slowest("loads", f"{key}_s")
        lines.append([name, _ms(times), _rate(nbytes, times), f"{median(times) / median(ours):.1f}"])
    yield from markdown(("restore on as many ranks", "slowest rank", "bytes/s", "÷ asyncckpt"), lines)


def _ddp(found: Found) -> Iterator[str]:
    lines = []
    for what, name in (("whole", "all on rank 0"), ("part", "a part on each rank")):
        lines.append([f"*limit: copy of {name}*", "", _ms(found.slowest("ddp", f"copy_{what}_s")), ""])
    for key, peer in REPLICATED.items():
        if stalls := found.slowest("ddp", f"{key}_stall_s"):
            first = _ms(found.slowest("ddp", f"{key}_first_s"))
            lines.append([_name(key, peer), first, _ms(stalls), _ms(found.together("ddp", key))])
    columns = (
        "DDP, the same state on each rank",
        "stall, first",
        "stall of the slowest rank",
        "durable after",
    )
    yield from markdown(columns, lines)


def _name(key: str, peer: type[Peer]) -> str:
    return f"**{peer.name}**" if key.startswith(OWN) else peer.name


def _stats(found: Found, part: str, key: str) -> str:
    return ", ".join(f"{name} {_ms(found.each(part, f'{key}_stats_{name}_s'))}" for name in STATS)


def _ms(values: Sequence[float]) -> str:
    return seconds(median(values))


def _rate(nbytes: float, values: Sequence[float]) -> str:
    return f"{nbytes / median(values) / 1e9:.2f} GB/s"
