"""Measure the figures that asyncckpt is to reach, and print which of them it does, all from one run.

`benchmarks/README.md` says what each row means.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import machine
import rows
from harness import options, temporary_directory
from report import write_json

MEASURE = Path(__file__).resolve().with_name("measure.py")


class Measurement(NamedTuple):
    """Measurements of `measure.py` that are made by turns.

    Attributes:
        names: in measure.py.
        repeat: how often.
        apart: each repetition in a process of its own.
    """

    names: tuple[str, ...]
    repeat: int
    apart: bool = False


PLAN = (
    Measurement(("warm_saves",), 7),
    Measurement(("first_reserved", "first_unreserved"), 5, apart=True),
    Measurement(("steps",), 7),
    Measurement(("memory",), 3, apart=True),
    Measurement(("many_tensors",), 15),
    Measurement(("small",), 50),
    Measurement(("loads",), 5),
    Measurement(("overlapped",), 7),
)
# To start a process that has torch takes longer than to measure a small state: as few as make sense.
QUICK_PLAN = (
    ("memory",),
    ("first_unreserved",),
    ("first_reserved", "warm_saves", "steps", "many_tensors", "small", "loads", "overlapped"),
)
QUICK_REPEAT = 2


class Run:
    """One run of all measurements.

    Attributes:
        samples: of each measurement, by its name.
        versions: of what took part.
    """

    def __init__(self, directory: Path, repeat: int | None, *, quick: bool) -> None:
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.versions: dict[str, str] = {}
        self._directory = directory
        if quick:
            for names in QUICK_PLAN:
                self._measure(names, repeat or QUICK_REPEAT, "--quick")
            return
        for one in PLAN:
            count = repeat or one.repeat
            for _ in range(count if one.apart else 1):
                for name in one.names:
                    self._measure((name,), 1 if one.apart else count)

    def _measure(self, names: tuple[str, ...], repeat: int, *flags: str) -> None:
        """Run measurements in a process and a directory of their own."""
        began = time.perf_counter()
        with temporary_directory(self._directory) as folder:
            command = [sys.executable, str(MEASURE), str(folder), *names, "--repeat", str(repeat), *flags]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(f"{', '.join(names)}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
        found = json.loads(done.stdout)
        if found["errors"]:
            raise SystemExit("; ".join(f"{name}: {error}" for name, error in found["errors"].items()))
        self.versions = found["versions"]
        for name, samples in found["samples"].items():
            for key, values in samples.items():
                self.samples.setdefault(name, {}).setdefault(key, []).extend(values)


def main() -> None:
    """Measure, print the table, and write the JSON if that is asked for."""
    parser = options("Measure what asyncckpt is to reach, and say what is met.")
    parser.add_argument("--quick", action="store_true", help="a small state, a minute at most")
    arguments = parser.parse_args()
    began = time.perf_counter()
    described = machine.describe(arguments.dir)
    run = Run(arguments.dir, arguments.repeat, quick=arguments.quick)
    warm = run.samples["warm_saves"]
    data = {
        "machine": described | {"load_after": machine.load()},
        "versions": run.versions,
        "options": {"repeat": arguments.repeat, "quick": arguments.quick, "dir": str(arguments.dir)},
        "state": {
            "name": "a small GPT-2 + Adam" if arguments.quick else "GPT-2 124 M + Adam",
            "bytes": int(warm["state_bytes"][0]),
            "tensors": int(warm["tensors"][0]),
        },
        "seconds": time.perf_counter() - began,
        "rows": rows.rows(run.samples),
        "medians": {name: rows.summary(found) for name, found in run.samples.items()},
        "samples": run.samples,
    }
    write_json(arguments.json, data)
    print(rows.draw(data))


if __name__ == "__main__":
    main()
