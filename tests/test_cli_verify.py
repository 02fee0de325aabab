"""`asyncckpt verify` reads every byte, and its exit status tells what it found."""

from __future__ import annotations

import io
import json
import shutil
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import asyncckpt
from asyncckpt import Checkpointer, CorruptCheckpointError
from asyncckpt._loading.reader import verify_file
from asyncckpt.cli import locations, output
from asyncckpt.cli.app import app
from asyncckpt.stores import open_store
from asyncckpt.stores.local_file import LocalFile
from asyncckpt.testing import FaultyStore
from support import flip, payload_offset

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

    from asyncckpt.stores.base import Store


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"weight": torch.arange(1000)})
    return tmp_path


def damage(path: Path, record: str = "data/0") -> None:
    flip(path, payload_offset(path, record) + 1)


def test_all_good(run: Path) -> None:
    torch.save({"a": torch.ones(3)}, run / "theirs.ckpt")
    result = verify(run)
    assert result.exit_code == 0
    assert result.stderr == ""
    *lines, summary = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["good"] * 4
    assert lines[0].endswith(f"  {run}/step-00000001.pt")
    assert summary.startswith("4 files, ")
    assert summary.endswith(": 4 good")


def test_each_damaged_file_is_told_with_its_record(run: Path) -> None:
    damage(run / "step-00000001.pt")
    damage(run / "step-00000003.pt", "data.pkl")
    result = verify(run)
    assert result.exit_code == 1
    first, second, third, summary = result.stdout.splitlines()
    assert f"{run}/step-00000001.pt: record archive/data/0 (8000 bytes) is damaged" in first
    assert second.startswith("good ")
    assert f"{run}/step-00000003.pt: record archive/data.pkl" in third
    assert summary.endswith(": 2 failed, 1 good")


def test_files_are_taken_by_name_wherever_they_are(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (run / "no suffix at all").write_bytes(b"text")
    assert verify("step-00000001.pt", f"{run}/step-00000002.pt").exit_code == 0
    assert verify("no suffix at all").exit_code == 1
    assert verify(".").exit_code == 0


def test_a_link_is_followed_where_it_is_named(run: Path) -> None:
    (run / "last.ckpt").symlink_to("step-00000003.pt")
    assert verify(run / "last.ckpt").exit_code == 0
    assert "last.ckpt" not in verify(run).stdout


def test_of_a_directory_it_takes_what_looks_like_a_checkpoint(run: Path) -> None:
    whole = (run / "step-00000001.pt").read_bytes()
    (run / "cut").write_bytes(whole[:-1])
    (run / "empty.pth").touch()
    (run / "train.log").write_text("PK")
    np.savez(run / "tokens.npz", tokens=np.arange(10))
    shutil.make_archive(str(run / "code"), "zip", run, "train.log")
    (run / "folder.pt").mkdir()
    result = verify(run)
    assert result.exit_code == 1
    failed = [line for line in result.stdout.splitlines() if line.startswith("failed ")]
    assert [f"{run}/cut: " in failed[0], f"{run}/empty.pth: " in failed[1]] == [True, True]
    assert "5 files, " in result.stdout


def test_what_is_not_there_does_not_hide_the_rest(run: Path) -> None:
    result = verify(run / "none.pt", run / "step-00000001.pt")
    assert result.exit_code == 2
    assert result.stderr == f"asyncckpt: there is no file or directory {run}/none.pt\n"
    assert "step-00000001.pt" in result.stdout
    damage(run / "step-00000001.pt")
    assert verify(run / "none.pt", run / "step-00000001.pt").exit_code == 1


def test_a_directory_without_checkpoints_is_not_good(tmp_path: Path) -> None:
    result = verify(tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"asyncckpt: there is no checkpoint in {tmp_path}\n"


def test_what_cannot_be_read_is_not_called_damaged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any) -> Store:
        store = FaultyStore(open_store(*given))
        error = asyncckpt.StoreError(13, "no permission", "the file")
        store.fail("read", error, where=lambda name: name == "step-00000002.pt")
        return store

    monkeypatch.setattr(locations, "open_store", failing)
    result = verify(run)
    assert result.exit_code == 2
    assert result.stderr == "asyncckpt: no permission (the file)\n"
    assert result.stdout.endswith(": 2 good, 1 unreadable\n")


def test_json_has_a_verdict_for_each(run: Path) -> None:
    damage(run / "step-00000002.pt")
    result = verify(run, run / "none", "--json")
    assert result.exit_code == 1
    verdicts = json.loads(result.stdout)
    assert [verdict["status"] for verdict in verdicts] == ["good", "failed", "good", "unreadable"]
    size = (run / "step-00000001.pt").stat().st_size
    assert verdicts[0] == {
        "path": f"{run}/step-00000001.pt",
        "folder": False,
        "nbytes": size,
        "status": "good",
        "error": None,
    }
    assert "archive/data/0" in verdicts[1]["error"]


def test_a_file_without_checksums_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save({"a": torch.ones(100)}, tmp_path / "off.pt")
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    result = verify(tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path}/off.pt holds no checksums" in result.stdout
    assert "cannot be told" in result.stdout
    with pytest.raises(CorruptCheckpointError, match="holds no checksums"):
        asyncckpt.load(tmp_path / "off.pt")


def write_safetensors(path: Path) -> None:
    header = b"{}      "
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def test_what_has_no_checksums_is_named_and_unchecked(run: Path) -> None:
    write_safetensors(run / "model.safetensors")
    torch.save({"a": 1}, run / "old.bin", _use_new_zipfile_serialization=False)
    result = verify(run)
    assert result.exit_code == 0, result.output
    lines = [line.split(maxsplit=3) for line in result.stdout.splitlines()]
    unchecked = [words[3] for words in lines if words[0] == "unchecked"]
    because = "without checksums that verify can compare"
    assert unchecked == [
        f"{run}/model.safetensors: a safetensors file, {because}",
        f"{run}/old.bin: of the format that torch.save had before 1.6, {because}",
    ]
    assert result.stdout.endswith(": 2 unchecked, 3 good\n")


def test_where_nothing_can_be_checked_the_status_is_3(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors")
    assert verify(tmp_path).exit_code == 3
    result = verify(tmp_path / "model.safetensors", "--json")
    assert result.exit_code == 3
    (verdict,) = json.loads(result.stdout)
    assert (verdict["status"], verdict["error"].split(",")[0]) == ("unchecked", "a safetensors file")


def test_damage_counts_more_than_what_is_unchecked(run: Path) -> None:
    write_safetensors(run / "model.safetensors")
    damage(run / "step-00000002.pt")
    assert verify(run).exit_code == 1
    (run / "empty.bin").touch()
    (run / "step-00000002.pt").unlink()
    assert verify(run).exit_code == 1


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_directories_below_are_verified_if_wanted(tmp_path: Path, scheme: str) -> None:
    top = f"{scheme}{tmp_path}/top"
    for below in ("b/deep", "a"):
        with Checkpointer(f"{top}/{below}") as checkpointer:
            checkpointer.save(1, {})
    result = verify(top)
    assert result.exit_code == 2
    there = f"there is no checkpoint in {top}; there are some in {top}/a, {top}/b/deep (use --recursive)"
    assert result.stderr == f"asyncckpt: {there}\n"
    result = verify(top, "-r")
    assert result.exit_code == 0, result.output
    paths = [line.split()[-1] for line in result.stdout.splitlines()[:-1]]
    assert paths == [f"{top}/a/step-00000001.pt", f"{top}/b/deep/step-00000001.pt"]
    assert verify(f"{top}/none", "-r").exit_code == 2


def test_a_file_that_vanishes_is_gone_and_does_not_hide_the_others(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0  # that still find it

    def failing(*given: Any) -> Store:
        store = FaultyStore(open_store(*given))
        gone = FileNotFoundError(2, "gone")
        store.fail("read", gone, where=lambda name: name == "step-00000002.pt")
        store.fail("stat", gone, at=looks + 1, where=lambda name: name == "step-00000002.pt")
        return store

    monkeypatch.setattr(locations, "open_store", failing)
    result = verify(run)
    assert result.exit_code == 0, result.output
    assert f"{run}/step-00000002.pt: it was removed or replaced while it was read" in result.stdout
    assert result.stdout.endswith(": 2 good, 1 gone\n")
    looks = 1
    assert verify(run / "step-00000002.pt").exit_code == 3


def test_a_remote_file_is_verified(tmp_path: Path) -> None:
    with Checkpointer(f"memory://{tmp_path}") as checkpointer:
        checkpointer.save(1, {})
    assert verify(f"memory://{tmp_path}").exit_code == 0
    assert verify(f"memory://{tmp_path}/step-00000001.pt").exit_code == 0
    assert verify(f"memory://{tmp_path}/none").exit_code == 2


def test_options_go_to_the_paths_that_are_urls(run: Path) -> None:
    with Checkpointer(f"memory://{run}") as checkpointer:
        checkpointer.save(1, {})
    assert verify(run, f"memory://{run}", "--option", "level=1").exit_code == 0


def test_progress_is_told_every_byte_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalFile, "chunk", 4096)
    told: list[int] = []
    anyio.run(verify_file, open_store(run), "step-00000001.pt", told.append)
    assert len(told) > 1
    assert sum(told) == (run / "step-00000001.pt").stat().st_size


def test_a_terminal_gets_a_bar_for_each_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(output, "errors", Console(file=screen, force_terminal=True, width=100))
    result = verify(run)
    assert result.stdout.count("good ") == 3
    assert "2/3 step-00000002.pt" in screen.getvalue()
    assert "2/3" not in result.stdout
