"""The benchmark of the GPU path runs on the CPU, judges what it measures, and tells what it could not."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support import run_python

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
FIGURES = {
    "call",
    "lost",
    "lost_bare",
    "lost_handmade",
    "short_bare",
    "short_blocking",
    "tensors",
    "freeze",
    "first",
    "reserved",
    "memory",
    "load",
    "restore",
    "durable",
    "interference",
}
# The peers that take long to start have tests of their own.
PARTS = (
    "tests",
    "lost",
    "short",
    "device_memory",
    "gpu_tensors",
    "loads",
    "warm_saves",
    "ours",
    "ours_reserved",
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures with what only Linux has")


def run(directory: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    result = directory.parent / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--quick"]
    command += ["--dir", str(directory), "--json", str(result), *arguments]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        check=True,
    )
    return json.loads(result.read_text(encoding="utf-8")), done.stdout


@pytest.fixture
def modules() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    directory = tmp_path_factory.mktemp("disk")
    return *run(directory, "--parts", *PARTS), directory


@pytest.mark.slow
def test_every_row_has_finite_figures_and_a_verdict_but_that_of_device_memory(
    measured: tuple[dict[str, Any], str, Path],
) -> None:
    data, _, _ = measured
    rows = {row["key"]: row for row in data["rows"]}
    assert rows.keys() == FIGURES
    memory = rows.pop("memory")
    assert memory["met"] is None
    assert memory["details"] == [f"device_memory: {data['errors']['device_memory']}"]
    for row in rows.values():
        assert all(math.isfinite(row[figure]) for figure in ("limit", "value", "low", "high")), row
        below = row["value"] <= row["limit"]
        assert row["met"] == (below if row["relation"] == "<=" else not below or row["value"] == row["limit"])
    assert data["errors"].keys() == {"device_memory"}


@pytest.mark.slow
def test_ways_to_copy_are_measured_by_turns(measured: tuple[dict[str, Any], str, Path]) -> None:
    data, _, _ = measured
    for part in ("lost", "short"):
        samples = data["samples"][part]
        for way in ("overlapped", "roomy", "blocking", "bare", "handmade", "cloned"):
            assert len(samples[f"{way}_lost_s"]) == len(samples[f"{way}_call_s"]) == 1
            assert min(samples[f"{way}_call_s"]) >= 0
        assert min(samples["step_s"]) > 0
        assert samples["tensors"] == [88]  # of 22 parameters: each, two moments and a step
        assert len(samples["overlapped_stats_reason"]) == 1
        assert samples["blocking_stats_overlapped"] == [False]


@pytest.mark.slow
def test_the_table_has_every_row_and_the_tests(measured: tuple[dict[str, Any], str, Path]) -> None:
    data, table, _ = measured
    lines = table.splitlines()
    for row in data["rows"]:
        (line,) = (line for line in lines if line.startswith(f"{row['what']:<48}"))
        assert line.endswith("  met") == (row["met"] is True)
        assert line.endswith("  not measured") == (row["met"] is None)
    assert data["tests"]["failed"] == data["tests"]["passed"] == 0
    assert data["tests"]["skipped"] > 0
    assert f"Tests that need a GPU: {data['tests']['summary']}." in lines
    assert any(line.startswith("| **asyncckpt Checkpointer**") for line in lines)


@pytest.mark.slow
def test_nothing_is_left_behind(measured: tuple[dict[str, Any], str, Path]) -> None:
    _, _, directory = measured
    assert list(directory.iterdir()) == []


def test_parts_for_which_no_time_is_left_are_left_out(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    data, table = run(disk, "--parts", "lost", "ours", "--limit", "0")
    assert data["errors"] == dict.fromkeys(("lost", "ours"), "left out: the 0.0 s were over")
    assert all(row["met"] is None for row in data["rows"])
    assert f"0 of 0 measured rows met, {len(FIGURES)} not measured." in table


STOPPED = """
    import json, sys
    import gpu

    sys.argv += ["--device", "cpu", "--quick"]
    run, parts = gpu.Run(gpu.arguments()), {part.name: part for part in gpu.PARTS}
    run._run(parts["device_memory"], 60)
    run._run(parts["gpu_tensors"], 0.1)
    print(json.dumps(run.data()))
"""


def test_a_part_that_fails_or_is_stopped_costs_only_its_rows(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    code, output, errors = run_python(STOPPED, "--dir", str(tmp_path), env={"PYTHONPATH": path})
    assert code == 0, errors
    rows = {row["key"]: row for row in json.loads(output)["rows"]}
    assert rows["memory"]["details"] == [
        "device_memory: RuntimeError: the memory of a CPU is no device memory"
    ]
    assert rows["tensors"]["details"] == ["gpu_tensors: took longer than 0 s and was stopped"]
    assert rows["lost"]["details"] == ["lost: left out"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("modules")
def test_a_save_that_loses_little_beside_the_bare_copy_meets_its_target() -> None:
    gpu_rows: Any = import_module("gpu_rows")
    judged = {one.target.key: one for one in gpu_rows.JUDGED}["lost_bare"]
    for lost, met in ((0.011, True), (0.013, False)):
        samples = {"overlapped_lost_s": [lost, 0.002, 0.9], "bare_lost_s": [0.08, 0.07, 0.09]}
        row = gpu_rows._row(judged, {"lost": samples}, {})
        assert row["met"] is met
        assert row["value"] == pytest.approx(lost / 0.08)


@pytest.mark.usefixtures("modules")
def test_a_batch_is_chosen_by_the_length_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_model: Any = import_module("gpu_model")
    training = gpu_model.GPTTraining(gpu_model.TINY, "cpu")
    monkeypatch.setattr(gpu_model.GPTTraining, "seconds", lambda self: 2e-3 + 1e-3 * self.batch)
    for seconds, batch in ((10e-3, 8), (25.2e-3, 23), (1e-3, 1), (1.0, 64)):
        training.last(seconds)
        assert training.batch == batch
