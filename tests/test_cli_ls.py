"""`asyncckpt ls` lists what a directory holds, and marks the newest and the best."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

from asyncckpt import Checkpointer, StoreError
from asyncckpt.cli import locations
from asyncckpt.cli.app import app
from asyncckpt.stores import open_store
from asyncckpt.testing import FaultyStore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typer.testing import Result

    from asyncckpt.stores.base import Store


def ls(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["ls", *map(str, arguments)])


def listed(*arguments: object) -> list[dict[str, Any]]:
    result = ls(*arguments, "--json")
    assert result.exit_code == 0, result.output
    entries: list[dict[str, Any]] = json.loads(result.stdout, parse_constant=pytest.fail)
    return entries


def save(directory: object, metrics: Mapping[int, Mapping[str, float]]) -> None:
    with Checkpointer(str(directory)) as checkpointer:
        for step, values in metrics.items():
            checkpointer.save(step, {"weight": torch.zeros(100)}, metrics=values)


def marked(entries: list[dict[str, Any]], mark: str) -> list[int | str]:
    return [entry["step"] or entry["name"] for entry in entries if entry[mark]]


def test_the_table_is_in_order_of_commit_and_has_the_metrics(tmp_path: Path) -> None:
    save(tmp_path, {30: {"val_loss": 2.5}, 10: {"val_loss": 0.123456}, 20: {"val_loss": math.nan}})
    result = ls(tmp_path)
    assert result.exit_code == 0
    head, *rows, total, best = [line.rstrip() for line in result.stdout.splitlines()]
    assert head.split() == ["name", "step", "val_loss", "size", "age"]
    cells = [re.split(r"  +", row) for row in rows]
    assert [row[:3] for row in cells] == [
        ["step-00000030.pt", "30", "2.5"],
        ["step-00000010.pt", "10", "0.12346"],
        ["step-00000020.pt", "20", "nan"],
    ]
    assert [row[5:] for row in cells] == [[], ["best"], ["newest"]]
    assert total.startswith("3 checkpoints, ")
    assert best == "best: lowest val_loss (--best val_loss:max for the highest)"


def test_json_tells_all(tmp_path: Path) -> None:
    began = time.time()
    save(tmp_path, {7: {"loss": math.nan, "acc": 0.5}})
    path = tmp_path / "step-00000007.pt"
    os.utime(path, (1, 1))
    (entry,) = listed(tmp_path)
    assert began <= entry.pop("created") <= time.time()
    assert entry == {
        "name": "step-00000007.pt",
        "path": str(path),
        "folder": False,
        "ranks": None,
        "writer": "asyncckpt",
        "series": "step-{step:08d}.pt",
        "step": 7,
        "epoch": None,
        "metrics": {"loss": "NaN", "acc": 0.5},
        "nbytes": path.stat().st_size,
        "newest": True,
        "best": False,
        "error": None,
    }


def test_the_best_is_that_of_the_metric_asked_for(tmp_path: Path) -> None:
    save(tmp_path, {1: {"loss": 3.0, "acc": 0.1}, 2: {"loss": 1.0, "acc": 0.3}, 3: {"acc": 0.9}})
    assert marked(listed(tmp_path), "best") == []
    assert marked(listed(tmp_path, "--best", "loss"), "best") == [2]
    assert marked(listed(tmp_path, "--best", "loss:max"), "best") == [1]
    assert marked(listed(tmp_path, "--best", "acc:min"), "best") == [1]
    assert "best: not shown; choose with --best METRIC[:min|max], one of loss, acc\n" in ls(tmp_path).stdout
    assert "best: highest acc (--best acc:min" in ls(tmp_path, "--best", "acc:max").stdout


def test_a_metric_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path: Path) -> None:
    save(tmp_path, {1: {"loss": 3.0, "val/acc": 0.1}})
    result = ls(tmp_path, "--best", "los")
    assert result.exit_code == 2
    assert "no checkpoint has a metric 'los'; there are: loss, val/acc" in result.stderr


def test_nan_is_the_worst(tmp_path: Path) -> None:
    save(tmp_path, {1: {"loss": math.nan}, 2: {"loss": math.inf}, 3: {"loss": math.nan}})
    assert marked(listed(tmp_path), "best") == [2]
    assert marked(listed(tmp_path, "--best", "loss:max"), "best") == [2]


def test_many_metrics_are_folded(tmp_path: Path) -> None:
    save(tmp_path, {1: {f"metric{number}": 0.5 for number in range(6)}})
    shown = ls(tmp_path).stdout
    assert "metric3" in shown.splitlines()[0]
    assert "metric4" not in shown.splitlines()[0]
    assert "not shown: metric4, metric5 (--json has all)" in shown


def test_files_of_others_are_listed_with_what_they_tell(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "global_step": 70, "state_dict": {}}, tmp_path / "theirs.ckpt")
    torch.save({"epoch": 4, "global_step": 90, "state_dict": {}}, tmp_path / "no suffix")
    os.utime(tmp_path / "theirs.ckpt", (1e9, 1e9))
    first, second = listed(tmp_path)
    assert (first["name"], first["step"], first["epoch"], first["created"]) == ("theirs.ckpt", 70, 3, 1e9)
    assert (second["name"], second["newest"]) == ("no suffix", True)
    assert ls(tmp_path).stdout.split()[:5] == ["name", "step", "epoch", "size", "age"]


def test_the_newest_is_the_last_commit_whatever_the_others_say(tmp_path: Path) -> None:
    save(tmp_path, {5: {}, 3: {}})
    torch.save({}, tmp_path / "later.pt")
    os.utime(tmp_path / "step-00000003.pt", (1, 1))
    assert marked(listed(tmp_path), "newest") == [3]


def test_what_is_no_checkpoint_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("step 1\n")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / ".step-1.pt.asyncckpt-tmp").touch()
    shutil.make_archive(str(tmp_path / "code"), "zip", tmp_path, "log.txt")
    result = ls(tmp_path)
    assert (result.exit_code, result.stdout) == (0, f"there are no checkpoints in {tmp_path}\n")
    assert listed(tmp_path) == []


def test_what_looks_like_a_checkpoint_but_is_none_is_listed_with_the_reason(tmp_path: Path) -> None:
    save(tmp_path, {1: {}})
    whole = (tmp_path / "step-00000001.pt").read_bytes()
    (tmp_path / "[red]cut.pt").write_bytes(whole[:200])
    (tmp_path / "without suffix").write_bytes(whole[:-30])
    (tmp_path / "empty.bin").touch()
    good, *damaged = listed(tmp_path)
    assert good["error"] is None
    assert {entry["name"] for entry in damaged} == {"[red]cut.pt", "without suffix", "empty.bin"}
    assert all(entry["path"] in entry["error"] and entry["writer"] is None for entry in damaged)
    assert not any(entry["newest"] or entry["best"] for entry in damaged)
    result = ls(tmp_path)
    assert result.exit_code == 0
    assert re.search(r"(?m)^\[red\]cut\.pt .* damaged\? *$", result.stdout)
    assert f"damaged? {tmp_path}/[red]cut.pt: " in result.stdout
    assert "4 checkpoints, " in result.stdout
    assert "; 3 cannot be read\n" in result.stdout


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save({"bomb": _Bomb(tmp_path / "exploded"), "epoch": 1}, tmp_path / "bomb.pt")
    assert [entry["error"] for entry in listed(tmp_path)] == [None]
    assert not (tmp_path / "exploded").exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "exploded").exists()


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    metrics = {f"{letter}\x1b[2J\n": 1.0 for letter in "abcdef"}
    with Checkpointer(tmp_path, filename="\x1b[31m{step}.pt") as checkpointer:
        checkpointer.save(1, {}, metrics=metrics)
    (tmp_path / os.fsdecode(b"\xff\x1b.pt")).touch()
    results = (
        ls(tmp_path),
        ls(tmp_path, "--json"),
        ls(tmp_path, "--best", "g"),
        ls(tmp_path, "--best", "a\x1b[2J\n"),
    )
    assert [result.exit_code for result in results] == [0, 0, 2, 0]
    assert not any("\x1b" in result.output for result in results)
    assert r"\x1b[31m1.pt" in results[0].stdout
    assert r"there are: a\x1b[2J\n, b" in results[2].stderr
    assert r"damaged? " in results[0].stdout


def test_a_file_that_cannot_be_read_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*given: Any) -> Store:
        store = FaultyStore(open_store(*given))
        error = StoreError(13, "no permission", "the file")
        store.fail("read", error, times=None, where=lambda name: name in {"step-00000001.pt", "log.txt"})
        return store

    save(tmp_path, {1: {}, 2: {}})
    (tmp_path / "log.txt").write_text("a line\n" * 100)
    monkeypatch.setattr(locations, "open_store", failing)
    good, unread = listed(tmp_path)
    assert (good["name"], good["error"]) == ("step-00000002.pt", None)
    assert (unread["name"], unread["error"]) == ("step-00000001.pt", "no permission (the file)")


def test_odd_steps_and_names_do_not_hide_the_others(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, filename="odd.pt") as checkpointer:
        checkpointer.save(10**400, {})
    torch.save({"metrics": {"": 1.0}}, tmp_path / "unnamed.pt")
    result = ls(tmp_path)
    assert result.exit_code == 0, result.output
    assert "odd.pt" in result.stdout
    assert "unnamed.pt" in result.stdout
    assert ls(tmp_path, "--best", "").exit_code == 2


def test_a_remote_directory_is_listed(tmp_path: Path) -> None:
    directory = f"memory://{tmp_path}"
    save(directory, {1: {"loss": 2.0}, 2: {"loss": 1.0}})
    entries = listed(directory)
    assert [entry["path"] for entry in entries] == [f"{directory}/step-{step:08d}.pt" for step in (1, 2)]
    assert marked(entries, "best") == marked(entries, "newest") == [2]
    assert ls(f"{directory}/none").exit_code == 2


class _TimelessFileSystem(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    protocol = "timeless"
    store: dict[str, Any] = {}  # noqa: RUF012 - fsspec's own is one for all, too

    def ls(self, path: str, **_: Any) -> list[dict[str, Any]]:
        return [{**entry, "created": None} for entry in super().ls(path, detail=True)]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {**super().info(path), "created": None}


def test_where_nobody_tells_none_is_the_newest(tmp_path: Path) -> None:
    fsspec.register_implementation("timeless", _TimelessFileSystem, clobber=True)
    with fsspec.open(f"timeless://{tmp_path}/a.pt", "wb") as file:
        torch.save({}, file)
    (entry,) = listed(f"timeless://{tmp_path}")
    assert (entry["created"], entry["newest"]) == (None, False)


def test_the_time_of_a_remote_file_is_what_its_store_tells(tmp_path: Path) -> None:
    began = time.time()
    with fsspec.open(f"memory://{tmp_path}/a.pt", "wb") as file:
        torch.save({}, file)
    (entry,) = listed(f"memory://{tmp_path}")
    assert began - 1 < entry["created"] < time.time() + 1
    assert entry["newest"]


def test_a_pipe_gets_names_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    name = "a" * 200 + ".pt"
    torch.save({}, tmp_path / name)
    assert ls(tmp_path).stdout.splitlines()[1].startswith(name)


def save_series(directory: object) -> None:
    for series, losses in {"model": (3.0, 1.0), "ema": (2.0, 5.0)}.items():
        with Checkpointer(str(directory), filename=f"{series}-{{step}}.pt") as checkpointer:
            for step, loss in enumerate(losses, 1):
                checkpointer.save(step, {}, metrics={"loss": loss})


def test_each_series_has_its_newest_and_its_best(tmp_path: Path) -> None:
    save_series(tmp_path)
    torch.save({"loss": 0.0}, tmp_path / "theirs.pt")
    entries = listed(tmp_path)
    assert {entry["name"]: entry["series"] for entry in entries} == {
        "theirs.pt": None,
        "model-1.pt": "model-{step}.pt",
        "model-2.pt": "model-{step}.pt",
        "ema-1.pt": "ema-{step}.pt",
        "ema-2.pt": "ema-{step}.pt",
    }
    assert [entry["name"] for entry in entries if entry["newest"]] == ["model-2.pt", "ema-2.pt"]
    assert [entry["name"] for entry in entries if entry["best"]] == ["model-2.pt", "ema-1.pt"]
    shown = ls(tmp_path).stdout
    assert shown.split()[:4] == ["name", "series", "step", "loss"]
    assert "model-1.pt  model-{step}.pt" in shown
    assert "for the highest), of each series\n" in shown


def test_one_series_has_no_column(tmp_path: Path) -> None:
    save(tmp_path, {1: {}})
    assert ls(tmp_path).stdout.split()[:2] == ["name", "step"]


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_directories_below_are_listed_if_wanted(tmp_path: Path, scheme: str) -> None:
    top = f"{scheme}{tmp_path}/top"
    save(f"{top}/b/deep", {1: {}, 2: {}})
    save(f"{top}/a", {5: {}})
    there = f"in {top}/a, {top}/b/deep (use --recursive)\n"
    assert ls(top).output.endswith(there)
    paths = [entry["path"] for entry in listed(top, "-r")]
    assert paths == [
        f"{top}/{name}.pt" for name in ("a/step-00000005", "b/deep/step-00000001", "b/deep/step-00000002")
    ]
    assert marked(listed(top, "-r"), "newest") == [5, 2]
    shown = [line.rstrip() for line in ls(top, "-r").stdout.splitlines()]
    assert (shown[0], f"{top}/b/deep" in shown) == (f"{top}/a", True)


def test_a_file_that_vanishes_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any) -> Store:
        store = FaultyStore(open_store(*given))
        gone = FileNotFoundError(2, "gone")
        store.fail("read", gone, times=None, where=lambda name: name == "step-00000001.pt")
        return store

    save(tmp_path, {1: {}, 2: {}})
    monkeypatch.setattr(locations, "open_store", failing)
    assert [entry["name"] for entry in listed(tmp_path)] == ["step-00000002.pt"]
