"""`asyncckpt prune` removes what no policy keeps, says why the rest stays, and nothing by mistake."""

from __future__ import annotations

import io
import json
import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import asyncckpt
from asyncckpt import Checkpointer, StoreError
from asyncckpt._saving.saver import Saver
from asyncckpt._saving.targets import FileTarget
from asyncckpt.cli import locations, output
from asyncckpt.cli.app import app
from asyncckpt.layout.description import Description
from asyncckpt.stores import open_store
from asyncckpt.stores.local import LocalStore
from asyncckpt.testing import FaultyStore
from support import flip, payload_offset

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

    from asyncckpt.stores.base import Store

LOSSES = {100: 4.0, 200: 1.0, 300: 2.0, 400: 3.0, 500: float("nan")}


def prune(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


def fill(directory: object) -> None:
    with Checkpointer(str(directory), filename="{step}.pt") as checkpointer:
        for step, loss in LOSSES.items():
            checkpointer.save(step, {"a": torch.zeros(100)}, metrics={"val_loss": loss, "val:acc": -loss})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    fill(tmp_path)
    return tmp_path


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("policies", "kept"),
    [
        (["best:2:val_loss"], {200, 300, 500}),
        (["best:1:val_loss:min"], {200, 500}),
        (["best:1:val_loss:max"], {100, 500}),
        (["best:1:val:acc:max"], {200, 500}),
        (["best:1:val:acc"], {100, 500}),
        (["last:2"], {400, 500}),
        (["every:200"], {200, 400, 500}),
        (["best:1:val_loss", "last:2", "every:300"], {200, 300, 400, 500}),
        (["last:9"], set(LOSSES)),
    ],
)
def test_what_any_policy_keeps_stays_and_the_newest(run: Path, policies: list[str], kept: set[int]) -> None:
    result = prune(run, *(word for policy in policies for word in ("--keep", policy)))
    assert result.exit_code == 0, result.output
    assert names(run) == {f"{step}.pt" for step in kept}


def test_it_says_what_went_and_why_the_rest_stays(run: Path) -> None:
    size = (run / "100.pt").stat().st_size
    result = prune(run, "--keep", "best:2:val_loss", "--keep", "every:200")
    *rows, summary = [line.split() for line in result.stdout.splitlines()]
    shown = {row[1]: (row[0], row[4:]) for row in rows[1:]}
    assert shown == {
        "100.pt": ("removed", []),
        "200.pt": ("keep", ["best:2:val_loss,", "every:200"]),
        "300.pt": ("keep", ["best:2:val_loss"]),
        "400.pt": ("keep", ["every:200"]),
        "500.pt": ("keep", ["newest"]),
    }
    assert " ".join(summary) == f"removed 1 checkpoint, {size / 1000:.2f} kB; 4 stay"


def test_a_dry_run_removes_nothing_and_says_so(run: Path) -> None:
    before = names(run)
    result = prune(run, "--keep", "last:2", "--dry-run")
    assert result.exit_code == 0
    assert names(run) == before
    assert "would remove  100.pt" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("would remove 3 checkpoints, ")
    assert result.stdout.endswith("(--dry-run: nothing was removed)\n")


MISTAKES = (
    "last last: last:0 last:-1 last:x last:2:val_loss every:0 best:3 best:3: best:0:val_loss best:val_loss"
    " best:1::max all LAST:2"
)


@pytest.mark.parametrize("spec", ["", *MISTAKES.split()])
def test_a_policy_that_does_not_parse_removes_nothing(run: Path, spec: str) -> None:
    result = prune(run, "--keep", "last:1", "--keep", spec)
    assert result.exit_code == 2
    assert f"{spec!r} is not a policy; use best:K:METRIC[:min|max], last:N or every:N" in result.stderr
    assert len(names(run)) == 5


@pytest.mark.parametrize("metric", ["val_los", "val_loss:maximum", "val"])
def test_a_metric_that_no_checkpoint_has_removes_nothing(run: Path, metric: str) -> None:
    result = prune(run, "--keep", "last:1", "--keep", f"best:2:{metric}")
    assert result.exit_code == 2
    assert f"no checkpoint has a metric {metric!r}; there are: val_loss, val:acc" in result.stderr
    assert len(names(run)) == 5


def test_a_policy_is_required(run: Path) -> None:
    result = prune(run)
    assert result.exit_code == 2
    assert "--keep" in result.stderr
    assert len(names(run)) == 5


def test_files_that_no_checkpointer_wrote_are_left_alone_and_counted(run: Path) -> None:
    torch.save({}, run / "theirs.pt")
    asyncckpt.save({}, run / "ours.pt")
    asyncckpt.wait()
    (run / "cut.pt").write_bytes((run / "100.pt").read_bytes()[:-10])
    save_with_a_step_alone(run, "epoch=1.ckpt")
    result = prune(run, "--keep", "last:1")
    assert result.exit_code == 0
    assert names(run) == {"500.pt", "theirs.pt", "ours.pt", "cut.pt", "epoch=1.ckpt"}
    assert result.stdout.endswith("; 1 stay; 1 damaged file left alone; 3 other files left alone\n")


def save_with_a_step_alone(directory: Path, name: str) -> None:
    """Save as the Lightning callback does: with a step, but without a place in the order of commits."""
    saver = Saver(max_in_flight=1)
    target = FileTarget(LocalStore(str(directory)), name, Description(0, 10, {}, time.time()))
    saver.save({}, target, 10, time.perf_counter())
    saver.drain()


def test_what_a_link_leads_to_stays(
    run: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (run / "last.ckpt").symlink_to("200.pt")
    (run / "best.ckpt").symlink_to("last.ckpt")
    (run / "whole.ckpt").symlink_to(tmp_path / "300.pt")
    (run / "dangling.ckpt").symlink_to("600.pt")
    (run / "itself.ckpt").symlink_to("itself.ckpt")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (run / "away.ckpt").symlink_to(elsewhere / "100.pt")
    (elsewhere / "100.pt").touch()
    (elsewhere / "to the run").symlink_to(run)
    result = prune(elsewhere / "to the run", "--keep", "last:1", "--json")
    assert result.exit_code == 0
    kept = {entry["name"]: entry["why"] for entry in json.loads(result.stdout)["kept"]}
    assert kept == {
        "200.pt": ["target of best.ckpt", "target of last.ckpt"],
        "300.pt": ["target of whole.ckpt"],
        "500.pt": ["last:1"],
    }
    assert torch.load(run / "last.ckpt")["a"].shape == (100,)


def test_a_directory_without_checkpoints_is_told(tmp_path: Path) -> None:
    result = prune(tmp_path, "--keep", "best:1:val_loss")
    assert (result.exit_code, result.stdout) == (0, "removed 0 checkpoints, 0 B; 0 stay\n")
    assert prune(tmp_path / "none", "--keep", "last:1").exit_code == 2
    assert names(tmp_path) == set()


def test_a_removal_that_fails_does_not_stop_the_others(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any) -> Store:
        store = FaultyStore(open_store(*given))
        store.fail("remove", StoreError(13, "no permission", "its file"), where=lambda name: name == "200.pt")
        return store

    monkeypatch.setattr(locations, "open_store", failing)
    result = prune(run, "--keep", "last:1", "--json")
    assert result.exit_code == 1
    assert result.stderr == "asyncckpt: no permission (its file)\n"
    assert names(run) == {"200.pt", "500.pt"}
    (failed,) = json.loads(result.stdout)["failed"]
    assert (failed["name"], failed["error"]) == ("200.pt", "no permission (its file)")


def test_json_tells_all(run: Path) -> None:
    nbytes = (run / "100.pt").stat().st_size
    document = json.loads(prune(run, "--keep", "last:1", "--dry-run", "--json").stdout)
    assert document["dry_run"] is True
    assert [entry["name"] for entry in document["kept"]] == ["500.pt"]
    assert document["kept"][0]["metrics"] == {"val_loss": "NaN", "val:acc": "NaN"}
    assert document["removed"][0] == {
        "name": "100.pt",
        "path": str(run / "100.pt"),
        "folder": False,
        "series": "{step}.pt",
        "step": 100,
        "metrics": {"val_loss": 4.0, "val:acc": -4.0},
        "nbytes": nbytes,
    }
    assert (len(document["removed"]), document["failed"], document["others"]) == (4, [], 0)


def test_a_remote_directory_is_pruned(tmp_path: Path) -> None:
    directory = f"memory://{tmp_path}"
    fill(directory)
    assert prune(directory, "--keep", "last:2").exit_code == 0
    with Checkpointer(directory, filename="{step}.pt") as checkpointer:
        assert [found.step for found in checkpointer.checkpoints()] == [400, 500]


# What stays is whole


def damage(path: Path) -> None:
    flip(path, payload_offset(path, "data/0") + 1)


def damage_header(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b"PK\x03\x04", b"PK\x03\x05", 1))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def test_the_last_good_file_is_not_removed(run: Path) -> None:
    damage(run / "500.pt")
    cut(run / "400.pt")
    before = names(run)
    result = prune(run, "--keep", "last:1")
    assert result.exit_code == 1
    assert names(run) == before
    *_, named, advice = result.stderr.splitlines()
    assert f"{run}/500.pt: record archive/data/0 (400 bytes) is damaged" in named
    assert advice == (
        "asyncckpt: nothing was removed: checkpoints that stay are damaged; move or delete them, then prune"
        " again"
    )
    rows = [line.split()[:2] for line in result.stdout.splitlines()]
    assert ["damaged", "500.pt"] in rows
    assert ["damaged", "400.pt"] in rows
    assert "removed 0 checkpoints, 0 B; 4 stay; 1 damaged file left alone\n" in result.stdout
    (run / "500.pt").unlink()
    assert prune(run, "--keep", "last:1").exit_code == 0
    assert names(run) == {"300.pt", "400.pt"}


def test_a_damaged_file_counts_for_no_policy(run: Path) -> None:
    cut(run / "500.pt")
    result = prune(run, "--keep", "last:1")
    assert result.exit_code == 0
    assert names(run) == {"400.pt", "500.pt"}
    assert "it was cut off" in result.stdout


def test_the_headers_of_all_that_stay_are_checked(run: Path) -> None:
    damage_header(run / "200.pt")
    result = prune(run, "--keep", "best:1:val_loss")
    assert result.exit_code == 1
    assert f"{run}/200.pt: its record archive/data/0 does not start with a header" in result.stderr
    assert len(names(run)) == 5


def test_the_headers_of_large_records_are_checked(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, [torch.zeros(200_000), torch.zeros(200_000), torch.zeros(5)])
    path = tmp_path / "step-00000002.pt"
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x03\x04", 900_000)] = 0
    path.write_bytes(content)
    result = prune(tmp_path, "--keep", "last:1")
    assert result.exit_code == 1
    assert "its record archive/data/2 does not start" in result.stderr


def test_the_content_of_all_that_stay_is_checked_if_wanted(run: Path) -> None:
    damage(run / "200.pt")
    result = prune(run, "--keep", "best:1:val_loss", "--verify", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert (document["blocked"], document["removed"]) == (True, [])
    (failed,) = document["failed"]
    assert failed["name"] == "200.pt"
    assert "archive/data/0" in failed["error"]
    assert len(names(run)) == 5
    assert prune(run, "--keep", "best:1:val_loss").exit_code == 0
    assert names(run) == {"200.pt", "500.pt"}


def test_a_dry_run_checks_too(run: Path) -> None:
    damage(run / "500.pt")
    result = prune(run, "--keep", "last:2", "--dry-run")
    assert result.exit_code == 1
    assert "would remove 0 checkpoints" in result.stdout
    assert "archive/data/0" in result.stderr


def test_what_is_to_stay_and_cannot_be_read_stops_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any) -> Store:
        store = FaultyStore(open_store(*given))
        error = StoreError(13, "no permission", "its file")
        store.fail("read", error, times=None, where=lambda name: name == "500.pt", at=2)
        return store

    monkeypatch.setattr(locations, "open_store", failing)
    result = prune(run, "--keep", "last:1")
    assert result.exit_code == 1
    assert "no permission (its file)" in result.stderr
    assert len(names(run)) == 5


def test_a_terminal_gets_a_bar_for_what_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(output, "errors", Console(file=screen, force_terminal=True, width=100))
    assert prune(run, "--keep", "last:2").exit_code == 0
    assert "1/1 500.pt" in screen.getvalue()


# Series


@pytest.fixture
def two(tmp_path: Path) -> Path:
    for name in ("model", "ema"):
        with Checkpointer(tmp_path, filename=f"{name}-{{step}}.pt") as checkpointer:
            for step in (1, 2, 3):
                checkpointer.save(step, {}, metrics={"loss": 1.0 / step} if name == "model" else None)
    return tmp_path


def test_a_policy_is_for_each_series(two: Path) -> None:
    result = prune(two, "--keep", "last:1")
    assert result.exit_code == 0
    assert names(two) == {"model-3.pt", "ema-3.pt"}
    shown = [line.split() for line in result.stdout.splitlines()]
    assert shown[0] == ["name", "series", "size", "why"]
    assert shown[1][:3] == ["removed", "model-1.pt", "model-{step}.pt"]


def test_the_newest_of_each_series_stays(two: Path) -> None:
    result = prune(two, "--keep", "every:2", "--json")
    assert result.exit_code == 0
    assert names(two) == {f"{name}-{step}.pt" for name in ("model", "ema") for step in (2, 3)}
    kept = {entry["name"]: (entry["series"], entry["why"]) for entry in json.loads(result.stdout)["kept"]}
    assert kept["model-3.pt"] == ("model-{step}.pt", ["newest"])


def test_the_newest_of_each_series_is_read_whole(tmp_path: Path) -> None:
    for name in ("model", "ema"):
        with Checkpointer(tmp_path, filename=f"{name}-{{step}}.pt") as checkpointer:
            for step in (1, 2):
                checkpointer.save(step, {"a": torch.ones(10)})
    damage(tmp_path / "model-2.pt")
    result = prune(tmp_path, "--keep", "last:1")
    assert result.exit_code == 1
    assert "model-2.pt: record archive/data/0" in result.stderr
    assert len(names(tmp_path)) == 4


def test_one_series_can_be_picked(two: Path) -> None:
    result = prune(two, "--keep", "best:1:loss:max", "--series", "model-{step}.pt")
    assert result.exit_code == 0
    assert names(two) == {"model-1.pt", "model-3.pt", *(f"ema-{step}.pt" for step in (1, 2, 3))}
    assert result.stdout.endswith("; 3 other files left alone\n")


def test_a_series_that_is_not_there_is_an_error(two: Path) -> None:
    result = prune(two, "--keep", "last:1", "--series", "{step}.pt")
    assert result.exit_code == 2
    assert "there are: model-{step}.pt, ema-{step}.pt" in result.stderr
    assert len(names(two)) == 6


def test_a_metric_that_one_series_does_not_have_removes_nothing(two: Path) -> None:
    result = prune(two, "--keep", "best:1:loss")
    assert result.exit_code == 2
    assert "no checkpoint of the series ema-{step}.pt has a metric 'loss'; there are: none" in result.stderr
    assert len(names(two)) == 6


def test_a_copy_under_another_name_is_left_alone(run: Path) -> None:
    shutil.copy(run / "100.pt", run / "first.pt")
    result = prune(run, "--keep", "last:1")
    assert names(run) == {"500.pt", "first.pt"}
    assert result.stdout.endswith("; 1 other file left alone\n")


def save_as_old_versions_did(directory: Path, name: str, step: int, sequence: int) -> None:
    saver = Saver(max_in_flight=1)
    target = FileTarget(LocalStore(str(directory)), name, Description(sequence, step, {}, time.time()))
    saver.save({}, target, step, time.perf_counter())
    saver.drain()


def test_old_files_are_of_the_series_that_goes_on_with_them(tmp_path: Path) -> None:
    for step in (1, 2):
        save_as_old_versions_did(tmp_path, f"{step}.pt", step, step)
        save_as_old_versions_did(tmp_path, f"other-{step}.pt", step, step + 2)
    with Checkpointer(tmp_path, filename="{step}.pt") as checkpointer:
        checkpointer.save(3, {})
    result = prune(tmp_path, "--keep", "last:1")
    assert result.exit_code == 0
    assert names(tmp_path) == {"3.pt", "other-2.pt"}
    assert "(unknown)" in result.stdout
