"""Foreign pickles: whatever memory or time they would take, the child process ends with a clear error."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import asyncckpt
from asyncckpt import CorruptCheckpointError
from asyncckpt._inspection import isolation
from asyncckpt._inspection.isolation import look_at
from strangers import data_pickle, pickled_text

if TYPE_CHECKING:
    from collections.abc import Callable

TOWER = b"K\x01\x85" + b"2\x86" * 100  # tuples of twice the same: 2 ** 100 numbers to whoever looks into each
TOO_MUCH = r"x\.pt: its data\.pkl of [\d,]+ bytes cannot be looked at in 2\d\d MiB of memory and 1 s"
TOO_DEEP = r"x\.pt: its state is nested too deep to be looked at"


def contents(data: bytes) -> dict[str, Any]:
    return look_at("contents", [("x.pt", data)])


@pytest.fixture(autouse=True)
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower the limits, so that they are reached in moments."""
    monkeypatch.setattr(isolation, "MEMORY", 256 << 20)
    monkeypatch.setattr(isolation, "SECONDS", 1)
    monkeypatch.setattr(isolation, "OUTPUT", 1 << 20)


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a reference far off": (lambda: b"\x80\x02Nr" + struct.pack("<I", 1 << 31) + b".", TOO_MUCH),
    "a long bytearray": (lambda: b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", TOO_MUCH),
    "many encoded copies of a text": (
        lambda: (
            b"\x80\x02](" + pickled_text("x" * 1_000_000) + b"q\x010"
            + (b"c_codecs\nencode\nh\x01" + pickled_text("latin1") + b"\x86R") * 1_000 + b"e."
        ),
        TOO_MUCH,
    ),
    "a long text that is printed again and again": (
        lambda: b"\x80\x02](" + pickled_text("x" * 1_000_000) + b"2" * 1_000 + b"e.",
        TOO_MUCH,
    ),
    "a hash that never ends": (lambda: b"\x80\x02}" + TOWER + b"K\x02s.", TOO_MUCH),
    "keys of one hash": (
        lambda: pickled_ints(range(0, (2**61 - 1) * 60_000, 2**61 - 1)),
        TOO_MUCH,
    ),
    "deep lists": (lambda: b"]" * 100_000 + b"a" * 99_999 + b".", TOO_DEEP),
    "deep tuples as a key": (lambda: b"\x80\x02}K\x01" + b"\x85" * 1_000_000 + b"K\x02s.", TOO_MUCH),
    "deep objects": (lambda: b"\x80\x02" + b"cx\ny\n" * 5_000 + b"N" + b"\x85R" * 5_000 + b".", TOO_DEEP),
}  # fmt: skip


def pickled_ints(keys: range) -> bytes:
    """Return the pickle of a dict with these keys; Python itself would take as long to make it."""
    items = [b"\x8a\x0a" + key.to_bytes(10, "little", signed=True) + b"N" for key in keys]
    return b"\x80\x02}(" + b"".join(items) + b"u."


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_fill_the_memory_or_take_forever_is_an_error(name: str) -> None:
    make, message = BOMBS[name]
    with pytest.raises(CorruptCheckpointError, match=message):
        contents(make())


def test_what_is_shared_is_looked_at_once() -> None:
    values = contents(b"\x80\x02" + TOWER + b".")["values"]
    assert len(values) == 101
    assert sum(row.get("text", "").startswith("same as") for row in values) == 99


def test_damage_is_an_error_that_names_the_file_it_is_in() -> None:
    good = data_pickle({"a": 1})
    with pytest.raises(
        CorruptCheckpointError, match=r"^a\.pt: its data\.pkl is damaged: unpickling stack und"
    ):
        look_at("differences", [("a.pt", b"R."), ("b.pt", good * 100_000)])
    with pytest.raises(CorruptCheckpointError, match=r"^b\.pt: its data\.pkl is damaged: "):
        look_at("differences", [("a.pt", good), ("b.pt", good[:-1])])


_DAMAGED = data_pickle({"a": [1, {"b": (1.5, "x", 3)}], "c": Path(), "d": {1, (2, 3)}})


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, len(_DAMAGED) - 1), byte=st.integers(0, 255))
def test_whatever_byte_is_damaged_the_result_is_contents_or_an_error(place: int, byte: int) -> None:
    data = bytearray(_DAMAGED)
    data[place] = byte
    try:
        contents(bytes(data))
    except CorruptCheckpointError as error:
        assert str(error).startswith("x.pt: its data.pkl ")  # noqa: PT017 - it need not be raised


def test_the_child_process_opens_and_writes_no_file(tmp_path: Path) -> None:
    program = """
        import os, sys, types
        package = sys.modules["asyncckpt"] = types.ModuleType("asyncckpt")
        package.__path__ = sys.argv[1:2]
        from asyncckpt._inspection import child
        assert not {"numpy", "socket", "subprocess"} & sys.modules.keys()
        output = os.open(sys.argv[2], os.O_CREAT | os.O_WRONLY)
        child._limit(1 << 30, 10)
        for forbidden in (lambda: os.open(sys.argv[2], os.O_RDONLY), lambda: os.write(output, b"x")):
            try:
                forbidden()
            except OSError:
                continue
            os._exit(1)
        os._exit(0)
    """
    program = "\n".join(line[8:] for line in program.splitlines())
    package = str(Path(asyncckpt.__file__).parent)
    command = [sys.executable, "-I", "-S", "-c", program, package, str(tmp_path / "x")]
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "x").stat().st_size == 0


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read_within_the_limits(protocol: int) -> None:
    state = {
        "ü": [1, -(1 << 200), 1.5, 1j, "ü\ud800", b"\xff", bytearray(b"\xff"), None, True],
        "s": {1},
        "f": Path,
    }
    values = contents(pickle.dumps(state, protocol))["values"]
    assert [row["path"][0] for row in values] == ["ü", "s", "f"]
    assert values[0]["text"].endswith(r"1.5, 1j, 'ü\ud800', b'\xff', bytearray(b'\xff'), None, True]")
