"""What the calls in a pickle would make, as far as that can be told without making them."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from asyncckpt._outline.nodes import (
    GlobalOutline,
    ObjectOutline,
    OrderedDictOutline,
    StorageOutline,
    TensorOutline,
    hashable,
)
from asyncckpt.types import STORAGE_DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# What else torch.save has written.
_DTYPES = {
    **STORAGE_DTYPES,
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "uint8",
}
_PERSISTENT_STORAGE = 5  # the length of the persistent id of one
_PAIR = 2
# More than torch has anywhere.
_MAX_COUNT = 1 << 63
_MAX_DIMS = 60


class Rebuilder:
    """Turns calls into plain values, tensors and storages; all others into an ObjectOutline.

    Args:
        budget: how many characters and items may be copied in all. A pickle that was not made to fill the
            memory holds each of them itself, so that its own size is enough.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self.storages: dict[tuple[str, str, str, int], StorageOutline] = {}

    def call(self, function: Any, args: Any) -> Any:
        """Return what stands for `function(*args)`."""
        if type(args) is not tuple:
            args = (args,)
        if type(function) is not GlobalOutline:
            return ObjectOutline("(what another call returns)", (function, args))
        made = None
        if function.name in _TENSORS and self._affords(args):
            made = _TENSORS[function.name](*args)
        elif function.name in _VALUES and self._affords(args):
            made = _VALUES[function.name](args)
        return ObjectOutline(function.name, args) if made is None else made

    def storage(self, identity: Any) -> StorageOutline | ObjectOutline:
        """Return what a persistent id stands for; the same storage each time."""
        if type(identity) is tuple and len(identity) >= _PERSISTENT_STORAGE and identity[0] == "storage":
            _, kind, key, location, numel = identity[:_PERSISTENT_STORAGE]
            if type(kind) is GlobalOutline and type(key) is type(location) is str and _is_count(numel):
                name = kind.name.rpartition(".")[2]
                told = key, _DTYPES.get(name, name), location, numel
                return self.storages.setdefault(told, StorageOutline(*told))
        return ObjectOutline("(persistent id)", (identity,))

    def _affords(self, args: tuple[Any, ...]) -> bool:
        """Whether the arguments may be copied; the same ones may be given to any number of calls."""
        self._budget -= len(args)
        if self._budget >= 0:
            self._budget -= sum(len(arg) for arg in args if type(arg) in {str, bytes, list, tuple})
        return self._budget >= 0


def new_object(cls: Any, args: Any, kwargs: Any = None) -> ObjectOutline:
    """Return what stands for a new object of a class."""
    arguments = args if type(args) is tuple else (args,)
    if type(cls) is GlobalOutline:
        return ObjectOutline(cls.name, arguments, kwargs)
    return ObjectOutline("(object of a class that is made up)", (cls, arguments), kwargs)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _dims(value: Any) -> tuple[int, ...] | None:
    """Return a shape; those of old files are a torch.Size."""
    if type(value) is ObjectOutline and value.name == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if type(value) is tuple and len(value) <= _MAX_DIMS and all(map(_is_count, value)):
        return value
    return None


def _tensor(
    storage: Any = None, offset: Any = None, size: Any = None, stride: Any = None, *_: Any
) -> TensorOutline | None:
    shape, steps = _dims(size), _dims(stride)
    if shape is None or steps is None or len(shape) != len(steps):
        return None
    if type(storage) is not StorageOutline or not _is_count(offset) or not _is_count(prod(shape)):
        return None
    return TensorOutline(storage, storage.dtype, offset, shape, steps)


def _tensor_v2(*args: Any) -> TensorOutline | None:
    tensor = _tensor(*args)
    if tensor is not None:
        requires_grad, metadata = args[4:5], args[6] if len(args) > 6 else None  # noqa: PLR2004 - their places
        tensor.requires_grad = requires_grad == (True,)
        if type(metadata) is dict:
            tensor.conj = metadata.get("conj") is True
            tensor.neg = metadata.get("neg") is True
    return tensor


def _tensor_v3(*args: Any) -> TensorOutline | None:
    """The dtype is an argument here, the storage has none."""
    dtype = args[6] if len(args) > 6 else None  # noqa: PLR2004 - the place of that argument
    tensor = _tensor_v2(*args[:6], *args[7:])
    if tensor is None or type(dtype) is not GlobalOutline:
        return None
    tensor.dtype = dtype.name.removeprefix("torch.")
    return tensor


def _parameter(
    data: Any = None, requires_grad: Any = None, _hooks: Any = None, state: Any = None, *_: Any
) -> TensorOutline | None:
    if type(data) is not TensorOutline:
        return None
    kind = "torch.nn.parameter.Parameter"
    return replace(data, requires_grad=requires_grad is True, kind=kind, state=state)


def _from_type(
    function: Any = None, kind: Any = None, args: Any = None, state: Any = None, *_: Any
) -> TensorOutline | None:
    if type(function) is not GlobalOutline or type(kind) is not GlobalOutline or type(args) is not tuple:
        return None
    rebuild = _PLAIN_TENSORS.get(function.name)
    tensor = rebuild(*args) if rebuild else None
    return tensor and replace(tensor, kind=kind.name, state=state)


def _ordered(args: tuple[Any, ...]) -> OrderedDictOutline | None:
    made = OrderedDictOutline()
    pairs = args[0] if args else []
    if len(args) > 1 or type(pairs) is not list:
        return None
    for pair in pairs:
        if type(pair) not in {list, tuple} or len(pair) != _PAIR:
            return None
        made[hashable(pair[0])] = pair[1]
    return made


def _collected(make: type[set[Any] | frozenset[Any]]) -> Callable[[tuple[Any, ...]], Any]:
    def collect(args: tuple[Any, ...]) -> Any:
        items: Sequence[Any] = args[0] if args else []
        return make(map(hashable, items)) if len(args) <= 1 and type(items) in {list, tuple} else None

    return collect


def _encoded(args: tuple[Any, ...]) -> bytes | None:
    """Protocols that cannot hold bytes have them as text."""
    if [type(arg) for arg in args] == [str, str] and args[1] in {"latin1", "latin-1"}:
        return bytes(args[0].encode("latin-1"))
    return None


def _bytearray(args: tuple[Any, ...]) -> bytearray | None:
    data = args[0] if len(args) == 1 else _encoded(args) if args else b""
    return bytearray(data) if type(data) is bytes else None


def _complex(args: tuple[Any, ...]) -> complex | None:
    return complex(*args) if [type(arg) for arg in args] == [float, float] else None


def _reconstructed(args: tuple[Any, ...]) -> ObjectOutline | None:
    """What the oldest protocols call for an object: with its class, its plain base, and the base's value."""
    if len(args) != 3 or type(args[1]) is not GlobalOutline:  # noqa: PLR2004
        return None
    return new_object(args[0], () if args[1].name == "builtins.object" else args[2:])


_PLAIN_TENSORS: dict[str, Callable[..., TensorOutline | None]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
}
_TENSORS: dict[str, Callable[..., TensorOutline | None]] = {
    **_PLAIN_TENSORS,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
}
_VALUES: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered,
    "builtins.set": _collected(set),
    "builtins.frozenset": _collected(frozenset),
    "builtins.bytes": lambda args: None if args else b"",
    "builtins.bytearray": _bytearray,
    "builtins.complex": _complex,
    "_codecs.encode": _encoded,
    "copyreg._reconstructor": _reconstructed,
    "copyreg.__newobj__": lambda args: new_object(args[0], args[1:]) if args else None,
}
