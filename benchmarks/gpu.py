"""Run the tests that need a GPU, measure what asyncckpt is to reach there, and print which of it does.

It takes less than five minutes, and needs torch, numpy, anyio, aiofiles, fsspec and pytest, but no
installation:

    PYTHONPATH=$PWD python benchmarks/gpu.py --json gpu.json

Each part runs in a process of its own, with a limit of time: one that fails costs only its rows.
`benchmarks/README.md` says what each row means.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import gpu_rows
import machine
import rows
from asyncckpt._bench.place import exit_on_signals
from compare import about_peers, measure
from compare_data import Found
from compare_plan import Job
from compare_report import costs
from gpu_tests import run_tests
from harness import options, run_apart, temporary_directory, versions
from peers import PEERS
from report import heading, write_json

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

MEASURE = Path(__file__).resolve().with_name("measure.py")
LIMIT = 290  # seconds for everything


class Part(NamedTuple):
    """One process.

    Attributes:
        name: of a measurement in measure.py, the key of a peer, "limits", or "tests".
        repeat: how often.
        limit: seconds.
    """

    name: str
    repeat: int
    limit: float


MEASUREMENTS = (
    Part("lost", 4, 110),
    Part("short", 4, 60),
    Part("device_memory", 1, 50),
    Part("gpu_tensors", 9, 40),
    Part("loads", 2, 50),
    Part("warm_saves", 5, 50),
)
PEER_RUNS = (
    Part("ours", 3, 50),
    Part("ours_reserved", 3, 50),
    Part("limits", 1, 40),
    *(Part(key, 1, 50) for key in ("torch_save_fsync", "lightning_async", "dcp_cached", "dcp_process")),
)
TESTS = Part("tests", 1, 90)
PARTS = (TESTS, *MEASUREMENTS, *PEER_RUNS)


class Run:
    """What a run has found so far.

    Attributes:
        samples: of each measurement and of our own savers, by name.
        errors: why a part has none.
        seconds: that each part has taken.
        tests: what pytest says.
        peers: runs of the comparison, as compare.py has them.
        stopped: whether it was stopped before its end.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self._given, self._began = given, time.perf_counter()
        self._machine = machine.describe(given.dir)
        self.samples: dict[str, dict[str, list[Any]]] = {}
        self.errors: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.tests: dict[str, Any] = {}
        self.peers: list[dict[str, Any]] = []
        self.stopped = False

    def go(self) -> None:
        """Run all parts; what was found is written after each."""
        for part in PARTS:
            if part.name not in self._given.parts:
                continue
            began = time.perf_counter()
            left = self._given.limit - (began - self._began)
            try:
                self._run(part, min(part.limit, left))
            except (KeyboardInterrupt, SystemExit):  # the latter for SIGTERM
                self.stopped = True
                return
            self.seconds[part.name] = time.perf_counter() - began
            error = f": {self.errors[part.name]}" if part.name in self.errors else ""
            print(f"{part.name}: {self.seconds[part.name]:.1f} s{error}", file=sys.stderr, flush=True)
            write_json(self._given.json, self.data())

    def _run(self, part: Part, limit: float) -> None:
        if limit <= 0:
            self.errors[part.name] = f"left out: the {self._given.limit} s were over"
        elif part.name == "tests":
            self.tests = run_tests(limit)
            if "error" in self.tests:
                self.errors["tests"] = self.tests["error"]
        elif part in MEASUREMENTS:
            self._measure(part, limit)
        else:
            self._save_with(part, limit)

    def _measure(self, part: Part, limit: float) -> None:
        with temporary_directory(self._given.dir) as folder:
            command = [str(MEASURE), str(folder), part.name, "--device", self._given.device]
            command += ["--repeat", str(self._repeat(part)), *(["--quick"] if self._given.quick else [])]
            try:
                found = run_apart(*command, limit=limit)
            except subprocess.TimeoutExpired:
                self.errors[part.name] = f"took longer than {limit:.0f} s and was stopped"
            except (subprocess.CalledProcessError, ValueError) as error:
                self.errors[part.name] = f"its process ended without a result: {error}"
            else:
                self.samples |= found["samples"]
                self.errors |= found["errors"]

    def _save_with(self, part: Part, limit: float) -> None:
        if part.name in PEERS and find_spec(PEERS[part.name].module.partition(".")[0]) is None:
            self.errors[part.name] = f"{PEERS[part.name].package} is not installed"
            return
        kind = "bare" if part.name == "limits" else "saves"
        job = Job((kind,), "gpt2", part.name, 0, self._repeat(part))
        (found,) = measure(job, self._given.dir, quick=self._given.quick, limit=limit)
        self.peers.append(found)
        if "error" in found:
            self.errors[part.name] = found["error"]
        else:
            self.samples[part.name] = found["samples"]

    def _repeat(self, part: Part) -> int:
        return self._given.repeat or (1 if self._given.quick else part.repeat)

    def data(self) -> dict[str, Any]:
        """Return all that was found, for the JSON."""
        given = self._given
        return {
            "machine": self._machine | {"load_after": machine.load()},
            "gpu": torch.cuda.get_device_name() if given.device == "cuda" else None,
            "versions": versions("lightning"),
            "options": {"quick": given.quick, "device": given.device, "dir": str(given.dir)},
            "stopped": self.stopped,
            "seconds": time.perf_counter() - self._began,
            "rows": gpu_rows.rows(self.samples, self.errors),
            "tests": self.tests,
            "errors": self.errors,
            "seconds_of": self.seconds,
            "peers": about_peers(run["peer"] for run in self.peers if run["peer"] in PEERS),
            "runs": self.peers,
            "samples": {
                part.name: self.samples[part.name] for part in MEASUREMENTS if part.name in self.samples
            },
        }


def draw(data: dict[str, Any]) -> str:
    """Return what is shown of a run."""
    return "\n".join([*heading(data), "", *rows.table(data["rows"]), "", *_closing(data)])


def _closing(data: dict[str, Any]) -> Iterator[str]:
    measured = [row for row in data["rows"] if row["met"] is not None]
    met = sum(row["met"] for row in measured)
    yield f"{met} of {len(measured)} measured rows met, {len(data['rows']) - len(measured)} not measured."
    if tests := data["tests"]:
        yield f"Tests that need a GPU: {tests['summary']}."
        yield from (f"      {failure}" for failure in tests["failures"])
    if data["stopped"]:
        yield "Stopped before its end: what is missing was not measured."
    if data["options"]["quick"] or data["options"]["device"] == "cpu":
        yield "A small state or no GPU: it shows that the measuring works, not what is reached."
    if any(run["kind"] == "saves" for run in data["runs"]):
        yield from ["", costs(Found(data), "gpt2")]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    names = [part.name for part in PARTS]
    parser = options(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="small states, once: does the measuring work?")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="the latter shows that the measuring works")
    add("--limit", type=float, default=LIMIT, help="seconds for everything (default: %(default)s)")
    add(
        "--parts", nargs="+", choices=names, default=names, metavar="PART", help=f"some of {', '.join(names)}"
    )
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for the processes that look for a GPU by themselves
    elif not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --device cpu shows whether the measuring works")
    return given


def main() -> None:
    """Measure, write the JSON, and print the table; of a run that was stopped, too."""
    given = arguments()
    exit_on_signals()
    run = Run(given)
    run.go()
    data = run.data()
    write_json(given.json, data)
    print(draw(data))


if __name__ == "__main__":
    main()
