"""The comparison with the peers runs; its tables and pictures tell what its JSON says, failures included."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PEERS = ["torch_save_fsync", "lightning_async", "dcp_thread", "ours"]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="measures with what only Linux has"),
    pytest.mark.slow,
]


def run(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / arguments[0]), *arguments[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True
    ).stdout


def report(data: dict[str, Any], folder: Path) -> str:
    """Write table and pictures of a comparison into a folder, in this process; returns the table."""
    path = folder / "compare.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import_module("compare_report").write(path)
    return path.with_suffix(".md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    disk, out = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("out")
    printed = run("compare.py", "--quick", "--dir", str(disk), "--out", str(out), "--only", *PEERS)
    return disk, out, printed


def data_of(out: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    return data


def samples(data: dict[str, Any], kind: str, peer: str) -> dict[str, list[Any]]:
    return next(
        run["samples"]
        for run in data["runs"]
        if (run["kind"], run["state"], run["peer"]) == (kind, "gpt2", peer)
    )


def test_every_peer_has_finite_figures(compared: tuple[Path, Path, str]) -> None:
    data = data_of(compared[1])
    assert list(data["peers"]) == PEERS
    assert [run for run in data["runs"] if "error" in run] == []
    for peer in PEERS:
        found = samples(data, "saves", peer)
        times = ("first_stall_s", "stall_s", "complete_s", "durable_s", "at_hand_durable_s", "copy_s")
        for name in (*times, "file_bytes"):
            assert min(found[name]) > 0, (peer, name)
            assert all(math.isfinite(value) for value in found[name])
        assert found["complete_s"][0] <= found["durable_s"][0]
        assert found["stall_s"][0] <= found["complete_s"][0]


def test_it_is_seen_who_syncs(compared: tuple[Path, Path, str]) -> None:
    data = data_of(compared[1])
    synced = {peer: samples(data, "saves", peer)["synced"] for peer in PEERS}
    assert synced == {
        "torch_save_fsync": [1.0],
        "lightning_async": [0.0],
        "dcp_thread": [1.0],
        "ours": [1.0],
    }


def test_what_loads_is_compared_with_what_was_saved(compared: tuple[Path, Path, str]) -> None:
    data = data_of(compared[1])
    peers = ["torch_save_fsync", "lightning_async", "ours"]
    found = [samples(data, "loads", peer) for peer in peers]
    assert [samples["difference"] for samples in found] == [[None]] * 3
    assert [samples["ties_kept"] for samples in found] == [[True], [False], [True]]


def test_the_table_is_that_of_the_file(compared: tuple[Path, Path, str]) -> None:
    _, out, printed = compared
    table = (out / "compare.md").read_text(encoding="utf-8")
    assert printed == table
    for peer in data_of(out)["peers"].values():
        assert sum(peer["name"] in line for line in table.splitlines()) >= 2
    assert {path.name for path in out.iterdir()} == {
        "compare.json",
        "compare.md",
        "compare_stall.png",
        "compare_steps.png",
        "compare_growth.png",
    }


@pytest.fixture(scope="module")
def changed(compared: tuple[Path, Path, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tables of a run in which one peer failed, one loaded something else, and one was quicker."""
    data = data_of(compared[1])
    for one in data["runs"]:
        if one["peer"] == "dcp_thread" and one["kind"] == "saves":
            del one["samples"]
            one["error"] = "OSError: the disk is gone\nand more"
    samples(data, "loads", "lightning_async")["difference"] = ["state['step'] is -1, not 1000"]
    samples(data, "saves", "lightning_async")["stall_s"] = [1e-9]
    again = {
        "kind": "saves",
        "state": "gpt2",
        "peer": "torch_save_fsync",
        "turn": 1,
        "error": "took too long",
    }
    data["runs"].append(again)
    return report(data, tmp_path_factory.mktemp("changed"))


def row_of(table: str, *parts: str) -> bool:
    return any(all(part in line for part in parts) for line in table.splitlines())


def test_what_failed_is_shown_as_failed(changed: str) -> None:
    assert row_of(changed, "DCP async_save, thread", "| failed: OSError: the disk is gone |")


def test_what_failed_once_is_shown_beside_its_figures(changed: str) -> None:
    assert row_of(changed, "torch.save + fsync", "(failed: took too long)", " ms |")


def test_what_loads_as_something_else_is_shown(changed: str) -> None:
    assert row_of(changed, "Lightning AsyncCheckpointIO", "no: state['step'] is -1, not 1000")


def test_a_peer_that_is_better_is_named(changed: str) -> None:
    behind = changed.partition("### Where asyncckpt is not the first")[2]
    assert row_of(behind, "stall, warm: asyncckpt", "Lightning AsyncCheckpointIO")


def test_loads_alone_have_their_table(compared: tuple[Path, Path, str], tmp_path: Path) -> None:
    data = data_of(compared[1])
    data["runs"] = [one for one in data["runs"] if one["kind"] == "loads"]
    table = report(data, tmp_path)
    assert row_of(table, "| | load | loads what was saved | ties kept |")
    assert row_of(table, "Lightning AsyncCheckpointIO", " ms | yes | no |")
    assert "What a save costs" not in table
    assert not list(tmp_path.glob("*.png"))


def test_nothing_is_left_behind(compared: tuple[Path, Path, str]) -> None:
    assert list(compared[0].iterdir()) == []
