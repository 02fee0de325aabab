"""States of all kinds, made by hypothesis, and how to change everything in one in place."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, defaultdict, deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch.storage import TypedStorage, UntypedStorage

from sameness import raw

if TYPE_CHECKING:
    from collections.abc import Callable

_NAMES = (
    "float32 float64 float16 bfloat16 complex32 complex64 complex128 uint8 int8 int16 int32 int64 bool"
    " uint16 uint32 uint64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu bits8"
)
# Those that this torch has.
DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, n) for n in _NAMES.split() if hasattr(torch, n))


@dataclasses.dataclass
class Record:
    name: str
    value: Any


@dataclasses.dataclass(frozen=True)
class FrozenRecord:
    name: str
    value: Any


@dataclasses.dataclass(slots=True)
class SlottedRecord:
    value: Any


class Pair(NamedTuple):
    first: Any
    second: Any


class Holder:
    """Pickles by its dict."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Reducing:
    """Pickles by a function of its own."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Callable[[Any], Reducing], tuple[Any]]:
        return Reducing, (self.value,)


class TorchFunctionTensor(torch.Tensor):
    """A subclass that torch's operations pass through."""


class Model(torch.nn.Module):
    """Tied weights, a buffer, and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(3, 3).tril())


def filled(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return a tensor of bytes that depend on `seed`."""
    tensor = torch.empty(numel, dtype=dtype)
    content = raw(tensor.untyped_storage())
    pattern = torch.arange(len(content), dtype=torch.int64) * 37 + seed * 101 + 11
    content.copy_(pattern % (2 if dtype is torch.bool else 251))
    return tensor


@st.composite
def states(draw: st.DrawFn) -> Any:
    """Make a state; each time a new one, as it is to be changed."""
    return _Builder(draw).state()


class _Builder:
    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw
        self._bases: list[torch.Tensor] = []
        self._tensors: list[Any] = []
        self._containers: list[Any] = []

    def state(self) -> Any:
        for _ in range(self._draw(st.integers(1, 3))):
            numel = self._draw(st.sampled_from([0, 1, 4, 12, 24, 700]))
            self._bases.append(filled(numel, self._draw(st.sampled_from(DTYPES)), len(self._bases)))
        return self._value(3)

    def _pick(self, *options: Callable[[], Any]) -> Any:
        return self._draw(st.sampled_from(options))()

    def _value(self, depth: int) -> Any:
        if depth == 0:
            return self._pick(self._tensor, self._tensor, self._leaf)
        return self._pick(
            self._tensor, self._leaf, self._shared,
            lambda: self._dict(depth), lambda: self._sequence(depth), lambda: self._object(depth),
        )  # fmt: skip

    def _values(self, depth: int, most: int = 4) -> list[Any]:
        return [self._value(depth - 1) for _ in range(self._draw(st.integers(0, most)))]

    def _shared(self) -> Any:
        """Return once more what is in the state already; a container may not be finished yet."""
        known = [*self._tensors, *self._containers]
        return self._draw(st.sampled_from(known)) if known else None

    def _leaf(self) -> Any:
        numbers = st.one_of(
            st.integers(), st.floats(), st.complex_numbers(), st.sampled_from([2**200, -(2**63)])
        )
        texts = st.one_of(st.text(max_size=4), st.binary(max_size=4))
        others: list[Callable[[], Any]] = [
            lambda: None, lambda: True, lambda: torch.float16, lambda: torch.Size([2, 3]),
            lambda: {1, "a", None}, lambda: frozenset({2, 3}), lambda: bytearray(b"abc"), lambda: slice(1, 2),
            lambda: np.arange(6, dtype=np.int16).reshape(2, 3), lambda: np.asfortranarray(np.eye(2)),
            lambda: np.array(["a", None], dtype=object), lambda: np.array([(1, 2.5)], dtype="i4,f8"),
            lambda: np.zeros((0, 2)), lambda: np.float32(1.5), lambda: np.random.RandomState(3).get_state(),
            lambda: torch.device("cpu"),
        ]  # fmt: skip
        return self._pick(
            lambda: self._draw(numbers), lambda: self._draw(texts), self._draw(st.sampled_from(others))
        )

    def _tensor(self) -> Any:
        tensor = self._wrapped(self._view(self._draw(st.sampled_from(self._bases))))
        self._tensors.append(tensor)
        return tensor

    def _view(self, base: torch.Tensor) -> torch.Tensor:
        n = base.numel()
        options: list[Callable[[], torch.Tensor]] = [lambda: base, lambda: base[n // 3 :], lambda: base[:0]]
        if n:
            options += [lambda: base[n // 2], lambda: base[-1:].expand(3, 2), lambda: base[::2]]
            options += [lambda: base.as_strided((1, 1), (1, 1), n - 1)]
        if n % 4 == 0:
            options += [lambda: base.view(2, n // 2).t(), lambda: base.view(2, 2, n // 4)[:, 1:]]
            options += [lambda: base.view(1, 2, 1, n // 2).contiguous(memory_format=torch.channels_last)]
        if base.is_complex() and base.dtype is not torch.complex32:
            options += [base.conj, lambda: base.conj()[1:], lambda: torch.view_as_real(base)]
        if base.is_floating_point() and base.element_size() > 1:
            options += [lambda: torch._neg_view(base)]
        if base.element_size() == 2:
            options += [lambda: base.view(torch.int16)]
        return self._pick(*options)  # type: ignore[no-any-return]

    def _wrapped(self, tensor: torch.Tensor) -> Any:
        trainable = tensor.dtype in {torch.float32, torch.bfloat16, torch.complex64}

        def attributed() -> torch.Tensor:
            view = tensor.view_as(tensor)
            view.tag = [self._value(0)]  # type: ignore[attr-defined]
            return view

        return self._pick(
            lambda: tensor, lambda: tensor, lambda: tensor, attributed,
            lambda: torch.nn.Parameter(tensor, requires_grad=trainable),
            lambda: tensor.detach().requires_grad_(trainable),
            lambda: tensor.as_subclass(TorchFunctionTensor),
            tensor.untyped_storage,
            lambda: TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=torch.uint8, _internal=True),
        )  # fmt: skip

    def _dict(self, depth: int) -> Any:
        keys = st.one_of(st.text(max_size=3), st.integers(), st.tuples(st.integers(0, 2)), st.none())
        made: Any = self._pick(dict, OrderedDict, lambda: defaultdict(list))
        self._containers.append(made)
        for value in self._values(depth):
            made[self._draw(keys)] = value
        if type(made) is OrderedDict:
            made._metadata = OrderedDict(version=self._value(0))  # type: ignore[attr-defined]
        return made

    def _sequence(self, depth: int) -> Any:
        made: Any = self._pick(list, deque, tuple, lambda: Pair(1, 2))
        if isinstance(made, tuple):
            values = self._values(depth)
            return tuple(values) if type(made) is tuple else Pair(values, self._value(depth - 1))
        self._containers.append(made)
        made.extend(self._values(depth))
        return made

    def _object(self, depth: int) -> Any:
        made: Any = self._pick(lambda: Record("r", None), lambda: SlottedRecord(None), lambda: Holder(None))
        self._containers.append(made)
        made.value = self._value(depth - 1)
        return self._pick(
            lambda: made, lambda: FrozenRecord("f", made.value), lambda: copy.copy(made),
            lambda: Reducing(self._value(0)),
        )  # fmt: skip


def change_all(state: Any) -> None:
    """Change, in place, whatever can be changed in a state: bytes, views, containers and attributes."""
    found: dict[int, Any] = {}
    _collect(state, found)
    storages = {s._cdata: s for s in map(_storage_of, found.values()) if s is not None}
    for storage in storages.values():
        raw(storage).bitwise_not_()
    for value in found.values():
        _change(value)


def _storage_of(value: Any) -> UntypedStorage | None:
    if isinstance(value, TypedStorage):
        return value._untyped_storage
    if isinstance(value, UntypedStorage):
        return value
    strided = isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"
    return value.untyped_storage() if strided else None


def _collect(value: Any, found: dict[int, Any]) -> None:
    if id(value) in found:
        return
    found[id(value)] = value
    if isinstance(value, dict):
        for item in value.values():
            _collect(item, found)
    elif isinstance(value, (list, tuple, deque)):
        for item in value:
            _collect(item, found)
    for item in list(getattr(value, "__dict__", {}).values()):
        _collect(item, found)
    if isinstance(value, SlottedRecord):
        _collect(value.value, found)


def _change(value: Any) -> None:
    if isinstance(value, (dict, set)):
        value.clear()
    elif isinstance(value, (list, deque, bytearray)):
        value.extend(b"changed")
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        value[:] = "changed"
    elif isinstance(value, np.ndarray) and value.size:
        content = value.T if value.flags.f_contiguous else value
        content.view(np.uint8)[:] ^= 0xFF
    elif type(value) is torch.Tensor and value.is_leaf:
        value.data = torch.zeros(3, dtype=value.dtype)
    if isinstance(value, SlottedRecord):
        value.value = "changed"
    elif hasattr(value, "__dict__") and not isinstance(value, (torch.Tensor, type, np.ndarray)):
        for name in value.__dict__:
            value.__dict__[name] = "changed"
