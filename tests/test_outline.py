"""What a pickle holds is told right, and told without doing anything that the pickle wants done."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt._outline.machine import outline
from asyncckpt._outline.nodes import (
    KeyOutline,
    OrderedDictOutline,
    TensorOutline,
)
from asyncckpt._outline.texts import path_text, short
from asyncckpt._outline.walk import walk
from states import DTYPES
from strangers import data_pickle, malicious, register_system

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
    if type(value) is KeyOutline:
        value = value.value
    kind = OrderedDict if type(value) is OrderedDictOutline else type(value)
    if isinstance(value, dict):
        return kind, [(typed(key), typed(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return kind, [typed(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return kind, sorted(repr(typed(item)) for item in value)
    return kind, repr(value)


def root(state: object) -> Any:
    return outline(data_pickle(state)).root


@settings(max_examples=150, deadline=None)
@given(value=plain, protocol=st.sampled_from(PROTOCOLS))
def test_plain_values_are_themselves_under_each_protocol(value: Any, protocol: int) -> None:
    assert typed(outline(pickle.dumps(value, protocol)).root) == typed(value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_parts_stay_shared_and_cycles_are_cycles(protocol: int) -> None:
    shared: list[Any] = [1]
    state: dict[str, Any] = {"a": shared, "b": (shared, shared), "c": {"d": shared}}
    shared.append(state)
    found = outline(pickle.dumps(state, protocol)).root
    assert found["a"] is found["b"][0] is found["b"][1] is found["c"]["d"]
    assert found["a"][1] is found
    texts = {path_text(path): short(node) for path, node in walk(found)}
    assert texts == {
        "a.0": "1",
        "a.1": "same as ",
        "b.0": "same as a",
        "b.1": "same as a",
        "c.d": "same as a",
    }


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
        assert isinstance(told, TensorOutline), name
        expected: Any = (tensor.shape, tensor.stride(), tensor.storage_offset(), str(tensor.dtype)[6:])
        assert (told.shape, told.stride, told.offset, told.dtype) == expected, name
        assert (told.requires_grad, told.conj, told.neg) == (
            tensor.requires_grad,
            tensor.is_conj(),
            tensor.is_neg(),
        )
        assert told.is_contiguous == tensor.is_contiguous(), name
        assert told.numel == tensor.numel()
        assert told.storage.location == "cpu"
        assert (
            told.storage.numel * getattr(torch, told.storage.dtype).itemsize
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
    shapes = {
        path_text(path): node.shape for path, node in walk(root(state)) if isinstance(node, TensorOutline)
    }
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
    assert type(found) is OrderedDictOutline
    assert list(found) == ["weight", "bias"]
    assert found.state == {"_metadata": {"": {"version": 1}}}


@pytest.mark.parametrize("how", malicious(Path()))
def test_nothing_that_a_pickle_wants_done_is_done(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    data = malicious(mark)[how]
    register_system(monkeypatch)
    told = outline(data)
    texts = [short(node) + path_text(path) for path, node in walk(told.root)]
    assert texts
    assert not mark.exists()
    suspects = {"os.system", "builtins.eval", "strangers.Making", "(registered extension).247"}
    assert suspects.intersection(told.globals)
    with contextlib.suppress(Exception):  # what comes of the mark does not matter
        pickle.loads(data)
    assert mark.exists()  # it would have done it


def test_a_name_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    assert outline(b"cevil_module\nname\n.").globals == ("evil_module.name",)
    assert not (tmp_path / "mark").exists()
