"""`asyncckpt adopt` describes folders of stock DCP in place, and a Checkpointer continues with them."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import anyio
import fsspec
import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from typer.testing import CliRunner

from asyncckpt import Checkpointer, CheckpointNotFoundError
from asyncckpt._loading.folder_adoption import adopt_folder
from asyncckpt.cli.app import app
from asyncckpt.layout.folder_mark import seal
from asyncckpt.stores import open_store
from asyncckpt.types import Checkpoint
from folders import DATA, MARK, save_by_stock, save_described
from sameness import assert_same
from support import flip

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

TEMPLATE = "step-{step}.pt"


def adopt(directory: object, *arguments: str, template: str = TEMPLATE) -> Result:
    return CliRunner().invoke(app, ["adopt", str(directory), "--filename", template, *arguments])


def state(step: int) -> dict[str, Any]:
    return {"weight": torch.arange(100.0) * step, "step": step}


def checkpoints(directory: object, template: str = TEMPLATE) -> list[tuple[int | None, int]]:
    with Checkpointer(str(directory), filename=template, create=False) as checkpointer:
        return [(found.step, found.sequence) for found in checkpointer.checkpoints()]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 3):
        save_by_stock(tmp_path / f"step-{step}", state(step))
    return tmp_path


@pytest.mark.parametrize("template", [TEMPLATE, "step-{step}"])
def test_adopted_folders_are_a_series(run: Path, template: str) -> None:
    save_by_stock(run / "other", {})
    before = (run / "step-3" / DATA).read_bytes()
    result = adopt(run, template=template)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(
        "adopted 2 checkpoints; 1 other folder left alone\nnewest is step-10, step 10\n"
    )
    assert checkpoints(run, template) == [(3, 1), (10, 2)]
    assert (run / "step-3" / DATA).read_bytes() == before
    assert sorted(path.name for path in (run / "step-3").iterdir()) == [MARK, DATA]
    with Checkpointer(run, filename=template) as checkpointer:
        checkpointer.verify()
        assert_same(checkpointer.load(), state(10))
        (first, _) = checkpointer.checkpoints()
        assert first.nbytes == (run / "step-3" / DATA).stat().st_size
        checkpointer.save(11, state(11))
    assert checkpoints(run, template) == [(3, 1), (10, 2), (11, 3)]
    again = adopt(run, template=template)
    assert again.exit_code == 0
    assert again.stdout == "adopted 0 checkpoints; 3 described already; 1 other folder left alone\n"


def test_stock_dcp_reads_an_adopted_folder_as_before(run: Path) -> None:
    adopt(run)
    live = {"weight": torch.zeros(100), "step": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_distributed(live, checkpoint_id=run / "step-3")
    assert_same(live, state(3))


def test_files_and_folders_are_adopted_in_order_of_step(run: Path) -> None:
    torch.save(state(5), run / "step-5.pt")
    save_described(run, 1, state(1), sequence=4)
    document = json.loads(adopt(run, "--json").stdout)
    assert [(file["step"], file["sequence"], file["status"]) for file in document["files"]] == [
        (3, 5, "adopted"),
        (5, 6, "adopted"),
        (10, 7, "adopted"),
    ]


def test_damaged_folder_is_refused_and_stays_as_it_is(run: Path) -> None:
    data = run / "step-3" / DATA
    flip(data, data.read_bytes().index(torch.arange(9.0, 30.0, 3).numpy().tobytes()))
    mark = (run / "step-3" / MARK).read_bytes()
    result = adopt(run)
    assert result.exit_code == 1
    assert f"{data}, item weight: record " in result.stderr
    assert (run / "step-3" / MARK).read_bytes() == mark
    assert checkpoints(run) == [(10, 1)]


def test_dry_run_checks_and_changes_nothing(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = adopt(run, "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.count("would adopt ") == 3
    (run / "step-3" / DATA).write_bytes(before[run / "step-3" / DATA][:-1])
    assert adopt(run, "--dry-run").exit_code == 1
    (run / "step-3" / DATA).write_bytes(before[run / "step-3" / DATA])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_folder_that_is_replaced_meanwhile_is_not_described(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replacing(*given: Any) -> Any:
        mark = run / "step-3" / MARK
        content = mark.read_bytes()
        mark.unlink()
        mark.write_bytes(content)
        return seal(*given)

    monkeypatch.setattr("asyncckpt._loading.folder_adoption.seal", replacing)
    found = Checkpoint(3, str(run / "step-3"), {}, sequence=1, filename=TEMPLATE)
    with pytest.raises(CheckpointNotFoundError, match="was replaced while it was read"):
        anyio.run(adopt_folder, open_store(str(run)), found)
    assert checkpoints(run) == []


def test_remote_folders_are_adopted(run: Path, memory: str) -> None:
    fsspec.filesystem("memory").put(str(run), "/runs", recursive=True)
    assert adopt(memory).exit_code == 0
    assert checkpoints(memory) == [(3, 1), (10, 2)]
    with Checkpointer(memory, filename=TEMPLATE) as checkpointer:
        checkpointer.verify(3)
        checkpointer.save(11, state(11))
        assert_same(checkpointer.load(10), state(10))
