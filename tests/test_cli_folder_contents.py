"""Folders of many ranks in `inspect` and `diff`: of any number of ranks and any mesh, beside files."""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from fractions import Fraction
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from typer.testing import CliRunner

import asyncckpt
from asyncckpt._inspection import isolation
from asyncckpt.cli import inspecting_folder
from asyncckpt.cli.app import app
from asyncckpt.layout.folder_mark import seal
from folders import DATA, MARK, change_metadata, save_by_stock, save_described, some_state
from process_groups import on_ranks
from programs import Interpreter
from sharded_models import MODELS
from support import flip, run_python

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from typer.testing import Result

SAVED = {1: ["fsdp"], 2: ["fsdp", "tp"], 4: ["hsdp"]}
ALL = [f"{kind}-{ranks}" for ranks, kinds in SAVED.items() for kind in kinds]

# Each kind is saved by asyncckpt and by stock DCP, and once more with one element changed.
SAVE = """\
for kind in KINDS:
    model, opt = trained(kind, 1)
    state = {"model": model, "opt": opt, "step": 7, "betas": [0.9, 0.99]}
    with asyncckpt.Checkpointer(FOLDER, filename="{step}-" + f"{kind}-{ranks}", sharded=True) as ckpt:
        ckpt.save(1, state)
    states = dict(zip(("model", "opt"), get_state_dict(model, opt)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "up.weight" and rank in {ranks - 1, ranks - 3}:  # the same part of each replica
                shard = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                if shard.numel():
                    shard.view(-1)[-1] += 1
    dcp.save({**states, "step": 8, "betas": [0.9, 0.99]}, checkpoint_id=f"{FOLDER}/2-{kind}-{ranks}")
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def document(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.stderr == ""
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of the same state, saved by several numbers of ranks."""
    path = tmp_path_factory.mktemp("saved")
    with Interpreter() as interpreter:
        for ranks, kinds in SAVED.items():
            body = f"FOLDER, KINDS = {str(path)!r}, {kinds!r}\n{MODELS}{SAVE}"
            on_ranks(interpreter, tmp_path_factory.mktemp("ranks"), body, ranks=ranks)
        yield path


@pytest.mark.parametrize(("one", "other"), [*combinations(ALL, 2)])
def test_same_state_of_other_ranks_and_meshes_is_equal(saved: Path, one: str, other: str) -> None:
    found = document("diff", saved / f"1-{one}", saved / f"1-{other}")
    assert found["same"], found
    assert found["equal_tensors"] > 20


@pytest.mark.parametrize("other", ALL)
def test_one_changed_element_is_found_whatever_part_it_is_in(saved: Path, other: str) -> None:
    found = document("diff", saved / "1-fsdp-1", saved / f"2-{other}")
    assert [(row["path"], row["what"], row["a"], row["b"]) for row in found["differences"]] == [
        (["step"], "value", {"value": 7}, {"value": 8})
    ]
    (changed,) = found["tensors"]
    assert (changed["path"], changed["elements"]) == (["model", "up.weight"], 42)
    assert changed["differing"] == 1
    assert changed["max_abs"] == pytest.approx(1)


@pytest.mark.parametrize("other", ALL)
def test_folder_is_equal_to_the_file_that_stock_conversion_makes(
    saved: Path, tmp_path: Path, other: str
) -> None:
    dcp_to_torch_save(saved / f"1-{other}", tmp_path / "whole.pt")
    assert document("diff", saved / f"1-{other}", tmp_path / "whole.pt")["same"]
    assert document("diff", tmp_path / "whole.pt", saved / f"1-{other}")["same"]


def test_parts_and_ranks_are_shown(saved: Path) -> None:
    found = document("inspect", saved / "1-hsdp-4")
    assert (found["written_by"], found["ranks"], found["step"]) == ("asyncckpt", 4, 1)
    assert [file["name"] for file in found["files"]] == [f"__{rank}_0.distcp" for rank in range(4)]
    row = next(row for row in found["tensors"] if row["path"] == ["model", "up.weight"])
    assert (row["dtype"], row["shape"], row["nbytes"]) == ("float32", [7, 6], 168)
    assert [(part["offsets"], part["shape"]) for part in row["parts"]] == [([0, 0], [4, 6]), ([4, 0], [3, 6])]
    assert found["total"]["tensors"] == len(found["tensors"])
    assert {tuple(row["path"]): row.get("value") for row in found["values"]}["step",] == 7
    assert found["refused_by_weights_only"] == []
    shown = run("inspect", saved / "1-hsdp-4").stdout
    assert "\n  ranks       4\n" in shown
    line = next(line for line in shown.splitlines() if line.startswith("model.up.weight "))
    assert line.split() == ["model.up.weight", "float32", "7", "x", "6", "168", "B", "2"]


def test_names_that_weights_only_refuses_are_listed(tmp_path: Path) -> None:
    path = save_by_stock(tmp_path / "saved", {"w": torch.ones(2), "share": Fraction(1, 3), "n": [1, "x"]})
    found = document("inspect", path)
    assert found["refused_by_weights_only"] == ["fractions.Fraction"]
    assert found["written_by"] == "torch.distributed.checkpoint"
    assert [row["path"] for row in found["values"]] == [["share"], ["n"]]
    assert "weights_only=True refuses this checkpoint because of:\n  fractions.Fraction" in run(
        "inspect", path
    ).stdout.replace("\x1b", "")


def test_tensors_in_objects_are_shown_and_compared(tmp_path: Path) -> None:
    def state(value: float) -> dict[str, Any]:
        return {
            "w": torch.ones(2),
            "pair": (torch.full((3,), value), torch.zeros(1)),
            "more": (torch.ones(1),),
        }

    a, b = save_by_stock(tmp_path / "a", state(1.0)), save_by_stock(tmp_path / "b", state(2.0))
    rows = {tuple(row["path"]): row for row in document("inspect", a)["tensors"]}
    assert rows["pair", 0]["shape"] == [3]
    found = document("diff", a, b)
    (changed,) = found["tensors"]
    assert (changed["path"], changed["differing"], changed["max_abs"]) == (["pair", 0], 3, 1.0)
    assert found["equal_tensors"] == 3


def test_large_objects_are_named_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspecting_folder, "_LARGEST", 5_000)
    path = save_by_stock(tmp_path / "saved", {"w": torch.ones(2), "text": "x" * 10_000, "step": 1})
    found = document("inspect", path)
    assert [row["path"] for row in found["values"]] == [["step"]]
    (left,) = found["too_large"]
    assert left["path"] == ["text"]
    assert "too large to look at: text, 11." in run("inspect", path).stdout


def test_what_a_folder_cannot_keep_is_no_difference_to_a_file(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    state = {
        "model": OrderedDict(a=shared, b=shared, c=torch.nn.Parameter(torch.ones(2))),
        "opt": {"state": {0: {"step": torch.tensor(1.0)}, 1: {}}, "groups": [{"lr": 0.1, "betas": (0.9, 1)}]},
        "nothing": {},
        "list": [torch.ones(1), {"x": 1}],
    }
    path = save_by_stock(tmp_path / "saved", state)
    asyncckpt.save(state, tmp_path / "file.pt")
    asyncckpt.wait()
    assert document("diff", path, tmp_path / "file.pt")["same"]
    torch.save({**state, "nothing": {"a": 1}, "extra": 1}, tmp_path / "other.pt")
    found = document("diff", path, tmp_path / "other.pt")
    assert [(row["path"], row["what"]) for row in found["differences"]] == [
        (["nothing"], "only in B"),
        (["extra"], "only in B"),
    ]


def test_shapes_and_dtypes_of_folders_are_compared(tmp_path: Path) -> None:
    a = save_by_stock(tmp_path / "a", {"x": torch.ones(2, 3), "y": torch.ones(4), "z": torch.ones(0, 3)})
    b = save_by_stock(
        tmp_path / "b", {"x": torch.ones(3, 2), "y": torch.ones(4).double(), "z": torch.ones(0, 3)}
    )
    found = document("diff", a, b)
    assert [(row["path"], row["what"]) for row in found["differences"]] == [
        (["x"], "shape"),
        (["y"], "dtype"),
    ]
    assert found["equal_tensors"] == 2


def test_item_of_another_save_is_an_error(tmp_path: Path) -> None:
    a = save_by_stock(tmp_path / "a", {"x": torch.ones(4)})
    b, c = (save_by_stock(tmp_path / name, {"x": torch.ones(2, 2)}) for name in "bc")
    (b / DATA).write_bytes((a / DATA).read_bytes())

    def fit(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.length = (a / DATA).stat().st_size

    change_metadata(b, fit)
    result = run("diff", b, c)
    assert result.exit_code == 2
    assert f"{b / DATA}, item x holds float32 [4] instead of float32 [2, 2]" in result.stderr


def test_damaged_items_are_errors_that_name_them(tmp_path: Path) -> None:
    path = save_by_stock(tmp_path / "a", {"x": torch.ones(4), "n": 5})
    data = (path / DATA).read_bytes()
    flip(path / DATA, data.index(b"K\x05"))
    result = run("inspect", path)
    assert result.exit_code == 2
    assert f"{path / DATA}, item n" in result.stderr
    (path / DATA).write_bytes(data[:-1])
    for command in (["inspect"], ["diff", path]):
        result = run(*command, path)
        assert result.exit_code == 2
        assert str(path) in result.stderr


def test_folder_of_more_files_than_a_process_opens_by_default(tmp_path: Path) -> None:
    script = """
        import resource, sys, warnings
        warnings.simplefilter("ignore")
        import torch
        import torch.distributed.checkpoint as dcp
        from asyncckpt.cli.app import app
        from typer.testing import CliRunner

        state = {f"w{n}": torch.full((3,), float(n)) for n in range(80)}
        for name in ("a", "b"):  # a file for each item
            writer = dcp.FileSystemWriter(f"{sys.argv[1]}/{name}", single_file_per_rank=False)
            dcp.save(state, storage_writer=writer, no_dist=True)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, most))
        result = CliRunner().invoke(app, ["diff", f"{sys.argv[1]}/a", f"{sys.argv[1]}/b"])
        assert result.stdout.startswith("the same\\n80 tensors equal"), result.output
    """
    status, _, errors = run_python(script, str(tmp_path))
    assert status == 0, errors


@pytest.mark.parametrize("name", [MARK, DATA])
def test_whatever_byte_is_damaged_the_result_is_a_document_or_an_error(tmp_path: Path, name: str) -> None:
    path, good = save_by_stock(tmp_path / "a", some_state()), save_by_stock(tmp_path / "b", some_state())
    content = (path / name).read_bytes()
    for offset in range(0, len(content), len(content) // 12):
        flip(path / name, offset, offset % 8)
        for command in (["inspect", path], ["diff", path, good]):
            result = run(*command)
            assert isinstance(result.exception, SystemExit) or result.exception is None, (offset, result)
            assert result.exit_code != 2 or str(path) in result.stderr, (offset, result.output)
        (path / name).write_bytes(content)


def hostile_mark() -> bytes:
    """Return a pickle with a key whose hash takes 2 ** 101 steps."""
    tower = b"".join(struct.pack("<cBcBcBB", b"h", i, b"h", i, b"\x86", 0x71, i + 1) for i in range(101))
    return b"\x80\x02}(K\x01\x85q\x00" + tower + b"u."


@pytest.mark.parametrize("command", ["verify", "inspect", "diff", "prune"])
def test_metadata_that_would_take_forever_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(isolation, "SECONDS", 1)
    path = save_described(tmp_path, 1, {"x": torch.ones(4)})
    mark = path / MARK
    sealed = mark.read_bytes()
    description = sealed[sealed.index(b'{"format"') : sealed.rindex(b"}") + 1]
    mark.write_bytes(seal(hostile_mark(), description))
    more: dict[str, list[Any]] = {"diff": [path], "prune": ["--keep", "last:1", "--verify"]}
    result = run(command, tmp_path if command == "prune" else path, *more.get(command, []))
    assert result.exit_code in {1, 2}
    assert f"{path}: its .metadata of {len(hostile_mark())} bytes cannot be looked at in" in result.output
