"""Tell what a pickle holds without unpickling it: no name of it is imported, nothing in it is called.

A pickle is a program for a stack machine, and whoever wrote it decides what it calls. Here it only gets to
build the plain data of `nodes`. No I/O, no torch.
"""

from __future__ import annotations

from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass
from itertools import islice
from pickletools import genops, opcodes
from typing import TYPE_CHECKING, Any

from asyncckpt._outline.nodes import (
    GlobalOutline,
    ObjectOutline,
    OrderedDictOutline,
    StorageOutline,
    TensorOutline,
    hashable,
)
from asyncckpt._outline.rebuilding import Rebuilder, new_object
from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    Handler = Callable[[Any], None]

# A hundred tensors take some 4,000 of them. Some make an object of 250 bytes.
MAX_OPERATIONS = 20_000_000
_MAX_PROTOCOL = 5
_RENAMED_BEFORE = 3  # protocols below this name what Python 2 had under the names of Python 2
_MAX_NAME = 1000
_STATEFUL = (ObjectOutline, OrderedDictOutline, TensorOutline)


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """What a pickle holds.

    Attributes:
        root: the state: plain Python values as themselves, everything else as the nodes that stand for it.
        globals: what it names, such as `torch._utils._rebuild_tensor_v2`, in order of appearance.
        storages: each storage that it names, once.
    """

    root: Any
    globals: tuple[str, ...]
    storages: tuple[StorageOutline, ...]


def outline(data: bytes) -> Outline:
    """Return what a pickle holds.

    Raises:
        CorruptCheckpointError: it is damaged, or has more than MAX_OPERATIONS operations.
    """
    machine = _Machine(len(data))
    handlers = {opcode: getattr(machine, name) for opcode, name in _METHODS.items()}
    operation, at = None, None
    try:
        for operation, argument, at in islice(genops(data), MAX_OPERATIONS):  # noqa: B007 - for the error
            handlers[operation](argument)
    except (ValueError, IndexError, OverflowError, Warning) as error:  # pickletools warns of odd escapes
        reason = "it takes what is not there" if isinstance(error, IndexError) else error
        raise CorruptCheckpointError(f"its data.pkl is damaged at byte {at or 0}: {reason}") from error
    if operation is None or operation.name != "STOP":
        raise CorruptCheckpointError(
            f"its data.pkl has more than {MAX_OPERATIONS:,} operations, too many to look at"
        )
    return Outline(machine.root, tuple(machine.globals), tuple(machine.rebuilder.storages.values()))


class _Machine:
    """The stack machine of pickle, with inert nodes. A mark puts the stack aside and begins a new one."""

    def __init__(self, size: int) -> None:
        self.root: Any = None
        self.globals: dict[str, GlobalOutline] = {}
        self.rebuilder = Rebuilder(size)
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._protocol = 0

    def proto(self, protocol: int) -> None:
        if protocol > _MAX_PROTOCOL:
            raise ValueError(f"it has protocol {protocol}, which is not known")
        self._protocol = protocol

    def ignore(self, _: Any) -> None:
        pass

    def stop(self, _: Any) -> None:
        self.root = self._stack.pop()

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def none(self, _: Any) -> None:
        self._stack.append(None)

    def newtrue(self, _: Any) -> None:
        self._stack.append(True)

    def newfalse(self, _: Any) -> None:
        self._stack.append(False)

    def empty_list(self, _: Any) -> None:
        self._stack.append([])

    def empty_tuple(self, _: Any) -> None:
        self._stack.append(())

    def empty_dict(self, _: Any) -> None:
        self._stack.append({})

    def empty_set(self, _: Any) -> None:
        self._stack.append(set())

    def next_buffer(self, _: Any) -> None:
        self._stack.append(ObjectOutline("(buffer outside of the pickle)"))

    def mark(self, _: Any) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self.since_mark()

    def dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def list(self, _: Any) -> None:
        self.push(self.since_mark())

    def tuple(self, _: Any) -> None:
        self.push(tuple(self.since_mark()))

    def tuple1(self, _: Any) -> None:
        self._stack[-1] = (self._stack[-1],)

    def tuple2(self, _: Any) -> None:
        second = self._stack.pop()
        self._stack[-1] = (self._stack[-1], second)

    def tuple3(self, _: Any) -> None:
        third, second = self._stack.pop(), self._stack.pop()
        self._stack[-1] = (self._stack[-1], second, third)

    def dict(self, _: Any) -> None:
        items = self.since_mark()
        made: dict[Any, Any] = {}
        _set_pairs(made, items)
        self.push(made)

    def frozenset(self, _: Any) -> None:
        self.push(frozenset(map(hashable, self.since_mark())))

    def append(self, _: Any) -> None:
        item = self._stack.pop()
        _items(self._stack[-1]).append(item)

    def appends(self, _: Any) -> None:
        items = self.since_mark()
        _items(self._stack[-1]).extend(items)

    def additems(self, _: Any) -> None:
        items, target = self.since_mark(), self._stack[-1]
        if type(target) is set:
            target.update(map(hashable, items))
        else:
            _items(target).extend(items)

    def setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        _set_pairs(_entries(self._stack[-1]), (key, value))

    def setitems(self, _: Any) -> None:
        items = self.since_mark()
        _set_pairs(_entries(self._stack[-1]), items)

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"it refers to its object {index} before that is made")
        self._stack.append(self._memo[index])

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def find(self, name: str) -> None:
        """Take the arguments of GLOBAL, which pickletools joins with a space."""
        module, _, qualname = name.partition(" ")
        self._stack.append(self._global(module, qualname))

    def stack_global(self, _: Any) -> None:
        qualname, module = self._stack.pop(), self._stack.pop()
        if type(qualname) is not str or type(module) is not str:
            raise ValueError("a name in it is no text")
        self._stack.append(self._global(module, qualname))

    def extension(self, code: int) -> None:
        self._stack.append(self._global("(registered extension)", str(code)))

    def reduce(self, _: Any) -> None:
        args = self._stack.pop()
        self._stack[-1] = self.rebuilder.call(self._stack[-1], args)

    def inst(self, name: str) -> None:
        args = tuple(self.since_mark())
        self.find(name)
        self._stack[-1] = new_object(self._stack[-1], args)

    def obj(self, _: Any) -> None:
        cls, *args = self.since_mark()
        self.push(new_object(cls, tuple(args)))

    def newobj(self, _: Any) -> None:
        args = self._stack.pop()
        self._stack[-1] = new_object(self._stack[-1], args)

    def newobj_ex(self, _: Any) -> None:
        kwargs, args = self._stack.pop(), self._stack.pop()
        self._stack[-1] = new_object(self._stack[-1], args, kwargs)

    def build(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) not in _STATEFUL:
            raise ValueError(f"it sets attributes of a {type(target).__name__}")
        target.state = state

    def persid(self, identity: str) -> None:
        self._stack.append(self.rebuilder.storage(identity))

    def binpersid(self, _: Any) -> None:
        self._stack[-1] = self.rebuilder.storage(self._stack[-1])

    def since_mark(self, _: Any = None) -> Any:
        """Return what was pushed since the last mark, and take the stack up again."""
        if not self._marked:
            raise ValueError("it lacks a mark")
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _global(self, module: str, qualname: str) -> GlobalOutline:
        if len(module) + len(qualname) > _MAX_NAME:
            raise ValueError(f"a name in it has {len(module) + len(qualname)} characters")
        if self._protocol < _RENAMED_BEFORE:
            if (module, qualname) in NAME_MAPPING:
                module, qualname = NAME_MAPPING[module, qualname]
            else:
                module = IMPORT_MAPPING.get(module, module)
        name = f"{module}.{qualname}"
        return self.globals.setdefault(name, GlobalOutline(name))


def _items(target: Any) -> Any:
    if type(target) is list:
        return target
    if type(target) is ObjectOutline:
        return target.items
    raise ValueError(f"it appends to a {type(target).__name__}")


def _entries(target: Any) -> Any:
    if type(target) is dict or type(target) is OrderedDictOutline:
        return target
    if type(target) is ObjectOutline:
        return target.entries
    raise ValueError(f"it sets items of a {type(target).__name__}")


def _set_pairs(target: dict[Any, Any], items: Any) -> None:
    for at in range(0, len(items), 2):
        key = items[at]
        target[key if type(key) is str else hashable(key)] = items[at + 1]


_SHARED_METHODS = {
    "push": "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING"
    " UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8",
    "ignore": "FRAME READONLY_BUFFER",
    "get": "GET BINGET LONG_BINGET",
    "put": "PUT BINPUT LONG_BINPUT",
    "find": "GLOBAL",
    "since_mark": "POP_MARK",
    "extension": "EXT1 EXT2 EXT4",
}
_METHOD_OF = {name: method for method, names in _SHARED_METHODS.items() for name in names.split()}
# Which method carries out each opcode that pickletools knows.
_METHODS = {opcode: _METHOD_OF.get(opcode.name, opcode.name.lower()) for opcode in opcodes}
