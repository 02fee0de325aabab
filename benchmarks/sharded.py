"""Compare sharded saves of many ranks with DCP's and with the limits of the machine, all in one run.

`benchmarks/README.md` says what is measured and what it does not show.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import machine
import sharded_report
from asyncckpt._bench.place import exit_on_signals
from harness import options, positive, temporary_directory, versions
from peers.ranks import PEERS, REPLICATED
from rank_processes import run_ranks
from report import write_json

if TYPE_CHECKING:
    import argparse

ONE = Path(__file__).resolve().with_name("sharded_one.py")
PARTS = ("saves", "steps", "memory", "loads", "ddp")
LIMIT = 600.0  # seconds for one part


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = options(__doc__, repeat=7)
    add = parser.add_argument
    add("--quick", action="store_true", help="a small state: does the measuring work?")
    add("--ranks", type=positive, help="default: 4, with --device cuda one for each GPU")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the state is; cuda: with NCCL")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="some of %(choices)s")
    peers = list(PEERS | REPLICATED)
    add("--only", nargs="+", choices=peers, default=peers, metavar="PEER", help="some of %(choices)s")
    found = parser.parse_args()
    if found.ranks is None:
        found.ranks = 4 if found.device == "cpu" else torch.cuda.device_count()
    if found.device == "cuda" and not 0 < found.ranks <= torch.cuda.device_count():
        parser.error(f"NCCL needs a GPU for each rank; there are {torch.cuda.device_count()}")
    return found


def measure(given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """Run all parts, each with ranks of its own; returns the samples of each rank, and what failed."""
    samples, errors = {}, {}
    for part in given.parts:
        keys = [key for key in (REPLICATED if part == "ddp" else PEERS) if key in given.only]
        jobs = {f"memory_{key}": [key] for key in keys} if part == "memory" else {part: keys}
        for name, chosen in jobs.items():
            began = time.perf_counter()
            try:
                samples[name] = _ranks(given, part, chosen)
            except (subprocess.SubprocessError, ValueError) as error:
                errors[name] = str(error)
            print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return samples, errors


def _ranks(given: argparse.Namespace, part: str, keys: list[str]) -> list[Any]:
    with temporary_directory(given.dir) as folder:
        more = ["--repeat", str(given.repeat), "--device", given.device]
        more += ["--quick"] if given.quick else []
        return run_ranks(given.ranks, str(ONE), str(folder), part, *keys, *more, limit=LIMIT)


def main() -> None:
    """Measure, print the tables, and write the JSON if that is asked for."""
    given = arguments()
    exit_on_signals()
    began = time.perf_counter()
    described = machine.describe(given.dir)
    samples, errors = measure(given)
    found = sharded_report.Found(samples)
    data: dict[str, Any] = {
        "machine": described | {"load_after": machine.load()},
        "gpu": torch.cuda.get_device_name() if given.device == "cuda" else None,
        "versions": versions(),
        "options": {
            "ranks": given.ranks,
            "repeat": given.repeat,
            "quick": given.quick,
            "device": given.device,
            "dir": str(given.dir),
        },
        "seconds": time.perf_counter() - began,
        "rows": sharded_report.judge(found),
        "errors": errors,
        "samples": samples,
    }
    if "saves" in samples:
        data["state"] = {
            "name": f"{'a small GPT' if given.quick else 'GPT 50 M'} + AdamW on {given.ranks} ranks",
            "bytes": int(found.total("saves", "bytes")),
            "tensors": int(found.each("saves", "tensors")[0]),
        }
    write_json(given.json, data)
    print(sharded_report.draw(data))


if __name__ == "__main__":
    main()
