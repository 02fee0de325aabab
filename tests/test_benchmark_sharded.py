"""The benchmark of many ranks runs, judges the slowest rank where it says so, and tells what failed."""

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

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"sharded_stall", "sharded_agreement", "sharded_durable", "ddp_stall"}
PEERS = ("dcp_save", "ours", "ours_alone", "ours_divided")
STATS = ("wait", "agreement", "freeze", "copy", "checksum", "write", "sync", "commit", "durable")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures with what only Linux has")


@pytest.fixture
def modules() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    directory = tmp_path_factory.mktemp("disk")
    result = directory.parent / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "sharded.py"), "--quick", "--repeat", "1"]
    command += ["--ranks", "2", "--only", *PEERS, "--dir", str(directory), "--json", str(result)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        check=True,
    )
    return json.loads(result.read_text(encoding="utf-8")), done.stdout, directory


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_target_has_finite_figures_and_a_verdict(run: tuple[dict[str, Any], str, Path]) -> None:
    data, _, _ = run
    assert data["errors"] == {}
    rows = {row["key"]: row for row in data["rows"]}
    assert rows.keys() == TARGETS
    for row in rows.values():
        assert all(math.isfinite(row[figure]) for figure in ("limit", "value", "low", "high"))
        assert isinstance(row["met"], bool)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_rank_has_its_samples(run: tuple[dict[str, Any], str, Path]) -> None:
    data, _, _ = run
    parts = {"saves", "steps", "loads", "ddp", "memory_dcp_save", "memory_ours"}
    assert data["samples"].keys() == parts
    for rank in data["samples"]["saves"]:
        for name in ("copy_s", "write_s", "ours_stall_s", "ours_first_s", "dcp_save_stall_s"):
            assert len(rank[name]) == 1
            assert rank[name][0] > 0
        assert rank["ours_began"][0] + rank["ours_stall_s"][0] <= rank["ours_ended"][0]
    # FSDP2 divides the state, DDP does not.
    halves = [rank["bytes"][0] for rank in data["samples"]["saves"]]
    wholes = [rank["bytes"][0] for rank in data["samples"]["ddp"]]
    assert wholes[0] == wholes[1]
    assert max(halves) < 0.6 * wholes[0]
    assert all(min(rank["ours_step_s"]) > 0 for rank in data["samples"]["steps"])
    assert data["samples"]["memory_ours"][0]["peak_bytes"][0] > 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_tables_have_every_way(run: tuple[dict[str, Any], str, Path]) -> None:
    _, table, directory = run
    for name, count in (("**asyncckpt Checkpointer**", 3), ("DCP save", 2), ("**asyncckpt restore**", 1)):
        assert sum(line.startswith(f"| {name} |") for line in table.splitlines()) == count
    assert "| **asyncckpt Checkpointer, sharded=True** |" in table
    assert "failed" not in table
    assert list(directory.iterdir()) == []


def measured(**changed: list[list[float]]) -> dict[str, Any]:
    """Return samples of two ranks: of each name, those of each rank."""
    ours = {"ours_stall_s": [[0.010, 0.012], [0.010, 0.014]], "copy_s": [[0.010, 0.010], [0.010, 0.010]]}
    times = {
        "ours_began": [[5.0, 9.0], [5.1, 9.0]],
        "ours_ended": [[5.4, 9.5], [5.5, 9.4]],
        "write_s": [[0.4, 0.4], [0.3, 0.4]],
        "direct": [[True], [True]],
        "bytes": [[10**9], [10**9]],
    }
    stats = {f"ours_stats_{name}_s": [[0.001, 0.001], [0.001, 0.003]] for name in STATS}
    found: dict[str, Any] = {**ours, **times, **stats, **changed}
    return {"saves": [{name: values[rank] for name, values in found.items()} for rank in range(2)]}


def judged(samples: dict[str, Any]) -> dict[str, dict[str, Any]]:
    report: Any = import_module("sharded_report")
    return {row["key"]: row for row in report.judge(report.Found(samples))}


@pytest.mark.usefixtures("modules")
def test_durable_counts_from_the_first_call_of_any_rank_to_the_end_of_the_last() -> None:
    row = judged(measured())["sharded_durable"]
    assert row["value"] == pytest.approx(0.4 / 0.5)
    assert row["met"]
    late = judged(measured(ours_ended=[[5.4, 9.5], [5.9, 9.9]]))["sharded_durable"]
    assert late["value"] == pytest.approx(0.4 / 0.9)
    assert not late["met"]


@pytest.mark.usefixtures("modules")
def test_stall_and_coordination_are_medians_over_ranks_and_saves() -> None:
    rows = judged(measured())
    assert rows["sharded_stall"]["value"] == pytest.approx(1.1)
    assert rows["sharded_stall"]["high"] == pytest.approx(1.4)
    assert rows["sharded_agreement"]["value"] == pytest.approx(1.0)
    assert rows["sharded_agreement"]["high"] == pytest.approx(3.0)


@pytest.mark.usefixtures("modules")
def test_ddp_is_judged_by_the_slowest_rank() -> None:
    times = {
        "ours_divided_stall_s": ([0.02], [0.04]),
        "ours_alone_stall_s": ([0.1], [0.0]),
        "copy_part_s": ([1.0], [2.0]),
        "copy_whole_s": ([4.0], [0.0]),
        **{f"ours_divided_stats_{name}_s": ([0.001], [0.001]) for name in STATS},
    }
    ranks = [{name: values[rank] for name, values in times.items()} for rank in range(2)]
    row = judged({"ddp": ranks})["ddp_stall"]
    assert row["value"] == pytest.approx(0.4)
    assert not row["met"]
    assert row["details"][1].endswith("here the limit is 0.50")


@pytest.mark.usefixtures("modules")
def test_what_was_not_measured_is_not_judged() -> None:
    rows = judged({})
    assert rows.keys() == TARGETS
    assert all(row["met"] is None for row in rows.values())


@pytest.mark.usefixtures("modules")
def test_results_of_ranks_come_in_their_order() -> None:
    program = "import os; print('told'); print([int(os.environ[k]) for k in ('RANK', 'WORLD_SIZE')])"
    processes: Any = import_module("rank_processes")
    assert processes.run_ranks(3, "-c", program, limit=60) == [[0, 3], [1, 3], [2, 3]]


@pytest.mark.usefixtures("modules")
def test_a_rank_that_fails_ends_the_others_and_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import os, sys, time; time.sleep(100) if os.environ['RANK'] == '0' else sys.exit('no disk')"
    processes: Any = import_module("rank_processes")
    with pytest.raises(subprocess.CalledProcessError):
        processes.run_ranks(2, "-c", program, limit=60)
    assert "no disk" in capfd.readouterr().err


@pytest.mark.usefixtures("modules")
def test_ranks_that_take_too_long_are_killed() -> None:
    processes: Any = import_module("rank_processes")
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run_ranks(2, "-c", "import time; time.sleep(100)", limit=0.1)


@pytest.mark.usefixtures("modules")
def test_shares_have_about_as_many_bytes_and_every_tensor_once() -> None:
    torch: Any = import_module("torch")
    model: Any = import_module("sharded_model")
    tensors = [torch.zeros(count) for count in (5, 100, 40, 30, 30, 1)]
    parts = model.shares(tensors, 2)
    assert sorted(model.bytes_of(part) for part in parts) == [4 * 101, 4 * 105]
    assert sum(map(len, parts)) == len(tensors)
