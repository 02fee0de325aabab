"""The benchmarks of Lightning run, and tell all they are meant to tell; what they find is not judged here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]

PROGRAMS = {
    "overhead": ["--size", "small", "--repeat", "1", "--saves", "1", "--only", "callback"],
    "scenarios": ["--only", "tied", "frozen"],
}

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="measures with what only Linux has"),
    pytest.mark.slow,
]


class Run(NamedTuple):
    """What a program has written, printed and left."""

    data: dict[str, Any]
    table: list[list[str]]
    left: list[Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """Run the programs, all at once: most of their time is that of importing Lightning."""
    disks = {name: tmp_path_factory.mktemp(name) for name in PROGRAMS}
    processes = {name: start(name, disk) for name, disk in disks.items()}
    try:
        yield {name: end(processes[name], disk) for name, disk in disks.items()}
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()


def start(name: str, disk: Path) -> subprocess.Popen[str]:
    program = str(ROOT / "benchmarks" / f"lightning_{name}.py")
    return subprocess.Popen(
        [sys.executable, program, "--dir", str(disk), "--json", str(result(disk)), *PROGRAMS[name]],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def end(process: subprocess.Popen[str], disk: Path) -> Run:
    output, _ = process.communicate()
    assert process.returncode == 0
    rows = [line for line in output.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return Run(json.loads(result(disk).read_text(encoding="utf-8")), table, list(disk.iterdir()))


def result(disk: Path) -> Path:
    return disk.with_name(f"{disk.name}.json")


def test_the_overhead_has_a_row_for_each_way_with_a_verdict(runs: dict[str, Run]) -> None:
    data, (head, _, *rows), left = runs["overhead"]
    (found,), (row,) = data["rows"], rows
    assert found["key"] == "callback"
    assert row[0] == found["what"]
    assert len(row) == len(head)
    assert found["met"] == (found["ratio"] <= found["target"])
    (ratio,) = (cell for name, cell in zip(head, row, strict=True) if "bare copy" in name)
    assert ("met" in ratio) == found["met"]
    assert ("MISSED" in ratio) != found["met"]
    assert left == []


def test_every_sample_of_the_overhead_is_a_finite_number(runs: dict[str, Run]) -> None:
    data = runs["overhead"].data
    samples = data["samples"]["callback"]
    for name in ("stall_s", "dump_s", "copy_s", "complete_s", "durable_s", "file_bytes"):
        assert len(samples[name]) == 1, "one warm save"
        assert samples[name][0] > 0
    assert len(samples["first_stall_s"]) == 1
    assert samples["state_bytes"] == [data["state"]["bytes"]]
    assert all(math.isfinite(value) for values in samples.values() for value in values)
    assert data["machine"].keys() >= {"cpu", "cores", "file_system", "load_before", "load_after"}
    assert data["versions"].keys() >= {"asyncckpt", "lightning", "python", "torch"}


def test_the_scenarios_have_a_cell_for_each_side(runs: dict[str, Run]) -> None:
    data, (head, _, *rows), left = runs["scenarios"]
    assert list(data) == ["stock", "asyncckpt"]
    assert head == ["scenario", "Lightning's AsyncCheckpointIO", "asyncckpt"]
    assert len(rows) == 2
    assert {what: [stock, ours] for what, stock, ours in rows} == {
        what: [data["stock"][what], data["asyncckpt"][what]] for what in data["stock"]
    }
    assert all(all(row) for row in rows)
    assert left == []
