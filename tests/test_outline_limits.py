"""Damaged, enormous and senseless pickles are told apart from good ones, in little time and memory."""

from __future__ import annotations

import pickle
import pickletools
import tracemalloc
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt import CorruptCheckpointError
from asyncckpt._outline.machine import MAX_OPERATIONS, outline
from asyncckpt._outline.nodes import GlobalOutline, KeyOutline, ObjectOutline, Repeated, StorageOutline
from asyncckpt._outline.texts import path_text, short
from asyncckpt._outline.walk import MAX_DEPTH, walk
from asyncckpt._outline.walk import Path as Keys
from strangers import data_pickle, pickled_text


def test_all_opcodes_are_known() -> None:
    """Each gets as far as the stack of a pickle that has too little or too much on it."""
    arguments = {
        None: b"",
        "decimalnl_short": b"1\n",
        "float8": bytes(8),
        "floatnl": b"1\n",
        "stringnl": b"'a'\n",
    }
    for opcode in pickletools.opcodes:
        name = opcode.arg.name if opcode.arg else None
        argument = arguments.get(name, b"a\na\n" if name and "nl" in name else bytes(8))
        code = opcode.code.encode("latin-1")
        try:
            outline(b"N(NN" + code + argument + b".")
        except CorruptCheckpointError as error:
            assert "data.pkl is damaged" in str(error)  # noqa: PT017 - it need not be raised


def test_wherever_a_pickle_is_cut_it_is_damaged() -> None:
    data = data_pickle({"a": [torch.ones(2), {"b": (1.5, "x")}], "c": torch.nn.Linear(1, 1)})
    for end in range(len(data)):
        with pytest.raises(CorruptCheckpointError, match=r"data\.pkl is damaged at byte \d+"):
            outline(data[:end])


@settings(max_examples=300, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_whatever_is_damaged_is_told_or_damaged(place: float, byte: int) -> None:
    data = bytearray(_DAMAGED)
    data[int(place * len(data))] = byte
    try:
        found = outline(bytes(data))
    except CorruptCheckpointError:
        return
    for path, node in walk(found.root):
        assert len(short(node)) <= 60
        path_text(path)


_DAMAGED = data_pickle(
    {"a": [torch.ones(2), {"b": (1.5, "x", 3)}], "c": torch.eye(2).to_sparse(), "d": {1, (2, 3)}}
)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x80\x06N.", "protocol 6"),
        (b"h\x05.", "refers to its object 5 before that is made"),
        (b"Nb.", "takes what is not there"),
        (b"R.", "takes what is not there"),
        (b"]Nb.", "sets attributes of a list"),
        (b"NNa.", "appends to a NoneType"),
        (b"NNNs.", "sets items of a NoneType"),
        (b"(K\x01d.", "takes what is not there"),
        (b"K\x01t.", "lacks a mark"),
        (b"K\x01K\x02\x93.", "no text"),
        (b"c" + b"a" * 2000 + b"\nb\n.", "2001 characters"),
        (b"I" + b"1" * 10_000 + b"\n.", "integer string conversion"),
        (b"S'\\i'\n.", "invalid escape sequence"),
        (b"", "data.pkl is damaged at byte 0"),
    ],
)
def test_what_makes_no_sense_is_said(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=reason):
        outline(data)


def nested(levels: int, around: bytes = b"]", close: bytes = b"a") -> bytes:
    return around * levels + close * (levels - 1) + b"."


def test_deep_nesting_is_no_problem() -> None:
    found = outline(b"\x80\x02" + b"}X\x01\0\0\0k" * 5_000 + b"K\x07" + b"s" * 5_000 + b".")
    ((path, node),) = walk(found.root)
    assert node == 7
    assert len(path) < 100
    assert len(path_text(path)) < 1_000
    deepest = outline(nested(100_000))
    with pytest.raises(CorruptCheckpointError, match=f"{MAX_DEPTH:,} levels deep"):
        list(walk(deepest.root))
    assert len(short(deepest.root)) <= 60


def test_keys_may_be_nested_as_deep() -> None:
    found = outline(b"\x80\x04" + b"(" * 5_000 + b"\x91" * 5_000 + b".").root
    assert short(found) == "{{{…}}}"
    assert len(list(walk(found))) == 1
    assert short(outline(b"\x80\x02}K\x01\x85\x85K\x02s.").root) == "{((1,),): 2}"
    # Each dict is the key of the next, in a tuple.
    tower = outline(b"\x80\x02K\x01" + b"\x85q\x000}h\x00K\x02s" * 5_000 + b".").root
    assert short(tower) == "{({…: 2},): 2}"
    assert len(list(walk(tower))) == 1


def test_shared_parts_are_looked_at_once() -> None:
    # 2 ** 100 leaves to whoever looks into each tuple each time.
    laughs = b"\x80\x02K\x01\x85" + b"2\x86" * 100 + b"."
    found = list(walk(outline(laughs).root))
    assert len(found) == 101
    assert sum(isinstance(node, Repeated) for _, node in found) == 99
    assert len(short(outline(laughs).root)) <= 60


def test_what_is_costly_to_hash_is_no_key() -> None:
    # The same tower of tuples as a key, and in a set.
    tower = b"K\x01\x85" + b"2\x86" * 100
    found = outline(b"\x80\x04}" + tower + b"K\x02s\x8f(" + tower + b"K\x03\x90\x86.").root
    ((key, value),) = found[0].items()
    assert isinstance(key, KeyOutline)
    assert value == 2
    assert {type(item) for item in found[1]} == {KeyOutline, int}
    assert {type(key) for key in outline(pickle.dumps({(1, 2): 0, 1j: 0})).root} == {KeyOutline}


def outlined_in_little(data: bytes, nbytes: int) -> Any:
    """Return the root of an outline that takes less than `nbytes` to make."""
    tracemalloc.start()
    try:
        found = outline(data).root
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < nbytes
    return found


def test_a_small_pickle_does_not_become_large_by_calls() -> None:
    encode = b"c_codecs\nencode\n"
    text = pickled_text("x" * 1_000_000)
    data = (
        b"\x80\x02]("
        + text
        + b"q\x010"
        + (encode + b"h\x01" + pickled_text("latin1") + b"\x86R") * 1_000
        + b"e."
    )
    found = outlined_in_little(data, 20_000_000)
    assert found[0] == b"x" * 1_000_000
    assert isinstance(found[-1], ObjectOutline)


@pytest.mark.parametrize(
    "call",
    [
        b"Nh\x01R",  # of what is no name
        b"Nh\x01\x81",
        b"ccopyreg\n__newobj__\nh\x01R",
        b"ctorch._utils\n_rebuild_tensor\nh\x01R",
    ],
)
def test_arguments_are_not_copied_for_each_call(call: bytes) -> None:
    arguments = b"(" + b"N" * 10_000 + b"tq\x010"
    found = outlined_in_little(b"\x80\x02](" + arguments + call * 1_000 + b"e.", 5_000_000)
    assert len(found) == 1_000
    assert isinstance(found[-1], ObjectOutline)


def test_too_many_operations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_OPERATIONS >= 10_000_000
    monkeypatch.setattr("asyncckpt._outline.machine.MAX_OPERATIONS", 10)
    assert outline(b"N" * 9 + b".").root is None
    with pytest.raises(CorruptCheckpointError, match="more than 10 operations"):
        outline(b"N" * 10 + b".")


def test_nonsense_in_the_place_of_a_tensor_is_an_object() -> None:
    storage = (
        b"("
        + pickled_text("storage")
        + b"ctorch\nFloatStorage\n"
        + pickled_text("0")
        + pickled_text("cpu")
        + b"K\x02tQ"
    )
    rebuild = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
    good = rebuild + storage + b"K\x00K\x02\x85K\x01\x85\x89}tR."
    found = outline(good).root
    assert (found.shape, found.storage.numel) == ((2,), 2)
    for bad in (
        good.replace(b"K\x02\x85K\x01\x85", b"K\x02\x85)"),
        good.replace(b"K\x02\x85", b"X\x01\0\0\0a\x85"),
        good.replace(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"),
        good.replace(b"K\x02\x85K\x01\x85", (b"\x8a\x06" + bytes(5) + b"\x01") * 2 + b"\x86K\x00K\x00\x86"),
        good.replace(b"K\x02\x85K\x01\x85", (b"(" + b"K\x01" * 61 + b"t") * 2),
        good.replace(storage, b"N"),
        rebuild + b"tR.",
    ):
        assert isinstance(outline(bad).root, ObjectOutline)
    odd = outline(good.replace(pickled_text("0"), b"N")).root
    assert isinstance(odd, ObjectOutline)
    assert odd.args[0].name == "(persistent id)"


def test_one_storage_is_one_node() -> None:
    base = torch.ones(4)
    told = outline(data_pickle({"a": base, "b": base[:2], "c": torch.ones(4)}))
    assert told.root["a"].storage is told.root["b"].storage
    assert [storage.key for storage in told.storages] == ["0", "1"]
    assert all(isinstance(storage, StorageOutline) for storage in told.storages)


def test_texts_have_no_control_characters() -> None:
    state = {"\x1b[2Jkey\n": "\x1b[31mred", "b": outline(b"cos\x1b\nsys\x07tem\n.").root, "c": {"\r": 1}}
    for path, node in walk(state):
        assert path_text(path).isprintable()
        assert short(node).isprintable()
    assert short(state).isprintable()
    assert isinstance(state["b"], GlobalOutline)


def test_texts_are_short_whatever_they_tell() -> None:
    values: list[Any] = [
        list(range(1_000_000)),
        "x" * 1_000_000,
        1 << 10_000_000,
        {n: [n] for n in range(100_000)},
        ObjectOutline("a" * 1_000, (1,) * 1_000),
    ]
    for value in values:
        assert len(short(value, 40)) <= 40
    assert short(1 << 4096) == "(integer of 4097 bits)"
    assert short([1, "a", (2,), {"b": None}]) == "[1, 'a', (2,), {'b': None}]"


def test_paths_lead_to_what_they_name() -> None:
    state = {"m": {"layers.0.w": [1, [2, "x"]], 3: {"a": ()}}, ("t", 1): {1, 2}}
    found: list[tuple[Keys, Any]] = list(islice(walk(state), 10))
    assert found == [
        (("m", "layers.0.w", 0), 1),
        (("m", "layers.0.w", 1), [2, "x"]),
        (("m", 3, "a"), ()),
        ((("t", 1),), {1, 2}),
    ]
    assert [path_text(path) for path, _ in found] == [
        "m.layers.0.w.0",
        "m.layers.0.w.1",
        "m.3.a",
        "('t', 1)",
    ]
