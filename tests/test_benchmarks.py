"""The benchmarks run, and tell all they are meant to tell; what they measure is not for a test to judge."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

FIGURES = {
    "warm_stall",
    "first_stall_reserved",
    "first_stall_unreserved",
    "durable_rate",
    "step_time",
    "longest_pause",
    "background_cpu",
    "memory",
    "tensors_values",
    "tensors_numbers",
    "small_state",
    "overlap_call",
    "overlap_lost",
    "load_rate",
    "load_speedup",
    "restore_rate",
    "restore_speedup",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    directory = tmp_path_factory.mktemp("disk")
    result = directory.parent / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "targets.py"), "--quick", "--repeat", "1"]
    command += ["--dir", str(directory), "--json", str(result)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        check=True,
    )
    return json.loads(result.read_text(encoding="utf-8")), done.stdout, directory


pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="measures with what only Linux has"),
    pytest.mark.slow,
]


def test_every_target_has_finite_figures_and_a_verdict(run: tuple[dict[str, Any], str, Path]) -> None:
    data, _, _ = run
    rows = {row["key"]: row for row in data["rows"]}
    assert rows.keys() == FIGURES
    for row in rows.values():
        assert all(math.isfinite(row[figure]) for figure in ("limit", "value", "low", "high"))
        below = row["value"] <= row["limit"]
        assert row["met"] == (below if row["relation"] == "<=" else not below or row["value"] == row["limit"])


def test_times_and_sizes_are_positive(run: tuple[dict[str, Any], str, Path]) -> None:
    data, _, _ = run
    for measurement in data["samples"].values():
        for name, values in measurement.items():
            assert values
            assert all(math.isfinite(value) for value in values)
            if name.endswith("_bytes") or name in {"stall_s", "copy_s", "durable_s", "load_s", "restore_s"}:
                assert min(values) > 0, name


def test_the_result_says_what_it_was_measured_on(run: tuple[dict[str, Any], str, Path]) -> None:
    data, _, _ = run
    assert data["machine"].keys() >= {"cpu", "cores", "kernel", "file_system", "load_before", "load_after"}
    assert data["versions"].keys() >= {"asyncckpt", "python", "torch"}
    assert data["options"]["quick"] is True
    assert data["state"]["bytes"] == data["samples"]["warm_saves"]["state_bytes"][0]


def test_the_table_has_every_row(run: tuple[dict[str, Any], str, Path]) -> None:
    data, table, _ = run
    lines = table.splitlines()
    for row in data["rows"]:
        (line,) = (line for line in lines if line.startswith(row["what"]))
        assert line.endswith("  met") == row["met"]
        assert ("MISSED" in line) != row["met"]


def test_nothing_is_left_behind(run: tuple[dict[str, Any], str, Path]) -> None:
    _, _, directory = run
    assert list(directory.iterdir()) == []
