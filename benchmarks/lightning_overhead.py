"""Measure what a save costs a Lightning Trainer: stock, stock in the background, and with asyncckpt.

`benchmarks/README.md` says what the columns mean.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import machine
from asyncckpt._bench.place import exit_on_signals
from harness import options, order, positive, run_apart, temporary_directory, versions
from report import heading, markdown, seconds, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from harness import Samples

ONE = Path(__file__).resolve().with_name("lightning_overhead_one.py")
LIMIT = 1.3  # of the bare copy, for what asyncckpt adds to the dump


class Way(NamedTuple):
    """One way to save from a Trainer.

    Attributes:
        what: names it in the table.
        target: the most that the stall without the dump may be, in bare copies.
    """

    what: str
    target: float | None = None


WAYS = {
    "stock": Way("ModelCheckpoint"),
    "stock_async": Way("ModelCheckpoint + AsyncCheckpointIO"),
    "callback": Way("asyncckpt ModelCheckpoint", LIMIT),
    "plugin": Way("ModelCheckpoint + asyncckpt AsyncCheckpointIO", LIMIT),
}


def measure_apart(key: str, directory: Path, saves: int, size: str) -> Samples:
    """Measure one way in a process and a directory of its own."""
    began = time.perf_counter()
    with temporary_directory(directory) as folder:
        # What stock Lightning stages there is then renamed, not copied.
        staging, files = folder / "tmp", folder / "checkpoints"
        staging.mkdir()
        files.mkdir()
        arguments = [str(files), key, "--saves", str(saves), *(["--small"] if size == "small" else [])]
        samples: Samples = run_apart(str(ONE), *arguments, TMPDIR=str(staging))
    print(f"{WAYS[key].what}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return samples


def row(key: str, samples: Samples) -> dict[str, Any]:
    """Return what the samples of one way show."""
    way = WAYS[key]
    own = [stall - dump for stall, dump in zip(samples["stall_s"], samples["dump_s"], strict=True)]
    pairs = [a / b for a, b in zip(own, samples["copy_s"], strict=True)]
    ratio = median(own) / median(samples["copy_s"])
    medians = {name: median(values) for name, values in samples.items()}
    return medians | {
        "key": key,
        "what": way.what,
        "own_s": median(own),
        "ratio": ratio,
        "ratio_low": min(pairs),
        "ratio_high": max(pairs),
        "ratio_one_thread": median(own) / median(samples["copy_by_one_thread_s"]),
        "target": way.target,
        "met": None if way.target is None else ratio <= way.target,
        "synced": min(samples["synced"]) == 1,
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "way to save": lambda r: r["what"],
    "stall, first": lambda r: seconds(r["first_stall_s"]),
    "stall, warm": lambda r: seconds(r["stall_s"]),
    "of that, dump": lambda r: seconds(r["dump_s"]),
    "stall less dump": lambda r: seconds(r["own_s"]),
    "÷ bare copy (least … greatest)": lambda r: (
        f"{r['ratio']:.2f} ({r['ratio_low']:.2f} … {r['ratio_high']:.2f}){verdict(r)}"
    ),
    "÷ copy by one thread": lambda r: f"{r['ratio_one_thread']:.2f}",
    "file complete after": lambda r: seconds(r["complete_s"]),
    "synced by then": lambda r: "yes" if r["synced"] else "no",
    "durable after": lambda r: seconds(r["durable_s"]),
    "peak memory over the live state": lambda r: f"{r['peak_bytes'] / 1e9:.2f} GB",
    "file": lambda r: f"{r['file_bytes'] / 1e9:.2f} GB",
}


def draw(data: Mapping[str, Any]) -> str:
    """Return what is shown of a run, in Markdown, whose data are those that go into the JSON."""
    state, how = data["state"], data["options"]
    copies = (
        f"{span(data, 'copy_s')} by {state['threads']} threads, {span(data, 'copy_by_one_thread_s')} by one"
    )
    rows = [[cell(row) for cell in COLUMNS.values()] for row in data["rows"]]
    lines = [
        *heading(data),
        "",
        *markdown(list(COLUMNS), rows),
        "",
        f"Bare copy into warm buffers: {copies}.",
        f"Medians of {how['repeat']} processes for each way, with {how['saves']} warm saves each.",
    ]
    if how["size"] == "small":
        lines.append("A small state: it shows that the measuring works, not what is reached.")
    return "\n".join(lines)


def span(data: Mapping[str, Any], name: str) -> str:
    """Return the median of what was measured in all processes, with the least and the greatest."""
    values = [value for samples in data["samples"].values() for value in samples[name]]
    return f"{seconds(median(values))} ({seconds(min(values))} … {seconds(max(values))})"


def verdict(found: Mapping[str, Any]) -> str:
    """Return whether the target is met, where there is one."""
    if found["target"] is None:
        return ""
    return f" {'met' if found['met'] else 'MISSED'}: ≤ {found['target']:g}"


def compare(ways: Sequence[str], directory: Path, repeat: int, saves: int, size: str) -> dict[str, Any]:
    """Measure some ways by turns, each repetition in another order."""
    began = time.perf_counter()
    described = machine.describe(directory)
    samples: dict[str, dict[str, list[float]]] = {key: {} for key in ways}
    for turn in range(repeat):
        for key in order(ways, turn):
            for name, values in measure_apart(key, directory, saves, size).items():
                samples[key].setdefault(name, []).extend(values)
    some = samples[ways[0]]
    return {
        "machine": described | {"load_after": machine.load()},
        "versions": versions("lightning"),
        "options": {"repeat": repeat, "saves": saves, "size": size, "dir": str(directory)},
        "state": {
            "name": "a small GPT-2 + Adam" if size == "small" else "GPT-2 124 M + Adam",
            "bytes": int(some["state_bytes"][0]),
            "tensors": int(some["tensors"][0]),
            "threads": int(some["threads"][0]),
        },
        "seconds": time.perf_counter() - began,
        "rows": [row(key, found) for key, found in samples.items()],
        "samples": samples,
    }


def main() -> None:
    """Measure, print the table, and write the JSON if that is asked for."""
    parser = options(__doc__, repeat=3)
    parser.add_argument("--saves", type=positive, default=4, help="warm saves in each (default: %(default)s)")
    parser.add_argument(
        "--size", choices=["gpt2", "small"], default="gpt2", help="of the state (default: %(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=WAYS, metavar="WAY", help=f"some ways to save: {', '.join(WAYS)}"
    )
    arguments = parser.parse_args()
    exit_on_signals()
    ways = [key for key in WAYS if key in (arguments.only or WAYS)]
    data = compare(ways, arguments.dir, arguments.repeat, arguments.saves, arguments.size)
    write_json(arguments.json, data)
    print(draw(data))


if __name__ == "__main__":
    main()
