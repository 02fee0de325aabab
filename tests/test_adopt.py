"""`asyncckpt adopt` describes files of torch.save in place, and a Checkpointer continues with them."""

from __future__ import annotations

import io
import json
import os
import zipfile
from typing import TYPE_CHECKING, Any

import anyio
import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import asyncckpt
from asyncckpt import Checkpointer, StoreError
from asyncckpt._loading.adoption import adopt as adopt_file
from asyncckpt._loading.adoption import survey
from asyncckpt._naming import NameParser, NameTemplate, guess_template
from asyncckpt.cli import locations
from asyncckpt.cli.app import app
from asyncckpt.stores import open_store
from asyncckpt.stores.local_draft import LocalDraft
from asyncckpt.testing import FaultyStore
from strangers import data_pickle, write_file
from support import flip, payload_offset

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from typer.testing import Result

    from asyncckpt.stores.base import Store

TEMPLATE = "ckpt_{step:03d}.pth"


def adopt(directory: object, template: str = TEMPLATE, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["adopt", str(directory), "--filename", template, *arguments])


def checkpoints(directory: object, template: str = TEMPLATE) -> list[tuple[int | None, int]]:
    with Checkpointer(str(directory), filename=template, create=False) as checkpointer:
        return [(found.step, found.sequence) for found in checkpointer.checkpoints()]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 3, 7):
        torch.save({"weight": torch.arange(1000.0) * step, "step": step}, tmp_path / f"ckpt_{step:03d}.pth")
    return tmp_path


STATES: dict[str, Callable[[], Any]] = {
    "empty": dict,
    "no dict": lambda: [1, "two"],
    "an empty tensor": lambda: {"a": torch.zeros(0)},
    "one tensor": lambda: {"a": torch.arange(100.0)},
    "tied": lambda: dict.fromkeys("ab", torch.ones(3)),
    "odd sizes": lambda: [torch.full((n,), n, dtype=torch.uint8) for n in range(1, 70)],
    "more than 500 records": lambda: {f"layer{n}": torch.full((n % 5,), n) for n in range(600)},
    "several pieces": lambda: {"a": torch.arange(3_000), "b": torch.arange(5_000)},
}


@pytest.mark.parametrize("named", [True, False], ids=["root is the stem", "root is archive"])
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_file_keeps_its_bytes_and_its_meaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Callable[[], Any], *, named: bool
) -> None:
    monkeypatch.setattr(LocalDraft, "chunk", 4096)
    path = tmp_path / "ckpt_005.pth"
    if named:
        torch.save(state(), path)
    else:
        file = io.BytesIO()
        torch.save(state(), file)
        path.write_bytes(file.getvalue())
    before = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        body, records = archive.start_dir, archive.namelist()
    assert adopt(tmp_path).exit_code == 0
    assert path.read_bytes()[:body] == before[:body]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        *others, last = archive.namelist()
    assert others == records
    assert last == f"{'ckpt_005' if named else 'archive'}/.asyncckpt.json"
    expected = repr(state())
    for loaded in (torch.load(path), torch.load(path, mmap=True), asyncckpt.load(path)):
        assert repr(loaded) == expected
    assert checkpoints(tmp_path) == [(5, 1)]


def test_a_directory_with_more_than_65535_records_stays_zip64(tmp_path: Path) -> None:
    path = tmp_path / "ckpt_001.pth"
    payload = b"a byte or two"
    write_file(path, data_pickle({}), *[payload] * 65_540)
    assert adopt(tmp_path).exit_code == 0
    assert checkpoints(tmp_path) == [(1, 1)]
    assert torch.load(path) == {}
    reader: Any = torch._C.PyTorchFileReader(str(path))
    assert reader.get_record("data/65539") == payload


def test_a_checkpointer_continues_with_them(run: Path) -> None:
    os.utime(run / "ckpt_010.pth", (1e9, 1e9))
    assert adopt(run).exit_code == 0
    with Checkpointer(run, filename=TEMPLATE) as checkpointer:
        state: dict[str, Any] = {"weight": torch.zeros(1000), "step": 0}
        found = checkpointer.restore(state)
        assert found is not None
        assert (found.step, found.sequence, found.created, state["step"]) == (10, 3, 1e9, 10)
        assert torch.equal(state["weight"], torch.arange(1000.0) * 10)
        checkpointer.save(11, state)
    assert checkpoints(run) == [(3, 1), (7, 2), (10, 3), (11, 4)]


def test_they_stand_behind_what_is_there(run: Path) -> None:
    with Checkpointer(run, filename="model-{step}.pt") as checkpointer:
        checkpointer.save(1, {})
        checkpointer.save(2, {})
    assert adopt(run).exit_code == 0
    assert checkpoints(run) == [(3, 3), (7, 4), (10, 5)]
    assert checkpoints(run, "model-{step}.pt") == [(1, 1), (2, 2)]


def test_metrics_are_what_the_name_says(tmp_path: Path) -> None:
    template = "ckpt_{step}_{val_loss:.2f}.pth"
    for name in ("ckpt_1_0.52.pth", "ckpt_2_-1.00.pth", "ckpt_3_nan.pth"):
        torch.save({}, tmp_path / name)
    result = adopt(tmp_path, template)
    assert result.exit_code == 0
    assert "step 2, val_loss -1\n" in result.stdout
    with Checkpointer(tmp_path, filename=template) as checkpointer:
        found = [(each.step, dict(each.metrics)) for each in checkpointer.checkpoints()]
        best = checkpointer.best("val_loss")
    assert repr(found) == "[(1, {'val_loss': 0.52}), (2, {'val_loss': -1.0}), (3, {'val_loss': nan})]"
    assert best is not None
    assert best.step == 2


def test_it_says_what_it_did(run: Path) -> None:
    (run / "log.txt").touch()
    result = adopt(run)
    assert [line.split()[-1] for line in result.stdout.splitlines()[:3]] == ["3", "7", "10"]
    assert result.stdout.endswith(
        "adopted 3 files; 1 other file left alone\nnewest is ckpt_010.pth, step 10\n"
    )
    again = adopt(run)
    assert again.exit_code == 0
    assert again.stdout == "adopted 0 files; 3 described already; 1 other file left alone\n"


def test_json_tells_all(run: Path) -> None:
    (run / "log.txt").touch()
    flip(run / "ckpt_007.pth", payload_offset(run / "ckpt_007.pth", "data/0"))
    result = adopt(run, TEMPLATE, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert (document["dry_run"], document["described"], document["others"]) == (False, [], ["log.txt"])
    first, second, third = document["files"]
    assert first == {
        "path": f"{run}/ckpt_003.pth",
        "status": "adopted",
        "step": 3,
        "metrics": {},
        "sequence": 1,
        "error": None,
    }
    assert (second["status"], second["sequence"]) == ("refused", None)
    assert "record ckpt_007/data/0 (4000 bytes) is damaged" in second["error"]
    assert (third["status"], third["sequence"]) == ("adopted", 2)


def test_a_dry_run_checks_and_changes_nothing(run: Path) -> None:
    flip(run / "ckpt_007.pth", payload_offset(run / "ckpt_007.pth", "data/0"))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    result = adopt(run, TEMPLATE, "--dry-run")
    assert result.exit_code == 1
    assert "would adopt 2 files; 1 refused (--dry-run: nothing was changed)\n" in result.stdout
    assert "ckpt_007/data/0" in result.stderr
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def save_without_checksums(path: Path) -> None:
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save({"a": torch.ones(100)}, path)
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)


def save_legacy(path: Path) -> None:
    torch.save({"a": torch.ones(100)}, path, _use_new_zipfile_serialization=False)


def save_safetensors(path: Path) -> None:
    header = b"{}      "
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def save_truncated(path: Path) -> None:
    torch.save({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-10])


def save_script(path: Path) -> None:
    writer: Any = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", b"x", 1)
    writer.write_record("constants.pkl", b"x", 1)
    writer.write_end_of_file()


def save_with_damaged_description(path: Path) -> None:
    asyncckpt.save({}, path).committed.result()
    flip(path, payload_offset(path, ".asyncckpt.json"))


@pytest.mark.parametrize(
    ("save", "told"),
    [
        (save_without_checksums, "holds no checksums"),
        (save_legacy, "of the format that torch.save had before 1.6"),
        (save_safetensors, "it is a safetensors file"),
        (save_truncated, "it was cut off"),
        (save_script, "it is a TorchScript archive"),
        (save_with_damaged_description, "it has a description, which is damaged"),
    ],
)
def test_what_cannot_be_checked_is_refused_and_the_others_go_on(
    run: Path, save: Callable[[Path], None], told: str
) -> None:
    save(run / "ckpt_005.pth")
    before = (run / "ckpt_005.pth").read_bytes()
    result = adopt(run)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"asyncckpt: {run}/ckpt_005.pth")
    assert told in result.stderr
    assert (run / "ckpt_005.pth").read_bytes() == before
    assert checkpoints(run) == [(3, 1), (7, 2), (10, 3)]


def test_a_name_that_the_template_would_write_otherwise_is_refused(run: Path) -> None:
    torch.save({}, run / "ckpt_5.pth")
    result = adopt(run)
    assert result.exit_code == 1
    told = f"ckpt_5.pth: the template {TEMPLATE!r} gives step 5 another name"
    assert told in result.stderr
    assert "adopted 3 files; 1 refused\n" in result.stdout


def test_where_no_name_fits_it_says_what_there_is_and_guesses_a_template(run: Path) -> None:
    (run / "log.txt").touch()
    result = adopt(run, "step-{step}.pt")
    assert result.exit_code == 2
    there = "there are: ckpt_003.pth, ckpt_007.pth, ckpt_010.pth; try --filename 'ckpt_{step:03d}.pth'\n"
    assert result.stderr.endswith(there)
    assert adopt(run, "ckpt_{step}.pth").stderr.endswith(there)


def test_an_empty_directory_holds_no_file(tmp_path: Path) -> None:
    result = adopt(tmp_path)
    assert (result.exit_code, result.stderr) == (2, f"asyncckpt: {tmp_path} holds no file\n")


@pytest.mark.parametrize("template", ["last.pt", "{epoch}.pt", "{step", "a/{step}.pt"])
def test_a_template_that_shows_no_step_is_an_error(run: Path, template: str) -> None:
    result = adopt(run, template)
    assert result.exit_code == 2
    assert "--filename" in result.stderr


@pytest.mark.parametrize(
    ("names", "template"),
    [
        (["ckpt_003.pth"], "ckpt_{step:03d}.pth"),
        (["ckpt_003.pth", "ckpt_1000.pth"], "ckpt_{step:03d}.pth"),
        (["gpt2-100.pt", "gpt2-200.pt", "log.pt"], "gpt2-{step}.pt"),
        (["epoch=0-step=70.ckpt", "epoch=1-step=140.ckpt"], "epoch={epoch:.0f}-step={step}.ckpt"),
        (["step=70-epoch=0.ckpt", "step=140-epoch=1.ckpt"], "step={step}-epoch={epoch:.0f}.ckpt"),
        (["m_1_0.52.pt", "m_2_0.48.pt"], "m_{step}_{metric:.2f}.pt"),
        (["{1}.pt", "{2}.pt"], "{{{step}}}.pt"),
        (
            ["1-val_loss=0.5-0.25.pt", "2-val_loss=0.6-0.35.pt"],
            "{step}-val_loss={val_loss:.1f}-{metric:.2f}.pt",
        ),
        (["model.pt", "ema.pt"], None),
        ([".1.pt", ".2.pt"], None),
        ([], None),
    ],
)
def test_a_template_is_guessed(names: list[str], template: str | None) -> None:
    assert guess_template(names) == template


@given(st.lists(st.integers(0, 10**6), min_size=1, unique=True), st.sampled_from(["", ":03d", ":08d"]))
@settings(max_examples=50)
def test_a_guessed_template_makes_the_names_that_it_was_guessed_from(steps: list[int], width: str) -> None:
    names = [f"run_{format(step, width[1:])}.pt" for step in steps]
    template = guess_template(names)
    assert template is not None
    assert {NameTemplate(template).name(step, {}) for step in steps} == set(names)


def test_it_is_all_or_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any) -> Store:
        store = FaultyStore(open_store(*given))
        store.fail(
            "commit", StoreError(28, "no space", "the disk"), where=lambda name: name == "ckpt_007.pth"
        )
        return store

    before = (run / "ckpt_007.pth").read_bytes()
    monkeypatch.setattr(locations, "open_store", failing)
    result = adopt(run)
    assert result.exit_code == 2
    assert result.stderr == "asyncckpt: no space (the disk)\n"
    assert (run / "ckpt_007.pth").read_bytes() == before
    assert {path.name for path in run.iterdir()} == {f"ckpt_{step:03d}.pth" for step in (3, 7, 10)}
    monkeypatch.undo()
    assert "adopted 1 file; 2 described already\n" in adopt(run).stdout
    assert checkpoints(run) == [(3, 1), (10, 2), (7, 3)]


def test_a_file_that_is_replaced_meanwhile_stays(run: Path) -> None:
    path = run / "ckpt_003.pth"
    store = open_store(str(run))
    found = anyio.run(survey, store, NameParser(NameTemplate(TEMPLATE))).found[0]

    def save_again(_: int) -> None:
        torch.save({"newer": True}, run / "new")
        (run / "new").replace(path)

    with pytest.raises(asyncckpt.CheckpointNotFoundError):
        anyio.run(adopt_file, store, found, save_again)
    assert torch.load(path) == {"newer": True}


def test_a_file_that_is_gone_does_not_stop_the_others(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any) -> Store:
        store = FaultyStore(open_store(*given))
        gone = FileNotFoundError(2, "no such file", "it")
        store.fail("read", gone, times=None, where=lambda name: name == "ckpt_003.pth")
        return store

    monkeypatch.setattr(locations, "open_store", failing)
    result = adopt(run)
    assert result.exit_code == 0, result.output
    assert checkpoints(run) == [(7, 1), (10, 2)]


def test_a_remote_directory_is_adopted(run: Path) -> None:
    fsspec.filesystem("memory").put(f"{run}/*", f"{run}/")
    directory = f"memory://{run}"
    result = adopt(directory)
    assert result.exit_code == 0, result.output
    assert checkpoints(directory) == [(3, 1), (7, 2), (10, 3)]
    assert torch.equal(asyncckpt.load(f"{directory}/ckpt_007.pth")["weight"], torch.arange(1000.0) * 7)
    assert len(fsspec.filesystem("memory").ls(str(run))) == 3
