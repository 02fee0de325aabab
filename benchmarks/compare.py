"""Compare asyncckpt with its peers: the same state, the same disk, one run, each with its failures.

`benchmarks/README.md` says what is measured and what it does not show.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import compare_data
import compare_plan
import compare_report
import machine
from asyncckpt._bench.place import exit_on_signals
from harness import options, run_apart, temporary_directory, versions
from peers import PEERS
from peers.fsync_notes import Notes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from compare_plan import Job

ONE = Path(__file__).resolve().with_name("compare_one.py")
LIMIT = 240.0  # seconds for one process; what takes longer is shown as failed


def measure(job: Job, directory: Path, *, quick: bool, limit: float = LIMIT) -> list[dict[str, Any]]:
    """Run a job in a process and a directory of its own; returns what it found, kind by kind.

    What takes longer than `limit` seconds is stopped, and has failed.
    """
    with temporary_directory(directory) as folder:
        # What Lightning stages in the system's temporary directory is then renamed, not copied.
        staging, files, noted = folder / "tmp", folder / "files", folder / "notes"
        for one in (staging, files, noted):
            one.mkdir()
        command = [str(ONE), str(files), str(noted), *job.kinds, "--state", job.state]
        command += ["--repeat", str(job.repeat), *(["--quick"] if quick else [])]
        command += [] if job.peer == "limits" else ["--peer", job.peer]
        command += ["--trace"] if job.trace else []
        environment = Notes(noted).environment | {"TMPDIR": str(staging), "PYTHONWARNINGS": "ignore"}
        try:
            results: list[dict[str, Any]] = run_apart(*command, limit=limit, **environment)
        except subprocess.TimeoutExpired:
            results = [{"error": f"took longer than {limit:.0f} s and was stopped"}] * len(job.kinds)
        except subprocess.CalledProcessError as error:
            results = [{"error": f"its process ended with status {error.returncode}"}] * len(job.kinds)
        except ValueError as error:
            results = [{"error": f"its process told no result: {error}"}] * len(job.kinds)
    about = {"state": job.state, "peer": job.peer, "turn": job.turn}
    return [{"kind": kind, **about, **found} for kind, found in zip(job.kinds, results, strict=True)]


def run(jobs: Iterable[Job], directory: Path, *, quick: bool) -> tuple[list[dict[str, Any]], bool]:
    """Run all jobs, and tell of each; returns what they found, and whether it was stopped before.

    One after another; or, where it only matters that the measuring works, as many as keep the machine busy.
    """
    todo = list(jobs)
    runs: list[dict[str, Any]] = []

    def measured(job: Job) -> list[dict[str, Any]]:
        began = time.perf_counter()
        found = measure(job, directory, quick=quick)
        errors = [f"{one['kind']}: {one['error']}" for one in found if "error" in one]
        what = f"{todo.index(job) + 1} of {len(todo)}: {job.peer}, {job.state}, {', '.join(job.kinds)}"
        print(f"{what}: {time.perf_counter() - began:.1f} s", *errors, file=sys.stderr, flush=True)
        return found

    with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as pool:
        try:
            for found in pool.map(measured, todo) if quick else map(measured, todo):
                runs += found
        except (KeyboardInterrupt, SystemExit):  # the latter for SIGTERM
            pool.shutdown(cancel_futures=True)
            return runs, True
    return runs, False


def about_peers(keys: Iterable[str]) -> dict[str, dict[str, str | bool]]:
    """Return name, package and version of each peer; a package that is not there has no version."""
    found: dict[str, dict[str, str | bool]] = {}
    for key in keys:
        peer = PEERS[key]
        try:
            number = version(peer.package)
        except PackageNotFoundError:
            number = "not installed"
        found[key] = {"name": peer.name, "package": peer.package, "version": number, "blocks": peer.blocks}
    return found


def arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = options(__doc__, repeat=2, to_json=False)
    add = parser.add_argument
    add("--quick", action="store_true", help="a small state, once: does the measuring work?")
    add("--only", nargs="+", choices=PEERS, metavar="PEER", help=f"some of {', '.join(PEERS)}")
    add("--state", nargs="+", metavar="STATE", help="some of gpt2, resnet, lora; or a file of torch.save")
    add(
        "--parts",
        nargs="+",
        choices=compare_plan.PARTS,
        metavar="PART",
        help="some of %(choices)s; --state leaves out the last two, which have states of their own",
    )
    add("--out", type=Path, help="where compare.json, compare.md and the pictures go; else only prints")
    found = parser.parse_args()
    for state in found.state or ():
        if state not in compare_plan.STATES and not Path(state).is_file():
            parser.error(f"{state} is neither a file nor one of {', '.join(compare_plan.STATES)}")
    if found.quick and (found.state or found.parts):
        parser.error("--quick measures one small state; --state and --parts do not go with it")
    if found.parts is None:
        found.parts = compare_plan.OF_STATES if found.state else compare_plan.PARTS
    return found


def main() -> None:
    """Measure, write the JSON, and draw table and pictures from it, also of a run that was stopped."""
    given = arguments()
    exit_on_signals()
    began = time.perf_counter()
    described = machine.describe(given.dir)
    peers = [key for key in PEERS if key in (given.only or PEERS)]
    chosen = [
        name if name in compare_plan.STATES else f"file:{Path(name).resolve()}"
        for name in given.state or compare_plan.STATES
    ]
    plan = compare_plan.full(peers, chosen, given.parts, given.repeat)
    runs, stopped = run(compare_plan.quick(peers) if given.quick else plan, given.dir, quick=given.quick)
    data = {
        "machine": described | {"load_after": machine.load()},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "versions": versions(),
        "options": {"repeat": given.repeat, "quick": given.quick, "dir": str(given.dir), "states": chosen},
        "peers": about_peers(peers),
        "stopped": stopped,
        "seconds": time.perf_counter() - began,
        "runs": runs,
    }
    text = compare_data.encoded(data)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "compare.json").write_text(text, encoding="utf-8")
        compare_report.write(given.out / "compare.json")
    print(compare_report.draw(compare_data.Found(json.loads(text))))


if __name__ == "__main__":
    main()
