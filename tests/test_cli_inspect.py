"""`asyncckpt inspect`: the contents of a file are shown, and nothing in it is executed."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict, defaultdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
from typer.testing import CliRunner

import asyncckpt
from asyncckpt import Checkpointer
from asyncckpt._inspection.refusals import refused_globals
from asyncckpt.cli import locations
from asyncckpt.cli.app import app
from asyncckpt.layout.torch_zip import lay_out, plan
from asyncckpt.stores import open_store
from asyncckpt.testing import FaultyStore
from strangers import malicious, pickled_text, register_system, write_file

if TYPE_CHECKING:
    from typer.testing import Result

    from asyncckpt.stores.base import Store

places = count()


def inspect(path: object, *options: str) -> Result:
    return CliRunner().invoke(app, ["inspect", str(path), *options])


def shown(path: object, *options: str) -> str:
    result = inspect(path, *options)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def document(path: object, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shown(path, "--json", *options))
    return found


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """Return the rows of a table by their first column; columns are two spaces apart."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.startswith(heading))
    found = {}
    for line in lines:
        name, *cells = [cell.strip() for cell in line.split("  ") if cell.strip()] or [""]
        if not cells:
            break
        found[name] = cells
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of a model with tied weights, its optimizer, and some values."""
    base = torch.zeros(10, 20)
    model = OrderedDict(
        {
            "embed.weight": base,
            "body.0.weight": torch.zeros(4, 5),
            "body.1.bias": torch.zeros(7),
            "head.weight": base,
        }
    )
    state = {
        "model": model,
        "opt": {
            "state": {0: {"exp_avg": torch.zeros(3, 2).t()}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}],
        },
        "part": torch.arange(100)[10:20],
        "weight": torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)),
        "step": 12,
        "name": "run [bold]",
    }
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(5, state, metrics={"val_loss": 0.5})
    return tmp_path / "step-00000005.pt"


def test_the_header_tells_of_the_file(path: Path) -> None:
    head = shown(path).partition("\ntensor")[0].splitlines()
    nbytes = path.stat().st_size
    assert head[0].startswith(f"{path}  {nbytes / 1000:.2f} kB ({nbytes:,} bytes)")
    facts = {line.split()[0]: line for line in head[1:]}
    assert (
        f"asyncckpt (asyncckpt {asyncckpt.__version__}, torch {torch.__version__}, python" in facts["written"]
    )
    assert facts["step"].split()[1] == "5"
    assert facts["metrics"].endswith("val_loss 0.5")
    assert "epoch" not in facts
    assert "created" in facts


def test_tensors_are_shown_with_what_is_special_about_them(path: Path) -> None:
    text = shown(path)
    assert rows(text, "tensor") == {
        "model.embed.weight": ["float32", "10 x 20", "800 B", "shares storage with model.head.weight"],
        "model.body.0.weight": ["float32", "4 x 5", "80 B"],
        "model.body.1.bias": ["float32", "7", "28 B"],
        "model.head.weight": ["float32", "10 x 20", "800 B", "shares storage with model.embed.weight"],
        "opt.state.0.exp_avg": ["float32", "2 x 3", "24 B", "stride 1, 2"],
        "part": ["int64", "10", "80 B", "view of a storage of 100 elements"],
        "weight": ["bfloat16", "2", "4 B", "requires grad, Parameter"],
    }
    assert "\n7 tensors of 445 elements, 1.82 kB, on 6 storages of 1.74 kB\n" in text


def test_modules_are_summed_up_to_the_depth(path: Path) -> None:
    flat = {"model": ["4", "427", "1.71 kB"], "opt": ["1", "6", "24 B"]}
    below = {"embed": ["1", "200", "800 B"], "body": ["2", "27", "108 B"], "head": ["1", "200", "800 B"]}
    state = {"state": ["1", "6", "24 B"]}
    lowest = {"0": ["1", "6", "24 B"], "1": ["1", "7", "28 B"]}
    assert rows(shown(path, "--depth", "0"), "module") == flat
    assert rows(shown(path, "--depth", "1"), "module") == flat | below | state
    assert rows(shown(path), "module") == flat | below | state | lowest
    sums = {tuple(row["path"]): row["elements"] for row in document(path, "--depth", "1")["modules"]}
    assert sums[("model", "body")] == 27
    assert ("model", "body", "0") not in sums


def test_values_are_shown(path: Path) -> None:
    assert rows(shown(path), "entry") == {
        "opt.param_groups.0.lr": ["0.1"],
        "opt.param_groups.0.betas": ["(0.9, 0.99)"],
        "step": ["12"],
        "name": ["'run [bold]'"],
    }


def test_json_has_all_of_it(path: Path) -> None:
    found = document(path)
    assert (found["path"], found["nbytes"], found["written_by"]) == (
        str(path),
        path.stat().st_size,
        "asyncckpt",
    )
    assert (found["step"], found["metrics"], found["sequence"]) == (5, {"val_loss": 0.5}, 1)
    tensors = {tuple(row["path"]): row for row in found["tensors"]}
    tied = [tensors["model", name]["storage"] for name in ("embed.weight", "head.weight")]
    assert tied[0] == tied[1]
    assert tensors["opt", "state", 0, "exp_avg"] == {
        "path": ["opt", "state", 0, "exp_avg"],
        "dtype": "float32",
        "shape": [2, 3],
        "nbytes": 24,
        "kind": "torch.Tensor",
        "requires_grad": False,
        "storage": tensors["opt", "state", 0, "exp_avg"]["storage"],
        "location": "cpu",
        "offset": 0,
        "stride": [1, 2],
        "contiguous": False,
        "in_file": True,
    }
    assert found["total"] == {
        "tensors": 7,
        "elements": 445,
        "nbytes": 1816,
        "storages": 6,
        "storage_nbytes": 1736,
    }
    assert {"path": ["step"], "value": 12} in found["values"]
    assert {"path": ["opt", "param_groups", 0, "betas"], "text": "(0.9, 0.99)"} in found["values"]
    assert found["refused_by_weights_only"] == []


def test_long_tables_are_cut_unless_all_is_wanted(tmp_path: Path) -> None:
    state = {f"w{n}": torch.zeros(1) for n in range(60)} | {f"v{n}": n for n in range(51)}
    torch.save(state, tmp_path / "x.pt")
    text = shown(tmp_path / "x.pt")
    assert "w49" in text
    assert "w50" not in text
    assert "… and 10 more; --all shows them\n60 tensors" in text
    assert "… and 1 more; --all shows them" in text
    torch.save(dict(list(state.items())[10:110]), tmp_path / "y.pt")
    assert "--all" not in shown(tmp_path / "y.pt")  # 50 of each
    everything = shown(tmp_path / "x.pt", "--all")
    assert len(rows(everything, "tensor")) == 60
    assert "--all" not in everything
    assert len(document(tmp_path / "x.pt")["tensors"]) == 60


def test_remote_files_are_shown(path: Path) -> None:
    url = f"memory://inspect-{next(places)}/run/x.pt"
    fsspec.filesystem("memory").pipe_file(url, path.read_bytes())
    assert document(url)["tensors"] == document(path)["tensors"]
    assert document(url)["path"] == url


def test_tied_weights_of_many_are_counted(tmp_path: Path) -> None:
    base = torch.zeros(12)
    torch.save({"all": base, **{f"part{n}": base[n : n + 4] for n in range(3)}}, tmp_path / "x.pt")
    found = rows(shown(tmp_path / "x.pt"), "tensor")
    assert found["part1"][-1] == "shares storage with all and 2 more, view of a storage of 12 elements"
    assert found["all"][-1] == "shares storage with part0 and 2 more"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("how", malicious(Path()))
def test_a_malicious_file_is_shown_as_such_and_does_nothing(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_system(monkeypatch)
    mark = tmp_path / "mark"
    path = write_file(tmp_path / "x.pt", malicious(mark)[how])
    if how == "EXT":
        assert "unregistered extension code 247" in inspect(path).stderr
    else:
        warning = shown(path).partition("torch.load(weights_only=True) refuses this file because of:\n")[2]
        named = {"os.system", "builtins.eval", "strangers.Making"}
        assert named.intersection(line.strip() for line in warning.splitlines())
        assert named.intersection(document(path)["refused_by_weights_only"])
    other = write_file(tmp_path / "y.pt", b"N.")
    for command in (["ls", str(tmp_path)], ["diff", str(path), str(other)], ["diff", str(path), str(path)]):
        assert CliRunner().invoke(app, command).exit_code in ({0, 2} if how == "EXT" else {0, 1})
    assert not mark.exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_what_torch_refuses_is_what_torch_itself_refuses() -> None:
    good = ["torch._utils._rebuild_tensor_v2", "collections.OrderedDict", "torch.float32", "builtins.set"]
    bad = [
        "posix.system",
        "builtins.eval",
        "__builtin__.eval",
        "a\nb.c",
        "ünï.x",
        "torch.hub.load",
        "\ud800.x",
    ]
    assert refused_globals([*good, *bad]) == bad
    assert refused_globals(good) == []
    assert refused_globals([]) == []
    with torch.serialization.safe_globals([Checkpointer]):
        assert refused_globals(["asyncckpt.checkpointer.Checkpointer", "posix.system"]) == ["posix.system"]


def test_an_object_is_one_line_and_its_tensors_are_found(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(2, 3), "path": tmp_path, "after": 1}, tmp_path / "x.pt")
    text = shown(tmp_path / "x.pt")
    assert rows(text, "tensor").keys() == {"model._parameters.weight", "model._parameters.bias"}
    values = rows(text, "entry")
    assert values.keys() == {"model", "path", "after"}
    assert values["model"][0].startswith("torch.nn.modules.linear.Linear(training=True")
    assert "\n  torch.nn.modules.linear.Linear\n" in text


def test_what_torch_notes_about_modules_is_no_value(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(3)))
    torch.save(
        {"model": model.state_dict(), "default": defaultdict(int, a=5), "_metadata": 1}, tmp_path / "x.pt"
    )
    values = rows(shown(tmp_path / "x.pt"), "entry")
    assert values.keys() == {"default", "default.a", "_metadata"}


def test_long_keys_are_shortened_in_tables(tmp_path: Path) -> None:
    key = "callback(" + "x" * 200 + ")last"
    torch.save({key: {"score": torch.ones(1), "n": 1}}, tmp_path / "x.pt")
    text = shown(tmp_path / "x.pt")
    assert max(map(len, text.splitlines())) < 150
    assert text.count("callback(xxx") == 3
    assert text.count("xxx)last") == 3
    assert document(tmp_path / "x.pt")["tensors"][0]["path"] == [key, "score"]


def test_what_a_stranger_writes_does_not_reach_the_terminal_as_it_is(tmp_path: Path) -> None:
    evil = "\x1b[2J"
    description = {
        "format": 1,
        "sequence": 1,
        "step": 1,
        "metrics": {evil: 1.0},
        "created": 1e300,
        "versions": {evil: evil},
    }
    pickled = (
        b"\x80\x02}"
        + pickled_text(evil)
        + b"K\x05s"
        + pickled_text("b")
        + pickled_text(evil)
        + b"scos\nx"
        + evil.encode()
        + b"\n0."
    )
    made = plan(lay_out([]), pickled, json.dumps(description).encode())
    (tmp_path / "x.pt").write_bytes(b"".join(data for _, data in made.literals) + made.tail)
    text = shown(tmp_path / "x.pt")
    assert "\x1b" not in text
    assert text.count("\\x1b[2J") == 6
    assert "1e+300 seconds since the epoch" in text
    assert document(tmp_path / "x.pt")["values"][0] == {"path": [evil], "value": 5}


def test_tensors_that_are_not_in_the_file_are_marked(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4), "v": torch.zeros(2)}, tmp_path / "x.pt")
    reader: Any = torch._C.PyTorchFileReader(str(tmp_path / "x.pt"))
    path = write_file(tmp_path / "y.pt", reader.get_record("data.pkl"), bytes(8))
    text = shown(path)
    assert rows(text, "tensor") == {
        "w": ["float32", "4", "16 B", "incomplete in the file"],
        "v": ["float32", "2", "8 B", "incomplete in the file"],
    }
    assert [row["in_file"] for row in document(path)["tensors"]] == [False, False]


def test_another_byte_order_and_unknown_dtypes_are_told(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4, dtype=torch.float8_e5m2)}, tmp_path / "x.pt")
    reader: Any = torch._C.PyTorchFileReader(str(tmp_path / "x.pt"))
    pickled = reader.get_record("data.pkl").replace(b"float8_e5m2", b"float8_new1")
    path = write_file(tmp_path / "y.pt", pickled, bytes(4), byteorder="big")
    text = shown(path)
    assert "  byte order  big\n" in text
    assert rows(text, "tensor")["w"][:3] == ["float8_new1", "4", "?"]
    assert document(path)["tensors"][0]["nbytes"] is None


@pytest.mark.parametrize("state", [5, torch.ones(2), [], {}])
def test_a_state_need_not_be_a_dict(state: object, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "x.pt")
    found = document(tmp_path / "x.pt")
    assert len(found["tensors"]) + len(found["values"]) == 1
    shown(tmp_path / "x.pt")


def test_what_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    result = inspect(tmp_path / "x.pt", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"asyncckpt: {tmp_path / 'x.pt'}: it is an HDF5 file: read it with h5py\n"
    absent = inspect(tmp_path / "absent.pt")
    assert absent.exit_code == 2
    assert "there is no file" in absent.stderr


def test_a_state_that_is_nested_without_end_is_an_error(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.pt", b"]" * 20_000 + b"a" * 19_999 + b".")
    result = inspect(path)
    assert result.exit_code == 2
    assert result.stderr == f"asyncckpt: {path}: its state is nested too deep to be looked at\n"


@pytest.mark.parametrize("command", [["inspect"], ["diff", "b.pt"]])
def test_a_file_that_vanishes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def failing(*given: Any) -> Store:
        store = FaultyStore(open_store(*given))
        gone = FileNotFoundError(2, "no such file", "a.pt")
        store.fail("read", gone, times=None, where=lambda name: name == "a.pt")
        return store

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locations, "open_store", failing)
    for name in ("a.pt", "b.pt"):
        torch.save({}, name)
    result = CliRunner().invoke(app, [*command, "a.pt"])
    assert result.exit_code == 2
    assert result.stderr.startswith("asyncckpt: ")
    assert "a.pt" in result.stderr
