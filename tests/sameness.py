"""Whether two states, as they came out of two files, mean the same."""

from __future__ import annotations

from collections import deque
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch.storage import TypedStorage, UntypedStorage
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# What Python may or may not keep one object of, whoever pickled it.
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, FunctionType, torch.dtype, torch.device)
_COMPRESSED = {torch.sparse_csr, torch.sparse_bsr, torch.sparse_csc, torch.sparse_bsc}


def raw(storage: UntypedStorage) -> torch.Tensor:
    """Return the bytes of a storage, as a view."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def assert_same(found: object, expected: object) -> None:
    """Assert equality of values, types, order, identity, and of which tensors share storages."""
    _Comparison().compare(found, expected, "state")


class _Comparison:
    def __init__(self) -> None:
        # Each object of one state has one partner in the other, and the other way round. The objects
        # are kept, so that no id is given out twice.
        self._partners: tuple[dict[int, Any], dict[int, Any]] = ({}, {})

    def compare(self, found: Any, expected: Any, path: str) -> None:
        assert type(found) is type(expected), path
        if isinstance(found, _ATOMS):
            # Floats by their bits: NaN is to be equal to itself.
            assert repr(found) == repr(expected), path
        elif self._meet(id(found), found, id(expected), expected, path):
            self._compare_content(found, expected, path)

    def _meet(self, one: int, found: Any, other: int, expected: Any, path: str) -> bool:
        """Note that the two are partners; returns whether they are met for the first time."""
        forth, back = self._partners
        known = one in forth or other in back
        partner = forth.setdefault(one, (other, found, expected))[0]
        assert partner == other, f"{path}: one object is two in the other state"
        assert back.setdefault(other, (one, found, expected))[0] == one, (
            f"{path}: two objects are one in the other state"
        )
        return not known

    def _compare_content(self, found: Any, expected: Any, path: str) -> None:
        if isinstance(found, torch.Tensor):
            self._compare_tensors(found, expected, path)
        elif isinstance(found, (UntypedStorage, TypedStorage)):
            self._compare_storages(found, expected, path)
        elif isinstance(found, np.ndarray):
            assert (found.dtype, found.shape, found.strides) == (
                expected.dtype,
                expected.shape,
                expected.strides,
            ), path
            self.compare(found.tolist(), expected.tolist(), path)
        elif isinstance(found, dict):
            self.compare(list(found), list(expected), f"{path}.keys()")
            for key in found:
                self.compare(found[key], expected[key], f"{path}[{key!r}]")
        elif isinstance(found, (list, tuple, deque)):
            assert len(found) == len(expected), path
            for index, (one, other) in enumerate(zip(found, expected, strict=True)):
                self.compare(one, other, f"{path}[{index}]")
        elif isinstance(found, (set, frozenset)):
            assert found == expected, path
        elif isinstance(found, np.generic | bytearray | range):
            assert repr(found) == repr(expected), path
        self._compare_attributes(found, expected, path)

    def _compare_attributes(self, found: Any, expected: Any, path: str) -> None:
        ours, theirs = _attributes(found), _attributes(expected)
        assert list(ours) == list(theirs), f"{path}: its attributes"
        for name, value in ours.items():
            self.compare(value, theirs[name], f"{path}.{name}")

    def _compare_storages(self, found: Any, expected: Any, path: str) -> None:
        one = found._untyped_storage if isinstance(found, TypedStorage) else found
        other = expected._untyped_storage if isinstance(expected, TypedStorage) else expected
        if isinstance(found, TypedStorage):
            assert found.dtype is expected.dtype, path
        assert (one.device, one.nbytes()) == (other.device, other.nbytes()), path
        if (
            self._meet(-one._cdata, one, -other._cdata, other, f"{path}: storages")
            and one.device.type == "cpu"
        ):
            assert torch.equal(raw(one), raw(other)), f"{path}: bytes"

    def _compare_tensors(self, found: Any, expected: Any, path: str) -> None:
        def traits(tensor: torch.Tensor) -> tuple[object, ...]:
            return (
                tensor.dtype,
                tensor.layout,
                tensor.device,
                tensor.requires_grad,
                tensor.is_leaf,
                tensor.is_nested,
            )

        assert traits(found) == traits(expected), path
        if is_traceable_wrapper_subclass(found):
            names, constants = found.__tensor_flatten__()
            others, other_constants = expected.__tensor_flatten__()
            assert names == others, path
            self.compare(repr(constants), repr(other_constants), path)
            for name in names:
                self.compare(getattr(found, name), getattr(expected, name), f"{path}.{name}")
        elif found.is_nested:
            self.compare(found.values(), expected.values(), f"{path}.values()")
            assert torch.equal(found._nested_tensor_size(), expected._nested_tensor_size()), path
        elif found.layout is torch.sparse_coo:
            assert found.is_coalesced() == expected.is_coalesced(), path
            self.compare(found._indices(), expected._indices(), f"{path}._indices()")
            self.compare(found._values(), expected._values(), f"{path}._values()")
        elif found.layout in _COMPRESSED:
            rows = found.layout in {torch.sparse_csr, torch.sparse_bsr}
            for part in ("crow_indices", "col_indices") if rows else ("ccol_indices", "row_indices"):
                self.compare(getattr(found, part)(), getattr(expected, part)(), f"{path}.{part}()")
            self.compare(found.values(), expected.values(), f"{path}.values()")
        else:
            self._compare_strided(found, expected, path)

    def _compare_strided(self, found: torch.Tensor, expected: torch.Tensor, path: str) -> None:
        def view(tensor: torch.Tensor) -> tuple[object, ...]:
            bits = tensor.is_conj(), tensor.is_neg()
            return tensor.shape, tensor.stride(), tensor.storage_offset(), *bits

        assert view(found) == view(expected), path
        if found.is_quantized:
            assert found.qscheme() == expected.qscheme(), path
            assert torch.equal(found, expected), path
        if found.device.type == "cpu":
            self._compare_storages(found.untyped_storage(), expected.untyped_storage(), path)


def _attributes(value: Any) -> dict[str, Any]:
    """Return what an object has of its own, in slots and in its dict."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    found = {
        name: getattr(value, name) for name in slots if not name.startswith("__") and hasattr(value, name)
    }
    if not isinstance(value, np.random.Generator):
        found.update(getattr(value, "__dict__", {}))
    return found
