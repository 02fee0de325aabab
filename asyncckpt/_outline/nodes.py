"""What stands for the objects of a pickle that is looked at and not loaded: plain data, nothing callable."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from math import prod
from typing import Any


@dataclass(slots=True, eq=False)
class GlobalOutline:
    """A class, a function or a constant that the pickle names.

    Attributes:
        name: module and qualified name, such as `torch.float32`.
    """

    name: str


@dataclass(slots=True, eq=False, repr=False)
class ObjectOutline:
    """What the pickle would make by calling something, which has not been called.

    Attributes:
        name: of the class or function.
        args: what it would be called with.
        kwargs: the same, by name.
        state: what would then be given to `__setstate__`, or put into its attributes.
        items: what would be appended or added to it.
        entries: what would be set in it by key.
    """

    name: str
    args: tuple[Any, ...] = ()
    kwargs: Any = None
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class StorageOutline:
    """The memory that tensors view.

    Attributes:
        key: names the record with its bytes: `data/<key>`.
        dtype: of its elements, such as `float32`; `uint8` if it was saved without one.
        location: where it was, as torch.load names it: `cpu`, `cuda:0`.
        numel: number of elements.
    """

    key: str
    dtype: str
    location: str
    numel: int


@dataclass(slots=True, eq=False, repr=False)
class TensorOutline:
    """A tensor that views a storage.

    Attributes:
        storage: what it views.
        dtype: such as `float32`.
        offset: of its first element in the storage, in elements.
        shape, stride: in elements.
        requires_grad: whether it does.
        conj, neg: whether its values are the conjugated or negated ones of the storage.
        kind: its class, such as `torch.nn.parameter.Parameter`.
        state: attributes that the object has beside its values.
    """

    storage: StorageOutline
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False
    conj: bool = False
    neg: bool = False
    kind: str = "torch.Tensor"
    state: Any = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one behind the other, in order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return self.numel == 0
            expected *= size
        return True


class OrderedDictOutline(OrderedDict[Any, Any]):
    """An OrderedDict, and the attributes that the pickle sets on it, such as a state dict's `_metadata`."""

    state: Any = None


@dataclass(slots=True, eq=False)
class KeyOutline:
    """A key, or an item of a set, that is not hashed: a tuple, or whatever else is not plain.

    Attributes:
        value: what it is.
    """

    value: Any


class Attribute(str):
    """A key that is the name of an attribute of an object, not of an entry in it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Repeated:
    """A container that a walk has met before.

    Attributes:
        path: where.
    """

    path: tuple[Any, ...]


# These have nothing inside, and are equal if Python says so.
SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes})
_NODES = frozenset({GlobalOutline, ObjectOutline, StorageOutline, TensorOutline})
# The hashes of tuples and of complex numbers can be chosen, so that a dict of them takes hours to fill.
_HASHED = SCALARS - {complex}
_MAX_INTEGER = 1 << 64


def hashable(value: Any) -> Any:
    """Return what stands for `value` as a key: itself if hashing it is cheap, whoever made it."""
    kind = type(value)
    if kind in _NODES or (kind in _HASHED and (kind is not int or -_MAX_INTEGER < value < _MAX_INTEGER)):
        return value
    return KeyOutline(value)
