"""Read a pickle into inert objects, without importing or running anything of it. Only the standard library.

Plain values and containers become themselves, tensors a `Tensor`, storages a `Storage`. Every other object is
an `Inert`, and what the pickle names is a subclass of it.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from math import prod
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Path = tuple[Any, ...]  # the keys that lead to something

PARAMETER = "torch.nn.parameter.Parameter"
SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray})
_IN_JSON = frozenset({type(None), bool, int, float, str})
_SEQUENCES = frozenset({list, tuple, set, frozenset})
_DICTS = frozenset({dict, OrderedDict})
_DTYPES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    "ComplexFloat": "complex64", "ComplexDouble": "complex128", "QInt8": "qint8", "QUInt8": "quint8",
    "QInt32": "qint32", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4", "Untyped": "uint8",
}  # fmt: skip
_MAX_NAME = 1000
_MAX_INTEGER = 1 << 64
_MAX_COUNT = 1 << 63
_MAX_DIMS = 60
_SORTED_PARTS, _SORTED_LENGTH = 4, 40  # how much of what is in an item of a set counts for its place
_MADE_UP = "must be a type"  # what the C unpickler says where a call has made a class


class Inert:
    """Stands for an object: records what it would be made of, and does nothing.

    Attributes:
        name: of the class or function that would make it.
        args, kwargs: what that would be called with.
        state: what would then be given to `__setstate__`, or put into its attributes.
        items, entries: what would be appended to it, and set in it by key.
    """

    __slots__ = ("args", "entries", "items", "kwargs", "state")
    name = ""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    items: list[Any]
    entries: list[tuple[Any, Any]]

    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Inert:  # noqa: PYI034 - no Self on Python 3.10
        if not isinstance(cls, type):  # as _SlowReader calls it
            return _named("(object of a class that is made up)")(cls, *args)
        self: Inert = super().__new__(cls)
        self.args, self.kwargs, self.state, self.items, self.entries = args, kwargs, None, [], []
        return self

    def __repr__(self) -> str:
        return f"{self.name}{self.args!r}"

    def __call__(self, *args: Any) -> Inert:
        return _named("(what another call returns)")(self, args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries.append((key, value))

    def append(self, item: Any) -> None:
        """Note an item."""
        self.items.append(item)

    add = append

    def extend(self, items: Iterable[Any]) -> None:
        """Note items."""
        self.items.extend(items)


class Attribute(str):
    """A key that is the name of an attribute of an object, not of an entry in it."""

    __slots__ = ()


class Storage(NamedTuple):
    """The memory that tensors view: its key, class of torch's, device and number of elements."""

    key: str
    kind: str
    location: str
    numel: int


class Tensor(NamedTuple):
    """A tensor that views a storage; offset, shape and stride are in elements.

    Attributes:
        dtype: such as `torch.float32`; None if it is that of the storage.
        conj, neg: whether its values are the conjugated or negated ones of the storage.
        kind: its class, such as `torch.nn.parameter.Parameter`.
        state: attributes that the object has beside its values.
    """

    storage: Storage
    dtype: str | None
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
    def reach(self) -> int:
        """Over how many elements of its storage it extends."""
        steps = zip(self.shape, self.stride, strict=True)
        return sum((size - 1) * step for size, step in steps) + 1 if self.numel else 0

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one behind the other, in order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return self.numel == 0
            expected *= size
        return True


class Pickled(NamedTuple):
    """What a pickle holds.

    Attributes:
        root: the state.
        globals: the classes and functions that it names, in order of appearance.
        storages: each storage that it names, once.
    """

    root: Any
    globals: list[str]
    storages: list[Storage]


def read_pickle(data: bytes, *, slow: bool = False, prefix: str = "") -> Pickled:
    """Return what a pickle holds. Whatever exception comes, it is damaged.

    Args:
        data: the pickle.
        slow: take the unpickler in Python, which does not fill the memory for references that are made up.
        prefix: of the keys of its storages, which tells those of several pickles apart.
    """
    if not slow:
        try:
            return _load(_Reader(io.BytesIO(data), encoding="latin-1"), prefix)
        except pickle.UnpicklingError as error:
            if _MADE_UP not in str(error):
                raise
    return _load(_SlowReader(io.BytesIO(data), encoding="latin-1"), prefix)


class _Resolver:
    """Has an unpickler find inert objects only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.globals: dict[str, Any] = {}
        self.storages: dict[Storage, None] = {}
        self.prefix = ""

    def find_class(self, module: str, qualname: str) -> Any:
        """Return what stands for a name. Those of Python 2 are renamed, as torch does it."""
        if len(module) + len(qualname) > _MAX_NAME:
            raise ValueError(f"a name in it has {len(module) + len(qualname)} characters")
        if (module, qualname) in NAME_MAPPING:
            module, qualname = NAME_MAPPING[module, qualname]
        name = f"{IMPORT_MAPPING.get(module, module)}.{qualname}"
        if name not in self.globals:
            self.globals[name] = _MAKERS.get(name) or _named(name)
        return self.globals[name]

    def persistent_load(self, identity: Any) -> Any:
        """Return the storage of a persistent id."""
        match identity:
            case ("storage", type() as kind, str() as key, str() as place, numel, *_) if _is_count(numel):
                storage = Storage(self.prefix + key, name_of(kind).rpartition(".")[2], place, numel)
                self.storages[storage] = None
                return storage
        return _named("(persistent id)")(identity)


class _Reader(_Resolver, pickle.Unpickler):
    """The C unpickler."""


class _SlowReader(_Resolver, pickle._Unpickler):
    """The one in Python, which takes a class that another call has made."""


def _load(reader: Any, prefix: str) -> Pickled:
    reader.prefix = prefix
    copyreg.clear_extension_cache()  # what is in there would be taken as it is
    try:
        root = reader.load()
    finally:
        copyreg.clear_extension_cache()
    return Pickled(root, list(reader.globals), list(reader.storages))


def _named(name: str) -> type[Inert]:
    return type("Inert", (Inert,), {"__slots__": (), "name": name})


def _rebuild_tensor(*args: Any, dtype: str | None = None) -> Tensor:
    filled: list[Any] = [*args, None, None, None]
    storage, offset, shape, stride, requires_grad, _, metadata = filled[:7]
    if not (isinstance(storage, Storage) and _is_shape(shape) and _is_shape(stride)):
        raise TypeError
    if len(shape) != len(stride) or not _is_count(offset) or not _is_count(prod(shape)):
        raise ValueError
    conj, neg = (type(metadata) is dict and metadata.get(name) is True for name in ("conj", "neg"))
    return Tensor(storage, dtype, offset, shape, stride, requires_grad is True, conj, neg)


def _rebuild_tensor_v3(*args: Any) -> Tensor:
    return _rebuild_tensor(*args[:6], *args[7:], dtype=name_of(args[6]))


def _rebuild_parameter(data: Any, requires_grad: Any, _hooks: Any, state: Any = None) -> Tensor:
    if not isinstance(data, Tensor):
        raise TypeError
    return data._replace(requires_grad=requires_grad is True, kind=PARAMETER, state=state)


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Tensor:
    tensor = function(*args)
    if not isinstance(tensor, Tensor):
        raise TypeError
    return tensor._replace(kind=name_of(kind), state=state)


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in {"latin1", "latin-1"}:
        raise ValueError
    return text.encode("latin-1")


def _bytearray(data: bytes | str = b"", encoding: str | None = None) -> bytearray:
    return bytearray(_encode(data, encoding or "") if isinstance(data, str) else memoryview(data))


def _lenient(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes a value, or an Inert where the arguments are not those of one."""

    def call(*args: Any) -> Any:
        try:
            return make(*args)
        except (TypeError, ValueError, AttributeError, IndexError):
            return _named(name)(*args)

    return call


# What is made: plain values and containers, and what stands for tensors.
_MAKERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
    "builtins.bytes": lambda: b"",
    "builtins.bytearray": _bytearray,
    "_codecs.encode": _encode,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
}
_MAKERS = {name: _lenient(name, make) for name, make in _MAKERS.items()}
_NAMES = {make: name for name, make in _MAKERS.items()}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _is_shape(value: Any) -> bool:
    return type(value) is tuple and len(value) <= _MAX_DIMS and all(map(_is_count, value))


def is_name(node: Any) -> bool:
    """Whether something is the name of a class or a function."""
    return isinstance(node, type) or (isinstance(node, FunctionType) and node in _NAMES)


def name_of(node: Any) -> str:
    """Return the name of a class or a function of the pickle."""
    return _NAMES[node] if isinstance(node, FunctionType) else str(node.name)


def is_leaf(node: Any) -> bool:
    """Whether nothing is in it, or plain values only."""
    if type(node) in _SEQUENCES:
        return all(type(item) in SCALARS for item in node)
    return next(children(node), None) is None


def children(node: Any, *, call: bool = True) -> Iterator[tuple[Any, Any]]:
    """Yield what something holds, each part with the last key of its path.

    Args:
        node: anything in a state.
        call: whether what an object would be made with is a part of it.
    """
    kind = type(node)
    if kind in _SEQUENCES:
        # A set has no order, but its paths should be the same each time.
        yield from enumerate(sorted(node, key=_order) if kind in {set, frozenset} else node)
    elif kind in _DICTS:
        yield from dict.items(node)
        yield from _attributes(vars(node) if kind is OrderedDict else None)
    elif kind is Tensor:
        yield from _attributes(node.state)
    elif isinstance(node, Inert):
        if node.args and call:
            yield Attribute("args"), node.args
        if node.kwargs and call:
            yield Attribute("kwargs"), node.kwargs
        yield from _attributes(node.state)
        yield from enumerate(node.items)
        yield from node.entries


def _order(item: Any) -> tuple[str, ...]:
    """Return what an item of a set is sorted by: not its `repr`, which can be exponentially long."""
    if type(item) in SCALARS:
        return (_scalar_text(item),)
    name, parts = type(item).__name__, item if type(item) is tuple else ()
    if isinstance(item, Inert):
        name, parts = item.name, item.args
    elif is_name(item):
        name = name_of(item)
    return (name, *map(_part_text, parts[:_SORTED_PARTS]))


def _part_text(part: Any) -> str:
    if type(part) not in SCALARS:
        return type(part).__name__
    return _scalar_text(part[:_SORTED_LENGTH] if type(part) in {str, bytes, bytearray} else part)


def _scalar_text(value: Any) -> str:
    is_large = type(value) is int and not is_in_json(value)
    return f"{value.bit_length()} bits" if is_large else repr(value)


def _attributes(state: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the attributes that a state sets: a dict, or a pair of one and of those that have slots."""
    for part in state if type(state) is tuple and len(state) == 2 else (state,):  # noqa: PLR2004
        if type(part) is dict:
            yield from ((Attribute(key) if type(key) is str else key, value) for key, value in part.items())
        elif part is not None:
            yield Attribute("state"), part


def is_in_json(value: Any) -> bool:
    """Whether a plain value is one that JSON has."""
    return type(value) in _IN_JSON and (type(value) is not int or -_MAX_INTEGER < value < _MAX_INTEGER)


def dtype_name(node: Tensor | Storage) -> str:
    """Return the dtype of a tensor or a storage, such as `float32`."""
    if isinstance(node, Tensor) and node.dtype is not None:
        return node.dtype.removeprefix("torch.")
    kind = node.storage.kind if isinstance(node, Tensor) else node.kind
    return _DTYPES.get(kind.removesuffix("Storage"), kind)
