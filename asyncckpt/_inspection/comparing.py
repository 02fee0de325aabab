"""Compare what two files hold: which entries there are, of which kind, and which of them share memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asyncckpt._outline.nodes import (
    SCALARS,
    Attribute,
    GlobalOutline,
    KeyOutline,
    ObjectOutline,
    OrderedDictOutline,
    StorageOutline,
    TensorOutline,
)
from asyncckpt._outline.texts import short
from asyncckpt._outline.walk import MAX_DEPTH, children, is_leaf, joined
from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncckpt._outline.walk import Path

# Of containers. States that share theirs may ask for the product of the numbers that they have.
MAX_PAIRS = 5_000_000
ABSENT = object()
# Of longer lists only the items that differ are told.
_SHOWN_WHOLE = 8
_KEY_WIDTH = 10_000


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which two states differ.

    Attributes:
        path: of the entry.
        what: `only in A`, `only in B`, `kind`, `shape`, `dtype` or `value`.
        a, b: the kind, shape or dtype in each; the entry itself for the others, ABSENT where there is none.
    """

    path: Path
    what: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class TensorPair:
    """Two tensors of one shape whose values are to be compared."""

    path: Path
    a: TensorOutline
    b: TensorOutline


@dataclass(frozen=True, slots=True)
class SharingDifference:
    """Tensors that view the same memory in one file only.

    Attributes:
        paths: of the tensors.
        shared_in: `A` or `B`.
    """

    paths: tuple[Path, ...]
    shared_in: str


@dataclass(slots=True)
class Comparison:
    """What two states tell without the values of their tensors."""

    differences: list[Difference] = field(default_factory=list)
    pairs: list[TensorPair] = field(default_factory=list)
    sharing: list[SharingDifference] = field(default_factory=list)


def compare(a: Any, b: Any) -> Comparison:
    """Compare two states.

    An OrderedDict is a dict here. Where tensors were, their strides, and whether they require gradients does
    not count. NaN is equal to NaN.

    Raises:
        CorruptCheckpointError: they are nested too deep, or have more than MAX_PAIRS pairs of containers.
    """
    comparer = _Comparer()
    entered: list[Iterator[tuple[Path, Any, Any]]] = [iter([((), a, b)])]
    while entered:
        found = next(entered[-1], None)
        if found is None:
            entered.pop()
        elif comparer.enters(*found):
            entered.append(_matched(*found))
            if len(entered) > MAX_DEPTH:
                raise CorruptCheckpointError(f"their states are nested more than {MAX_DEPTH:,} levels deep")
    comparer.result.sharing = comparer.sharing.differences()
    return comparer.result


class _Comparer:
    """Compares entry by entry; each pair of containers once."""

    def __init__(self) -> None:
        self.result = Comparison()
        self.sharing = _Sharing()
        self._met: set[tuple[int, int]] = set()
        self._flat: dict[int, bool] = {}

    def enters(self, path: Path, a: Any, b: Any) -> bool:
        """Compare two entries; returns whether what is in them is to be compared, too."""
        if a is ABSENT or b is ABSENT:
            self._note(path, "only in B" if a is ABSENT else "only in A", a, b)
            return False
        if type(a) is type(b) is TensorOutline:
            self.sharing.add(path, a, b)
            self._tensors(path, a, b)
            return (a.state is not None or b.state is not None) and self._is_new(a, b)
        kind = kind_of(a)
        if kind != kind_of(b):
            both_plain = type(a) in SCALARS and type(b) in SCALARS
            self._note(path, *(("value", a, b) if both_plain else ("kind", kind, kind_of(b))))
            return False
        if is_leaf(a, self._flat) and is_leaf(b, self._flat):
            return self._leaves(path, kind, a, b)
        return self._is_new(a, b)

    def _is_new(self, a: Any, b: Any) -> bool:
        """Whether these two have not been compared yet: what stands in several places is entered once."""
        pair = id(a), id(b)
        is_new = pair not in self._met
        self._met.add(pair)
        if len(self._met) > MAX_PAIRS:
            raise CorruptCheckpointError(f"more than {MAX_PAIRS:,} parts of their states would be compared")
        return is_new

    def _leaves(self, path: Path, kind: str, a: Any, b: Any) -> bool:
        if type(a) is StorageOutline:
            self._tensors(path, _whole(a), _whole(b))
        elif not _same(a, b):
            if kind in _LISTS and max(len(a), len(b)) > _SHOWN_WHOLE:
                return True
            self._note(path, "value", a, b)
        return False

    def _tensors(self, path: Path, a: TensorOutline, b: TensorOutline) -> None:
        if a.kind != b.kind:
            self._note(path, "kind", kind_of(a), kind_of(b))
        if a.dtype != b.dtype:
            self._note(path, "dtype", a.dtype, b.dtype)
        if a.shape != b.shape:
            self._note(path, "shape", a.shape, b.shape)
        else:
            self.result.pairs.append(TensorPair(path, a, b))

    def _note(self, path: Path, what: str, a: Any, b: Any) -> None:
        self.result.differences.append(Difference(path, what, a, b))


class _Sharing:
    """Finds tensors that share memory in one file and not in the other."""

    def __init__(self) -> None:
        self._storages: list[tuple[Path, str, str]] = []

    def add(self, path: Path, a: TensorOutline, b: TensorOutline) -> None:
        if a.numel and b.numel:
            self._storages.append((path, a.storage.key, b.storage.key))

    def differences(self) -> list[SharingDifference]:
        rows = self._storages
        flipped = [(path, b, a) for path, a, b in rows]
        return [*_torn(rows, "A"), *_torn(flipped, "B")]


def _torn(rows: list[tuple[Path, str, str]], where: str) -> Iterator[SharingDifference]:
    """Yield the groups of entries that have one storage here, and several there."""
    groups: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    for path, here, there in rows:
        groups[here].append((path, there))
    for group in groups.values():
        if len({there for _, there in group}) > 1:
            yield SharingDifference(tuple(path for path, _ in group), where)


def kind_of(node: Any) -> str:
    """Return what a node is: `dict`, `tensor`, or the name of a class."""
    kind = type(node)
    if kind is TensorOutline:
        return node.kind.rpartition(".")[2].lower() if node.kind in _TENSORS else str(node.kind)
    if kind is ObjectOutline:
        return str(node.name)
    return _KINDS.get(kind) or kind.__name__


def _matched(path: Path, a: Any, b: Any) -> Iterator[tuple[Path, Any, Any]]:
    """Yield what either of two containers holds, with its counterpart, or with ABSENT."""
    rest = dict(_identified(b))
    for identity, (key, child) in _identified(a):
        _, other = rest.pop(identity, (None, ABSENT))
        yield joined(path, key), child, other
    for key, child in rest.values():
        yield joined(path, key), ABSENT, child


def _identified(node: Any) -> Iterator[tuple[Any, tuple[Any, Any]]]:
    """Yield the children of a node by what is equal for the same key in two files, and for no others.

    True and 1 are not, unlike in Python. Keys that cannot be hashed are told by their texts, and those of the
    same text by their order.
    """
    texts: Counter[str] = Counter()
    for key, child in children(node):
        if type(key) in _HASHED:
            yield (type(key), key), (key, child)
        else:
            text = short(key, _KEY_WIDTH)
            texts[text] += 1
            yield (text, texts[text]), (key, child)


def _whole(storage: StorageOutline) -> TensorOutline:
    return TensorOutline(storage, storage.dtype, 0, (storage.numel,), (1,))


def _same(a: Any, b: Any) -> bool:
    """Compare two leaves of one kind."""
    kind = type(a)
    if kind in {list, tuple}:
        return len(a) == len(b) and all(
            type(one) is type(other) and _same(one, other) for one, other in zip(a, b, strict=True)
        )
    if kind in {float, complex}:
        return a == b or repr(a) == repr(b)  # NaN
    if kind in {set, frozenset}:
        return sorted(map(repr, a)) == sorted(map(repr, b))
    if kind in {GlobalOutline, KeyOutline}:
        return short(a, _KEY_WIDTH) == short(b, _KEY_WIDTH)
    return bool(a == b)


_HASHED = frozenset({*SCALARS, Attribute})
_LISTS = frozenset({"list", "tuple"})
_TENSORS = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})
_KINDS: dict[Any, str] = {
    OrderedDictOutline: "dict",
    StorageOutline: "storage",
    GlobalOutline: "name",
    type(None): "None",
}
