"""Folders of many ranks in `ls`, `verify` and `prune`, beside files and alone."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
from typer.testing import CliRunner

from asyncckpt import Checkpointer
from asyncckpt._checksum import crc32
from asyncckpt.cli import output
from asyncckpt.cli.app import app
from asyncckpt.layout.description import Description
from asyncckpt.layout.folder_mark import seal, unseal
from folders import DATA, MARK, change_metadata, save_by_stock, save_described
from support import flip, run_python

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

    from object_servers import MotoServer

STATE = {"model": {"weight": torch.arange(10_000.0), "bias": torch.ones(3)}, "step": 7}
SERIES = "step-{step:08d}.pt"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def document(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A series of two folders and a file, and a folder of stock DCP."""
    place = tmp_path / "runs"
    for step in (1, 2):
        save_described(place, step, STATE, metrics={"loss": 1.0 / step})
    with Checkpointer(place) as checkpointer:
        checkpointer.save(3, STATE, metrics={"loss": 0.9})
    save_by_stock(place / "stock", STATE)
    return place


def test_listing_shows_folders_beside_files(directory: Path) -> None:
    stock, *ours = document("ls", directory)
    assert [(row["name"], row["step"], row["ranks"], row["folder"]) for row in ours] == [
        ("step-00000001", 1, 1, True),
        ("step-00000002", 2, 1, True),
        ("step-00000003.pt", 3, None, False),
    ]
    assert [(row["writer"], row["newest"], row["best"]) for row in ours] == [
        ("asyncckpt", False, False),
        ("asyncckpt", False, True),
        ("asyncckpt", True, False),
    ]
    nbytes = sum(file.stat().st_size for file in (directory / "stock").iterdir())
    assert (stock["name"], stock["writer"], stock["nbytes"]) == ("stock", output_writer(), nbytes)
    assert (stock["step"], stock["ranks"], stock["error"]) == (None, None, None)
    shown = run("ls", directory).stdout
    assert [line.split()[0] for line in shown.splitlines()[1:5]] == [
        "stock/", "step-00000001/", "step-00000002/", "step-00000003.pt",
    ]  # fmt: skip
    assert "ranks" in shown.splitlines()[0]
    assert (
        "\n1 folder of torch.distributed.checkpoint: asyncckpt.load reads them; after `asyncckpt adopt`"
        in shown
    )


def output_writer() -> str:
    return "torch.distributed.checkpoint"


def test_listing_folders_needs_neither_torch_nor_numpy(tmp_path: Path) -> None:
    save_described(tmp_path, 1, STATE)
    save_by_stock(tmp_path / "stock", STATE)
    script = """
        import sys
        from typer.testing import CliRunner
        from asyncckpt.cli.app import app
        result = CliRunner().invoke(app, ["ls", sys.argv[1]])
        assert "stock/" in result.stdout and "step-00000001/" in result.stdout, result.stdout
        assert not {"torch", "numpy"} & sys.modules.keys()
    """
    status, _, errors = run_python(script, str(tmp_path))
    assert status == 0, errors


def test_damaged_mark_is_listed_and_does_not_hide_the_others(directory: Path) -> None:
    mark = directory / "step-00000002" / MARK
    mark.write_bytes(mark.read_bytes()[:-3])
    rows = {row["name"]: row for row in document("ls", directory)}
    assert len(rows) == 4
    assert rows["step-00000002"]["folder"]
    assert f"{directory}/step-00000002: its .metadata" in rows["step-00000002"]["error"]
    assert "damaged?" in run("ls", directory).stdout


def test_directory_that_is_a_folder_itself_is_told(directory: Path) -> None:
    for name in ("stock", "step-00000001"):
        told = run("ls", directory / name)
        assert told.exit_code == 0
        assert f"; it is one itself: asyncckpt inspect {directory / name}\n" in told.stdout
    (directory / "stock" / MARK).unlink()
    assert "sharded save without .metadata: it is under way" in run("ls", directory / "stock").stdout


def test_recursive_listing_takes_a_folder_as_one_checkpoint(directory: Path) -> None:
    torch.save({}, directory / "stock" / "meta.pt")  # as Lightning does
    draft = directory / ".step-00000009.00000000.0000000000000000.asyncckpt-tmp"
    shutil.copytree(directory / "stock", draft)
    shutil.copytree(draft, directory.parent / "begun" / draft.name)
    rows = document("ls", directory.parent, "-r")
    assert sorted(row["name"] for row in rows) == [
        "step-00000001", "step-00000002", "step-00000003.pt", "stock",
    ]  # fmt: skip
    assert f"; there are some in {directory} (use --recursive)" in run("ls", directory.parent).stdout


def test_every_item_of_a_folder_is_verified(directory: Path) -> None:
    assert [(row["status"], row["folder"]) for row in document("verify", directory)] == [
        ("good", True), ("good", True), ("good", False), ("good", True),
    ]  # fmt: skip
    for name in ("step-00000001", "stock"):
        data = directory / name / DATA
        flip(data, data.read_bytes().index(torch.arange(500.0, 510.0).numpy().tobytes()))
    result = run("verify", directory)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["failed", "good", "good", "failed"]
    assert f"{directory}/step-00000001/{DATA}, item model.weight: record " in lines[0]
    assert lines[-1].startswith("4 checkpoints, ")
    assert lines[-1].endswith(": 2 failed, 2 good")


@pytest.mark.parametrize("name", ["step-00000001", "stock"])
def test_folder_is_verified_by_its_path(directory: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (only,) = document("verify", f"{directory / name}/")
    assert (only["path"], only["status"]) == (str(directory / name), "good")
    monkeypatch.chdir(directory / name)
    assert run("verify", ".").exit_code == 0
    (directory / name / DATA).unlink()
    result = run("verify", ".")
    assert result.exit_code == 1
    assert f"its file {directory / name / DATA} is missing" in result.stdout


def test_missing_part_of_a_tensor_fails(directory: Path) -> None:
    def drop(metadata: Any) -> None:
        del metadata.state_dict_metadata["model.weight"].chunks[0]

    change_metadata(directory / "stock", drop)
    result = run("verify", directory / "stock")
    assert result.exit_code == 1
    assert "the saved parts of model.weight have 0 of its 10000 elements" in result.stdout


def test_incomplete_folder_is_no_checkpoint(directory: Path) -> None:
    (directory / "stock" / MARK).unlink()
    for arguments in ((directory / "stock",), (directory / "stock" / DATA,)):
        (only,) = document("verify", *arguments)
        assert only["status"] == "unchecked"
    assert run("verify", directory / "stock").exit_code == 3
    assert len(document("verify", directory)) == 3
    assert [row["status"] for row in document("verify", directory, "-r")].count("unchecked") == 1
    for command in ("inspect", "diff"):
        result = run(command, directory / "stock", *([directory / "stock"] if command == "diff" else []))
        assert result.exit_code == 2
        assert "without .metadata: it is under way, or was not completed" in result.stderr


class _Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('executed')",)


def test_nothing_of_a_hostile_folder_is_executed(directory: Path) -> None:
    def replace(metadata: Any) -> None:
        metadata.planner_data = {"model.weight": _Evil()}

    change_metadata(directory / "stock", replace)
    assert len(document("ls", directory)) == 4
    for command in (["verify"], ["inspect"], ["diff", directory / "step-00000001"]):
        result = run(*command, directory / "stock")
        assert result.exit_code == 2, result.output
        assert "exec" in result.stderr
        assert "executed" not in result.output


def test_folders_are_pruned_as_files_are(directory: Path) -> None:
    found = document("prune", directory, "--keep", "last:1", "--keep", "best:1:loss", "--dry-run")
    assert [(entry["name"], entry["folder"]) for entry in found["removed"]] == [("step-00000001", True)]
    assert [entry["why"] for entry in found["kept"]] == [["best:1:loss"], ["last:1"]]
    assert (directory / "step-00000001").exists()
    result = run("prune", directory, "--keep", "last:1", "--keep", "best:1:loss")
    assert result.exit_code == 0, result.output
    assert "removed  step-00000001/" in result.stdout
    assert result.stdout.endswith("; 2 stay; 1 other folder left alone\n")
    left = sorted(path.name for path in directory.iterdir())
    assert left == ["step-00000002", "step-00000003.pt", "stock"]


def test_size_of_pruned_folders_is_that_of_all_their_files(directory: Path) -> None:
    nbytes = document("ls", directory)[1]["nbytes"]
    assert nbytes > 40_000
    result = run("prune", directory, "--keep", "last:2", "--dry-run")
    assert f"would remove 1 checkpoint, {output.size(nbytes)}; 2 stay" in result.stdout


@pytest.mark.parametrize("problem", ["flipped", "short", "missing", "metadata"])
def test_damaged_folder_that_stays_blocks_the_pruning(tmp_path: Path, problem: str) -> None:
    for step in (1, 2, 3):
        save_described(tmp_path, step, STATE)
    # Of the newest every byte is checked, of the one before only the structure.
    data = tmp_path / ("step-00000003" if problem == "flipped" else "step-00000002") / DATA
    if problem == "flipped":
        flip(data, data.read_bytes().index(torch.arange(500.0, 510.0).numpy().tobytes()))
    elif problem == "short":
        data.write_bytes(data.read_bytes()[:-1])
    elif problem == "missing":
        data.unlink()
    else:
        mark = data.parent / MARK
        flip(mark, mark.stat().st_size // 3)
    result = run("prune", tmp_path, "--keep", "last:2")
    assert result.exit_code == 1
    assert "nothing was removed: checkpoints that stay are damaged" in result.stderr
    assert str(data.parent) in result.stderr
    assert (tmp_path / "step-00000001" / MARK).exists()


def test_other_files_of_a_folder_are_shown_and_checked(tmp_path: Path) -> None:
    path = save_by_stock(tmp_path / "1", STATE)
    described = Description(1, 1, {}, 1.5, {}, "{step}", ranks=1, extras={"meta.pt": (5, crc32(b"12345"))})
    mark = path / MARK
    mark.write_bytes(seal(mark.read_bytes(), described.encode()))
    (path / "meta.pt").write_bytes(b"12345")
    assert run("verify", path).exit_code == 0
    assert {"name": "meta.pt", "items": 0, "nbytes": 5} in document("inspect", path)["files"]
    assert "\nbeside them: meta.pt, 5 B\n" in run("inspect", path).stdout
    shutil.copytree(path, tmp_path / "2")
    newer = Description(2, 2, {}, 2.5, {}, "{step}", ranks=1)
    (tmp_path / "2" / MARK).write_bytes(seal(unseal(mark.read_bytes()), newer.encode()))
    (path / "meta.pt").write_bytes(b"1234")
    for command in (["verify", path], ["inspect", path], ["prune", tmp_path, "--keep", "last:2", "--verify"]):
        result = run(*command)
        assert result.exit_code in {1, 2}
        assert "its file meta.pt" in result.output


def test_folder_with_a_damaged_description_is_left_alone(directory: Path) -> None:
    mark = directory / "step-00000001" / MARK
    flip(mark, mark.stat().st_size - 40)
    result = run("prune", directory, "--keep", "last:1")
    assert result.exit_code == 0
    assert "; 1 damaged folder left alone; 1 other folder left alone\n" in result.stdout
    assert mark.exists()


def test_target_of_a_link_to_a_folder_stays(directory: Path) -> None:
    (directory / "best").symlink_to("step-00000001")
    found = document("prune", directory, "--keep", "last:1")
    assert [(entry["name"], entry["why"]) for entry in found["kept"]] == [
        ("step-00000001", ["target of best"]),
        ("step-00000003.pt", ["last:1"]),
    ]


def test_folders_of_an_object_store(moto: MotoServer, tmp_path: Path) -> None:
    options = {"key": "k", "secret": "s", "endpoint_url": moto.url}
    given = [argument for key, value in options.items() for argument in ("--option", f"{key}={value}")]
    url = "s3://bucket/cli-folders"
    for place, own in ((url, options), (str(tmp_path), None)):
        with Checkpointer(place, sharded=True, storage_options=own) as checkpointer:
            for step in (1, 2, 2):  # the second one is replaced
                checkpointer.save(step, {**STATE, "step": step})
    fs = fsspec.filesystem("s3", **options)
    fs.put(str(save_by_stock(tmp_path / "stock", STATE)), f"{url}/step-00000003", recursive=True)
    assert [row["status"] for row in document("verify", url, *given)] == ["good"] * 3
    assert run("diff", f"{url}/step-00000002", tmp_path / "step-00000002", *given).exit_code == 0
    assert document("inspect", f"{url}/step-00000002", *given)["ranks"] == 1
    assert run("adopt", url, "--filename", SERIES, *given).exit_code == 0
    assert [row["step"] for row in document("ls", url, *given)] == [1, 2, 3]
    assert run("prune", url, "--keep", "last:1", *given).exit_code == 0
    assert sorted(path.rpartition("/")[2] for path in fs.find(url)) == [MARK, DATA]


def test_folders_of_a_remote_directory(directory: Path, memory: str) -> None:
    fsspec.filesystem("memory").put(str(directory), "/runs", recursive=True)
    assert len(document("ls", memory)) == 4
    assert [row["status"] for row in document("verify", memory)] == ["good"] * 4
    assert document("verify", f"{memory}/stock")[0]["status"] == "good"
    assert document("inspect", f"{memory}/stock")["total"]["tensors"] == 2
    assert run("diff", f"{memory}/stock", directory / "step-00000003.pt").exit_code == 0
    assert run("prune", memory, "--keep", "last:1").exit_code == 0
    assert sorted(row["name"] for row in document("ls", memory)) == ["step-00000003.pt", "stock"]
