"""Pickles are read into inert objects: what they hold is right, and nothing that they want done is done."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
from collections import OrderedDict, defaultdict, deque
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt._inspection.inert import Attribute, Inert, Tensor, children, dtype_name, read_pickle
from asyncckpt._inspection.texts import path_text, short
from states import DTYPES
from strangers import data_pickle, malicious, pickled_text, register_system

if TYPE_CHECKING:
    from collections.abc import Iterator

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)

keys = st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.floats() | st.text() | st.binary()
scalars = keys | st.complex_numbers()
plain_keys = keys | st.tuples(keys, keys)
plain = st.recursive(
    scalars | st.builds(bytearray, st.binary()) | st.integers(-(1 << 2000), 1 << 2000),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(plain_keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(OrderedDict)
        | st.sets(plain_keys, max_size=3)
        | st.frozensets(plain_keys, max_size=3)
    ),
    max_leaves=20,
)


def typed(value: Any) -> Any:
    """Return what is equal for equal values of the same types only; NaN is equal to itself."""
    kind = type(value)
    if isinstance(value, dict):
        return kind, [(typed(key), typed(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return kind, [typed(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return kind, sorted(repr(typed(item)) for item in value)
    return kind, repr(value)


def root(state: object) -> Any:
    return read_pickle(data_pickle(state)).root


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield all that is in a state without cycles, with the text of its path."""
    yield path_text(path), node
    for key, part in children(node):
        yield from leaves(part, (*path, key))


@settings(max_examples=150, deadline=None)
@given(value=plain, protocol=st.sampled_from(PROTOCOLS), slow=st.booleans())
def test_plain_values_are_themselves_under_each_protocol(value: Any, protocol: int, *, slow: bool) -> None:
    assert typed(read_pickle(pickle.dumps(value, protocol), slow=slow).root) == typed(value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_parts_stay_shared_and_cycles_are_cycles(protocol: int) -> None:
    shared: list[Any] = [1]
    state: dict[str, Any] = {"a": shared, "b": (shared, shared), "c": {"d": shared}}
    shared.append(state)
    found = read_pickle(pickle.dumps(state, protocol)).root
    assert found["a"] is found["b"][0] is found["b"][1] is found["c"]["d"]
    assert found["a"][1] is found
    assert len(short(found)) <= 60


def every_kind_of_tensor() -> dict[str, Any]:
    base = torch.arange(24, dtype=torch.float32)
    state: dict[str, Any] = {
        f"dtype.{dtype}": torch.empty(2, 3).to(torch.uint8).repeat(1, 16).view(dtype) for dtype in DTYPES
    }
    return state | {
        "whole": base,
        "view": base[3:9],
        "transposed": base.view(4, 6).t(),
        "expanded": base[:1].expand(5, 3),
        "strided": base.view(2, 3, 4)[:, ::2, 1::2],
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "grad": torch.ones(3, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "frozen": torch.nn.Parameter(torch.ones(3), requires_grad=False),
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "neg": torch.ones(2, dtype=torch.complex64).conj().imag,
        "buffer": torch.nn.Buffer(torch.ones(2)),
    }


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
def test_tensors_are_what_torch_load_makes_of_them() -> None:
    state = every_kind_of_tensor()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    found = root(state)
    assert list(found) == list(loaded)
    keys: dict[int, set[str]] = {}
    for name, tensor in loaded.items():
        told = found[name]
        assert isinstance(told, Tensor), name
        expected: Any = (tensor.shape, tensor.stride(), tensor.storage_offset(), str(tensor.dtype)[6:])
        assert (told.shape, told.stride, told.offset, dtype_name(told)) == expected, name
        assert (told.requires_grad, told.conj, told.neg) == (
            tensor.requires_grad,
            tensor.is_conj(),
            tensor.is_neg(),
        )
        assert told.is_contiguous == tensor.is_contiguous(), name
        assert told.numel == tensor.numel()
        assert told.storage.location == "cpu"
        assert (
            told.storage.numel * getattr(torch, dtype_name(told.storage)).itemsize
            == tensor.untyped_storage().nbytes()
        )
        assert ("Parameter" in told.kind) == isinstance(tensor, torch.nn.Parameter), name
        keys.setdefault(tensor.untyped_storage()._cdata, set()).add(told.storage.key)
    assert all(len(told) == 1 for told in keys.values())
    assert len({key for told in keys.values() for key in told}) == len(keys)


class Holder:
    """Has tensors in every place that an object can have them in."""

    def __init__(self) -> None:
        self.weight = torch.ones(2)
        self.inner = [torch.ones(3)]


class ListOfTensors(list[Any]):
    pass


class Tagged(torch.Tensor):
    """A subclass whose objects have attributes."""


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_tensors_inside_of_objects_are_found() -> None:
    tagged = torch.ones(5).as_subclass(Tagged)
    tagged.extra = torch.ones(6)  # type: ignore[attr-defined]
    state = {
        "holder": Holder(),
        "deque": deque([torch.ones(1)]),
        "default": defaultdict(list, key=[torch.ones(7)]),
        "list": ListOfTensors([torch.ones(4)]),
        "sparse": torch.eye(3).to_sparse_csr(),
        "tagged": tagged,
        "set": {torch.ones(8)},
        "model": torch.nn.Linear(2, 3, bias=False),
    }
    shapes = {path: node.shape for path, node in leaves(root(state)) if isinstance(node, Tensor)}
    assert shapes == {
        "holder.weight": (2,),
        "holder.inner.0": (3,),
        "deque.0": (1,),
        "default.key.0": (7,),
        "list.0": (4,),
        "sparse.args.1.0": (4,),
        "sparse.args.1.1": (3,),
        "sparse.args.1.2": (3,),
        "tagged": (5,),
        "tagged.extra": (6,),
        "set.0": (8,),
        "model._parameters.weight": (3, 2),
    }


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_is_no_tensor_is_told_by_name() -> None:
    state = {
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "path": Path("a") / "b",
        "slice": slice(1, 5),
        "array": np.arange(3),
        "type": Holder,
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.5, 1, torch.qint8),
    }
    told = {key: short(node, 100) for key, node in root(state).items()}
    path = f"{type(state['path']).__module__}.PosixPath"
    assert told["array"].startswith(
        ("numpy._core.multiarray._reconstruct(", "numpy.core.multiarray._reconstruct(")
    )
    assert told["quantized"].startswith("torch._utils._rebuild_qtensor(storage(qint8, 3), 0, (3,), (1,), (")
    assert {key: told[key] for key in ("dtype", "size", "device", "path", "slice", "type")} == {
        "dtype": "torch.bfloat16",
        "size": "torch.Size((2, 3))",
        "device": "torch.device('cuda', 1)",
        "path": f"{path}('a', 'b')",
        "slice": "slice(1, 5, None)",
        "type": f"{__name__}.Holder",
    }


def test_a_state_dict_has_its_metadata() -> None:
    found = root(torch.nn.Linear(2, 2).state_dict())
    assert type(found) is OrderedDict
    assert list(found) == ["weight", "bias"]
    assert list(children(found))[2:] == [(Attribute("_metadata"), {"": {"version": 1}})]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("how", malicious(Path()))
def test_nothing_that_a_pickle_wants_done_is_done(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, slow: bool
) -> None:
    mark = tmp_path / "mark"
    data = malicious(mark)[how]
    register_system(monkeypatch)
    pickled = read_pickle(data, slow=slow)
    assert all(map(short, dict(leaves(pickled.root)).values()))
    assert not mark.exists()
    assert {"os.system", "builtins.eval", "strangers.Making"}.intersection(pickled.globals)
    with contextlib.suppress(Exception):  # what comes of the mark does not matter
        pickle.loads(data)
    assert mark.exists()  # it would have done it


def test_a_registered_extension_is_not_taken_from_the_cache_nor_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_system(monkeypatch)
    data = malicious(tmp_path / "mark")["EXT"]
    for _ in range(2):
        pickle.loads(data)  # which leaves os.system in the cache
        (tmp_path / "mark").unlink()
        assert isinstance(read_pickle(data).root, Inert)
        assert not (tmp_path / "mark").exists()


def test_a_name_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    assert read_pickle(b"cevil_module\nname\n.").globals == ["evil_module.name"]
    assert not (tmp_path / "mark").exists()


def test_a_class_that_a_call_makes_is_one() -> None:
    data = (
        b"\x80\x02cdill\n_create_type\n"
        + pickled_text("X")
        + b"\x85R)\x81}"
        + pickled_text("a")
        + b"K\x05sb."
    )
    found = read_pickle(data).root
    assert short(found, 100) == "(object of a class that is made up)(dill._create_type('X'), a=5)"


def test_attributes_do_not_hide_what_is_in_an_ordered_dict() -> None:
    data = (
        b"\x80\x02ccollections\nOrderedDict\n)RK\x01K\x02s}" + pickled_text("items") + b"cbuiltins\nset\nsb."
    )
    assert short(read_pickle(data).root) == "{1: 2}"


@pytest.mark.parametrize("slow", [False, True])
def test_wherever_a_pickle_is_cut_it_is_damaged(*, slow: bool) -> None:
    data = data_pickle({"a": [torch.ones(2), {"b": (1.5, "x")}], "c": torch.nn.Linear(1, 1)})
    for end in range(len(data)):
        with pytest.raises((pickle.UnpicklingError, EOFError, IndexError, struct.error)):
            read_pickle(data[:end], slow=slow)


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
    found = read_pickle(good).root
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
        assert isinstance(read_pickle(bad).root, Inert)
    odd = read_pickle(good.replace(pickled_text("0"), b"N")).root
    assert isinstance(odd, Inert)
    assert odd.args[0].name == "(persistent id)"


def test_one_storage_is_listed_once() -> None:
    base = torch.ones(4)
    found = read_pickle(data_pickle({"a": base, "b": base[:2], "c": torch.ones(4)}))
    assert found.root["a"].storage == found.root["b"].storage
    assert [storage.key for storage in found.storages] == ["0", "1"]


def test_texts_have_no_control_characters() -> None:
    state = {"\x1b[2Jkey\n": "\x1b[31mred", "b": read_pickle(b"cos\x1b\nsys\x07tem\n.").root, "c": {"\r": 1}}
    for path, node in leaves(state):
        assert path.isprintable()
        assert short(node).isprintable()


def test_texts_are_short_whatever_they_show() -> None:
    values: list[Any] = [
        list(range(1_000_000)),
        "x" * 1_000_000,
        1 << 10_000_000,
        {n: [n] for n in range(100_000)},
        Inert(*(1,) * 1_000),
    ]
    for value in values:
        assert len(short(value, 40)) <= 40
    assert short(1 << 4096) == "(integer of 4097 bits)"
    assert short([1, "a", (2,), {"b": None}]) == "[1, 'a', (2,), {'b': None}]"


def test_sets_are_in_the_same_order_each_time() -> None:
    items = [("t", 1), "b", 3, None, frozenset({1})]
    assert short(set(items)) == short({*items[::-1]})


def test_tuples_and_objects_in_a_set_are_in_the_order_of_what_is_in_them() -> None:
    numbers = range(9)
    pairs = read_pickle(pickle.dumps({("pair", number) for number in numbers})).root
    paths = read_pickle(pickle.dumps({PurePosixPath(str(number)) for number in numbers})).root
    assert [item for _, item in children(pairs)] == [("pair", number) for number in numbers]
    assert [item.args for _, item in children(paths)] == [(str(number),) for number in numbers]


def test_large_integers_in_a_set_are_no_error() -> None:
    large = 1 << 100_000
    assert [item for _, item in children({large, 1, (large,)})] == [1, large, (large,)]
