"""`asyncckpt diff`: whether two files hold the same, and if not, in what they differ and how much."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import OrderedDict
from itertools import count
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import asyncckpt
from asyncckpt._inspection import isolation, tensor_values
from asyncckpt._inspection.contents import read_records
from asyncckpt._inspection.tensor_values import difference
from asyncckpt.cli.app import app
from states import DTYPES
from strangers import pickled_text, write_file

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

    from asyncckpt.stores.base import OpenFile

places = count()
nan, inf = math.nan, math.inf


def diff(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["diff", *map(str, arguments)])


def differing(a: object, b: object, tmp_path: Path) -> dict[str, Any]:
    """Return what differs between two states; the exit status says whether anything does."""
    torch.save(a, tmp_path / "a.pt")
    torch.save(b, tmp_path / "b.pt")
    return document(tmp_path / "a.pt", tmp_path / "b.pt")


def document(a: object, b: object) -> dict[str, Any]:
    result = diff(a, b, "--json")
    assert result.exit_code in {0, 1}, result.output
    assert result.stderr == ""
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["same"] == (result.exit_code == 0)
    assert found["same"] == (not found["differences"] and not found["tensors"] and not found["sharing"])
    return found


def values(found: dict[str, Any]) -> dict[str, tuple[int, Any, Any]]:
    rows = {row["path"][-1]: row for row in found["tensors"]}
    return {name: (row["differing"], row["max_abs"], row["relative"]) for name, row in rows.items()}


def test_what_asyncckpt_and_torch_save_is_the_same(tmp_path: Path) -> None:
    base = torch.randn(3, 4)
    state: dict[str, Any] = {
        "model": OrderedDict(a=base, b=base.t(), c=base[1:, ::2]),
        "dtypes": [
            torch.zeros(2, 16, dtype=torch.uint8).view(dtype) for dtype in DTYPES if dtype != torch.complex32
        ],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "module": torch.nn.Linear(2, 3),
        "plain": [1, 2.5, nan, "x", b"y", None, (True, 1j), {"a"}, {1: {2}}, range(3), tmp_path],
        "scalar": torch.tensor(nan),
        "empty": torch.empty(0, 3),
    }
    torch.save(state, tmp_path / "a.pt")
    asyncckpt.save(state, tmp_path / "b.pt")
    asyncckpt.wait()
    found = document(tmp_path / "a.pt", tmp_path / "b.pt")
    assert found["same"]
    assert found["equal_tensors"] == 9 + len(state["dtypes"])
    assert found["nans_in_both"] == 1
    text = diff(tmp_path / "a.pt", tmp_path / "b.pt").stdout
    assert text.startswith("the same\n")
    assert "1 element NaN in both files (counted as equal)" in text


def test_entries_that_differ_are_told(tmp_path: Path) -> None:
    a = {
        "same": 1, "gone": {"x": 1}, "step": 3, "type": 1, "flag": True, "kind": {"a": 1}, "list": [1, 2, 3],
        "long": list(range(20)), "shape": torch.ones(2, 3), "dtype": torch.ones(2), "size": torch.Size([2]),
        "deep": {"er": [{"x": "a"}]}, "object": torch.device("cpu"), "class": torch.float32, "bytes": b"a",
        1: "int", "parameter": torch.nn.Parameter(torch.ones(2)), "set": {1, 2}, "longer": [1],
    }  # fmt: skip
    b = {
        "same": 1, "step": 4, "type": 1.0, "flag": 1, "kind": [1], "list": [1, 2, 4], "new": torch.ones(3),
        "long": [*range(19), 0], "shape": torch.ones(3, 2), "dtype": torch.ones(2).half(),
        "deep": {"er": [{"x": "b"}]}, "object": torch.device("cuda", 0), "class": torch.int8, "bytes": b"b",
        "size": torch.Size([3]), "1": "int", "parameter": torch.ones(2), "set": {1, 3}, "longer": [1, 2],
    }  # fmt: skip
    found = differing(a, b, tmp_path)
    told = {
        ".".join(map(repr, row["path"])): (row["what"], *(row.get(side) for side in ("a", "b")))
        for row in found["differences"]
    }
    assert told == {
        "'gone'": ("only in A", {"text": "{'x': 1}"}, None),
        "'new'": ("only in B", None, {"text": "torch.Tensor(float32, [3])"}),
        "'step'": ("value", {"value": 3}, {"value": 4}),
        "'type'": ("value", {"value": 1}, {"value": 1.0}),
        "'flag'": ("value", {"value": True}, {"value": 1}),
        "'kind'": ("kind", {"value": "dict"}, {"value": "list"}),
        "'list'": ("value", {"value": [1, 2, 3]}, {"value": [1, 2, 4]}),
        "'long'.19": ("value", {"value": 19}, {"value": 0}),
        "'longer'": ("value", {"value": [1]}, {"value": [1, 2]}),
        "'shape'": ("shape", {"value": [2, 3]}, {"value": [3, 2]}),
        "'dtype'": ("dtype", {"value": "float32"}, {"value": "float16"}),
        "'deep'.'er'.0.'x'": ("value", {"value": "a"}, {"value": "b"}),
        "'object'.'args'": ("value", {"text": "('cpu',)"}, {"text": "('cuda', 0)"}),
        "'class'": ("value", {"text": "torch.float32"}, {"text": "torch.int8"}),
        "'bytes'": ("value", {"text": "b'a'"}, {"text": "b'b'"}),
        "'size'.'args'.0": ("value", {"text": "(2,)"}, {"text": "(3,)"}),
        "1": ("only in A", {"value": "int"}, None),
        "'1'": ("only in B", None, {"value": "int"}),
        "'parameter'": ("kind", {"value": "parameter"}, {"value": "tensor"}),
        "'set'": ("value", {"text": "{1, 2}"}, {"text": "{1, 3}"}),
    }
    assert found["tensors"] == []
    table = diff(tmp_path / "a.pt", tmp_path / "b.pt")
    assert table.exit_code == 1
    assert "\ndifferent\n" in table.stdout
    lines = {line.split()[0]: line.split() for line in table.stdout.splitlines() if line}
    assert lines["deep.er.0.x"][1:] == ["value", "'a'", "'b'"]
    assert lines["shape"][1:] == ["shape", "(2,", "3)", "(3,", "2)"]
    assert lines["kind"][1:] == ["kind", "dict", "list"]


def test_values_of_tensors_are_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a = {
        "one": torch.ones(10, 10),
        "many": torch.randn(1000),
        "layout": torch.randn(30, 40),
        "int": torch.tensor([2**62, 5]),
        "uint": torch.tensor([1, 2]).to(torch.uint64),
        "bool": torch.tensor([True, False, True]),
        "half": torch.ones(4, dtype=torch.bfloat16),
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
        "complex": torch.zeros(3, dtype=torch.complex64),
        "zero": torch.zeros(2),
        "expanded": torch.ones(1, 3).expand(1000, 3),
        "minus": torch.tensor([0.0]),
        "mixed": torch.tensor([1.0, 2.0]),
    }
    b = {name: tensor.clone() for name, tensor in a.items()}
    b["one"][3, 4] += 0.5
    b["many"] += 1e-3
    b["layout"] = b["layout"].t().contiguous().t()
    b["layout"][7, 8] += 1
    b["int"][0] += 1
    b["uint"][1] = 5
    b["bool"][0] = False
    b["half"][2] = 3
    b["fp8"][:2] = 2
    b["complex"][1] = torch.tensor(3 - 4j)
    b["zero"][0] = 1
    b["expanded"] = torch.tensor([[1.0, 1.0, 3.0]]).expand(1000, 3)
    b["minus"] = -b["minus"]
    b["mixed"] = torch.tensor([1.0, 2.5], dtype=torch.float64)
    found = differing(a, b, tmp_path)
    assert [row["what"] for row in found["differences"]] == ["dtype"]
    moved = float((b["many"].double() - a["many"].double()).abs().max())
    relative = float((b["many"].double() - a["many"].double()).norm() / a["many"].double().norm())
    assert values(found) == {
        "one": (1, 0.5, 0.05),
        "many": (1000, pytest.approx(moved), pytest.approx(relative)),
        "layout": (1, pytest.approx(1), pytest.approx(1 / float(a["layout"].norm()))),
        "int": (1, 1, pytest.approx(2**-62)),
        "uint": (1, 3, pytest.approx(3 / math.sqrt(5))),
        "bool": (1, 1, pytest.approx(math.sqrt(0.5))),
        "half": (1, 2, 1),
        "fp8": (2, 1, pytest.approx(math.sqrt(0.5))),
        "complex": (1, 5, "Infinity"),
        "zero": (1, 1, "Infinity"),
        "expanded": (1000, 2, pytest.approx(2 / math.sqrt(3))),
        "mixed": (1, 0.5, pytest.approx(0.5 / math.sqrt(5))),
    }
    assert found["equal_tensors"] == 1  # 0.0 and -0.0
    text = diff(tmp_path / "a.pt", tmp_path / "b.pt").stdout
    assert "1 tensor equal, 12 different" in text
    row = next(line for line in text.splitlines() if line.startswith("expanded"))
    assert row.split()[1:] == ["1,000", "3,000", "2", "1.1547"]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([nan, 1.0, inf], [nan, 1.0, inf], None),
        ([nan, 1.0, inf], [nan, 3.0, inf], (1, 2.0, 2.0)),
        ([nan, 3.0], [1.0, 3.0], (1, "NaN", 0.0)),
        ([inf, 1.0], [-inf, 1.0], (1, "Infinity", 0.0)),
        ([inf, 4.0], [1.0, 5.0], (2, "Infinity", 0.25)),
        ([1e300, 1.0], [1e300, 2.0], (1, 1.0, 0.0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_what_is_not_finite_is_compared(
    a: list[float],
    b: list[float],
    expected: tuple[int, Any, float] | None,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    found = differing({"x": torch.tensor(a, dtype=dtype)}, {"x": torch.tensor(b, dtype=dtype)}, tmp_path)
    assert values(found).get("x") == expected
    assert found["nans_in_both"] == (1 if b[0] is nan else 0)


@pytest.mark.parametrize("kind", ["qint8", "bits8"])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_has_no_numbers_is_compared_by_its_bytes(kind: str, tmp_path: Path) -> None:
    def made(*numbers: int) -> torch.Tensor:
        if kind == "bits8":
            return torch.tensor(numbers).byte().view(torch.bits8)
        return torch.quantize_per_tensor(torch.tensor(numbers).float(), 1.0, 0, torch.qint8)

    assert differing([made(1, 2, 3)], [made(1, 2, 3)], tmp_path)["same"]
    found = differing([made(1, 2, 3)], [made(1, 5, 4)], tmp_path)
    assert [(row["differing"], row["max_abs"], row["relative"]) for row in found["tensors"]] == [
        (2, None, None)
    ]
    row = next(
        line for line in diff(tmp_path / "a.pt", tmp_path / "b.pt").stdout.splitlines() if line[0] == "0"
    )
    assert row.split()[1:] == ["2", "3", "-", "-"]
    if kind == "bits8":
        repeated = [made(1, 2).expand(10, 2)], [made(1, 3).expand(10, 2)]
        assert differing(*repeated, tmp_path)["tensors"][0]["differing"] == 10


def test_conjugated_and_negated_views_have_other_values(tmp_path: Path) -> None:
    x = torch.tensor([1 + 2j, 3 - 1j])
    assert differing([x.conj()], [x.conj().resolve_conj()], tmp_path)["same"]
    assert differing([x.conj().imag], [x.conj().imag.resolve_neg()], tmp_path)["same"]
    assert differing([x.conj()], [x], tmp_path)["tensors"][0]["max_abs"] == 4
    assert differing([x.imag.clone()], [x.conj().imag], tmp_path)["tensors"][0]["max_abs"] == 4


def test_sharing_is_compared(tmp_path: Path) -> None:
    base = torch.ones(6)
    tied = {"a": base, "b": base[:3], "c": torch.ones(2), "empty": base[:0]}
    untied = {**tied, "b": torch.ones(3), "empty": torch.empty(0)}
    assert differing(tied, tied, tmp_path)["same"]
    assert differing(tied, untied, tmp_path)["sharing"] == [{"shared_in": "A", "paths": [["a"], ["b"]]}]
    assert differing(untied, tied, tmp_path)["sharing"] == [{"shared_in": "B", "paths": [["a"], ["b"]]}]
    text = diff(tmp_path / "a.pt", tmp_path / "b.pt")
    assert text.exit_code == 1
    assert "share memory in B only: a, b\n" in text.stdout


def test_order_and_layout_are_no_difference(tmp_path: Path) -> None:
    x = torch.arange(6.0).view(2, 3)
    a = {"x": x, "y": 1, "p": torch.nn.Parameter(x.clone())}
    b = OrderedDict(p=torch.nn.Parameter(x.clone(), requires_grad=False), y=1, x=x.t().contiguous().t())
    assert differing(a, b, tmp_path)["same"]


class Tagged(torch.Tensor):
    """A subclass whose objects have attributes."""


def test_attributes_of_tensors_are_compared(tmp_path: Path) -> None:
    def made(tag: int) -> torch.Tensor:
        tensor = torch.ones(2).as_subclass(Tagged)
        tensor.tag = tag  # type: ignore[attr-defined]
        return tensor

    assert differing([made(1)], [made(1)], tmp_path)["same"]
    (row,) = differing([made(1)], [made(2)], tmp_path)["differences"]
    assert row == {"path": [0, "tag"], "what": "value", "a": {"value": 1}, "b": {"value": 2}}


def test_keys_that_python_takes_for_equal_are_not(tmp_path: Path) -> None:
    found = differing({1: "x", "a": 0}, {True: "x", "a": 0}, tmp_path)
    assert [(row["what"], row["path"]) for row in found["differences"]] == [
        ("only in A", [1]),
        ("only in B", [True]),
    ]


def test_keys_that_are_not_plain_are_told_apart(tmp_path: Path) -> None:
    def made(*lasts: int) -> dict[Any, Any]:
        keys = [(*range(100), last) for last in lasts]
        return {"x": dict(zip(keys, range(3), strict=True)), "s": {nan, frozenset(keys)}, 1: {nan}}

    assert differing(made(1, 2, 3), made(1, 2, 3), tmp_path)["same"]
    found = differing(made(1, 2, 3), made(1, 2, 4), tmp_path)
    assert [(row["what"], row["path"][0]) for row in found["differences"]] == [
        ("only in A", "x"),
        ("only in B", "x"),
        ("value", "s"),
    ]


def test_attributes_that_tensors_share_are_compared_once(tmp_path: Path) -> None:
    def made(last: int) -> torch.Tensor:
        tensor = torch.ones(2).as_subclass(Tagged)
        tensor.tag = last  # type: ignore[attr-defined]
        for _ in range(60):
            above = torch.ones(2).as_subclass(Tagged)
            above.a = above.b = tensor  # type: ignore[attr-defined]
            tensor = above
        return tensor

    assert differing(made(1), made(1), tmp_path)["same"]
    assert [row["what"] for row in differing(made(1), made(2), tmp_path)["differences"]] == ["value"]


def test_states_whose_parts_would_take_too_long_to_pair_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(turn: int, n: int = 300) -> list[Any]:
        """Return lists that hold n lists in other orders, so that each of those meets each of theirs."""
        parts = [[[[0], None] for _ in range(n)] for _ in range(n)]
        return [[parts[(row * turn + at) % n] for at in range(n)] for row in range(n)]

    monkeypatch.setattr(isolation, "SECONDS", 1)
    torch.save(made(0), tmp_path / "a.pt")
    torch.save(made(1), tmp_path / "b.pt")
    result = diff(tmp_path / "a.pt", tmp_path / "b.pt")
    assert result.exit_code == 2
    assert re.search(r"a\.pt or .*b\.pt: its data\.pkl .* cannot be looked at in .* and \d s", result.stderr)


def test_shared_parts_and_cycles_are_compared_once(tmp_path: Path) -> None:
    def made(last: int) -> list[Any]:
        part: list[Any] = [last]
        for _ in range(60):
            part = [part, part]
        part.append(part)
        return part

    assert differing(made(1), made(1), tmp_path)["same"]
    found = differing(made(1), made(2), tmp_path)
    assert [row["what"] for row in found["differences"]] == ["value"] * 2  # both places of the innermost one


@pytest.mark.parametrize("piece", [1 << 18, 1000, 7])
def test_large_tensors_are_compared_in_pieces(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_values, "PIECE", piece)
    numels = []

    def noted(a: torch.Tensor, *rest: Any, **options: Any) -> Any:
        numels.append(a.numel())
        return difference(a, *rest, **options)

    monkeypatch.setattr(tensor_values, "difference", noted)
    a = torch.rand(150, 100)
    b = a.clone()
    b[0, 0], b[75, 7], b[-1, -1] = 2, 3, 4
    found = differing(
        {"x": a, "y": a[::2], "t": a}, {"x": b, "y": b[::2], "t": b.t().contiguous().t()}, tmp_path
    )
    most = pytest.approx(float((a - b).abs().max()))
    assert {name: row[:2] for name, row in values(found).items()} == {
        "x": (3, most),
        "y": (1, pytest.approx(float((a - b)[::2].abs().max()))),
        "t": (3, most),
    }
    assert max(numels) <= piece
    assert sum(numels) == 2 * a.numel() + a[::2].numel()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.floats(width=32)] * 2), min_size=1, max_size=30),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2]),
)
def test_differences_are_those_of_the_definition(rows: list[tuple[float, float]], dtype: torch.dtype) -> None:
    a, b = (torch.tensor(side, dtype=torch.float64).to(dtype) for side in zip(*rows, strict=True))
    pairs = list(zip(a.double().tolist(), b.double().tolist(), strict=True))
    unequal = [(x, y) for x, y in pairs if x != y and not (math.isnan(x) and math.isnan(y))]
    found = difference(a, b)
    assert found.differing == len(unequal)
    assert found.nans == sum(math.isnan(x) and math.isnan(y) for x, y in pairs)
    gaps = [abs(x - y) for x, y in unequal]
    expected = nan if any(map(math.isnan, gaps)) else max(gaps, default=0.0)
    assert repr(found.largest) == repr(expected)
    finite = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
    assert found.squares == pytest.approx(sum((x - y) ** 2 for x, y in finite))
    assert found.squares_of_a == pytest.approx(sum(x**2 for x, _ in finite))


def test_remote_files_are_compared(tmp_path: Path) -> None:
    torch.save({"x": torch.arange(1000.0), "n": 1}, tmp_path / "a.pt")
    torch.save({"x": torch.arange(1000.0).clamp(max=998), "n": 1}, tmp_path / "b.pt")
    url = f"memory://diff-{next(places)}/run/a.pt"
    fsspec.filesystem("memory").pipe_file(url, (tmp_path / "a.pt").read_bytes())
    assert document(url, tmp_path / "a.pt")["same"]
    assert values(document(url, tmp_path / "b.pt"))["x"][:2] == (1, 1)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_options_go_to_the_side_that_is_a_url(tmp_path: Path, order: slice) -> None:
    torch.save({"n": 1}, tmp_path / "a.pt")
    url = f"memory://diff-{next(places)}/run/a.pt"
    fsspec.filesystem("memory").pipe_file(url, (tmp_path / "a.pt").read_bytes())
    assert diff(*[url, tmp_path / "a.pt"][order], "--option", "level=1").exit_code == 0


def test_an_option_for_local_paths_alone_is_an_error(tmp_path: Path) -> None:
    torch.save({"n": 1}, tmp_path / "a.pt")
    result = diff(tmp_path / "a.pt", tmp_path / "a.pt", "--option", "level=1")
    assert result.exit_code == 2
    assert "takes no storage_options" in result.stderr


def test_long_tables_are_cut_unless_all_is_wanted(tmp_path: Path) -> None:
    torch.save(
        {f"k{n}": n for n in range(60)} | {f"t{n}": torch.ones(1) for n in range(55)}, tmp_path / "a.pt"
    )
    torch.save(
        {f"k{n}": -1 for n in range(60)} | {f"t{n}": torch.zeros(1) for n in range(55)}, tmp_path / "b.pt"
    )
    text = diff(tmp_path / "a.pt", tmp_path / "b.pt").stdout
    assert ("k49" in text, "k50" in text, "t49" in text, "t50" in text) == (True, False, True, False)
    assert "… and 10 more" in text
    assert "… and 5 more" in text
    everything = diff(tmp_path / "a.pt", tmp_path / "b.pt", "--all").stdout
    assert "k59" in everything
    assert "t54" in everything


def _record(path: Path) -> bytes:
    reader: Any = torch._C.PyTorchFileReader(str(path))
    data: bytes = reader.get_record("data.pkl")
    return data


def trouble(a: Path, b: Path) -> str:
    result = diff(a, b)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("asyncckpt: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_what_cannot_be_compared_is_trouble(tmp_path: Path) -> None:
    good, junk = tmp_path / "good.pt", tmp_path / "junk.pt"
    torch.save({"x": torch.ones(4)}, good)
    junk.write_bytes(b"junk" * 100)
    big = write_file(tmp_path / "big.pt", _record(good), bytes(16), byteorder="big")
    short = write_file(tmp_path / "short.pt", _record(good), bytes(8))
    new = write_file(tmp_path / "new.pt", _record(good).replace(b"FloatStorage", b"OtherStorage"), bytes(16))
    reasons = {
        junk: "junk.pt: it does not end as a zip file does",
        tmp_path / "absent.pt": "there is no file",
        big: "big.pt: its values are big-endian",
        short: "short.pt: a tensor of it views more than its storage 0 of 8 bytes",
    }
    for path, reason in reasons.items():
        for pair in ((good, path), (path, good)):
            assert reason in trouble(*pair)
    assert "new.pt: it has a tensor of dtype OtherStorage" in trouble(new, new)
    assert values(document(good, new)) == {}  # the dtype says it
    torch.save({"x": torch.ones(31).as_strided((4,) * 10, (1,) * 10)}, tmp_path / "windows.pt")
    assert "storage 0 more than 10,000 times over" in trouble(
        tmp_path / "windows.pt", tmp_path / "windows.pt"
    )


def test_only_in_one_is_never_read(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(4)}, tmp_path / "a.pt")
    short = write_file(tmp_path / "short.pt", _record(tmp_path / "a.pt"), bytes(8))
    torch.save({"y": 1}, tmp_path / "b.pt")
    assert [row["what"] for row in document(short, tmp_path / "b.pt")["differences"]] == [
        "only in A",
        "only in B",
    ]


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def replaced(file: OpenFile) -> Any:
        records = await read_records(file)
        torch.save({"n": 2}, tmp_path / "new.pt")
        (tmp_path / "new.pt").replace(file.path)
        return records

    monkeypatch.setattr(tensor_values, "read_records", replaced)
    torch.save({"n": 1}, tmp_path / "a.pt")
    assert "a.pt was replaced while it was read" in trouble(tmp_path / "a.pt", tmp_path / "a.pt")


def test_a_tensor_that_repeats_its_elements_beyond_all_memory_is_compared(tmp_path: Path) -> None:
    storage = (
        b"((" + pickled_text("storage") + b"ctorch\nDoubleStorage\n" + pickled_text("0") + pickled_text("cpu")
    )
    data = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
        + storage
        + b"K\x01tQK\x00\x8a\x08"
        + (1 << 62).to_bytes(8, "little")
        + b"\x85K\x00\x85\x89}tR."
    )
    a = write_file(tmp_path / "a.pt", data, struct.pack("<d", 1.0))
    b = write_file(tmp_path / "b.pt", data, struct.pack("<d", 3.0))
    assert document(a, a)["same"]
    (row,) = document(a, b)["tensors"]
    assert (row["differing"], row["max_abs"], row["relative"]) == (1 << 62, 2.0, 2.0)
