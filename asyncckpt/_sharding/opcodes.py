"""Check the operations of a pickle before it is read: they build plain data, in bounded memory and time."""

from __future__ import annotations

import re

# Repeats are bounded: the regular expressions of Python keep a mark for each.
_RUN = re.compile(
    rb"""(?:
        [\x81\x88\x89\x93()NR\]}]                 # without an argument
        | [K\x80].                                # of one byte
        | M..
        | J....
        | [G\x95].{8}
        | c[^\n]{1,200}\n[^\n]{1,200}\n           # a name, up to protocol 3
    ){1,4096}""",
    re.DOTALL | re.VERBOSE,
)
# What is followed by as many bytes as its argument says, and how long the argument is.
_COUNTED = {0x8C: 1, 0x8A: 1, ord("C"): 1, ord("X"): 4, ord("B"): 4}
# After these a tuple may be what is noted next; the second ones may have left one as it was.
_TUPLES = frozenset(b"\x85\x86\x87t" + b"abesu")
# With a place in the memo, which takes memory, and how long that is; without one it is the next.
_PUTS = {ord("q"): 1, ord("r"): 4, 0x94: 0}
_GETS = {ord("h"): 1, ord("j"): 4}
_STOP = ord(".")


def check_opcodes(data: bytes) -> None:
    """Refuse a pickle with an operation that those of plain objects do not have, or with a shared tuple.

    Tuples of tuples that are shared take exponential time as a key, and metadata share none.

    Raises:
        ValueError: what is wrong, and where.
    """
    match_run, counted = _RUN.match, _COUNTED.get
    memo: set[int] = set()
    tuples: set[int] = set()
    at, size, is_tuple = 0, len(data), False
    while True:
        if match := match_run(data, at):
            at, is_tuple = match.end(), False
        if at >= size:
            raise ValueError("it is truncated")
        operation = data[at]
        if (width := counted(operation)) is not None:
            at, is_tuple = at + 1 + width + _number(data, at, width), False
        elif operation in _TUPLES:
            at, is_tuple = at + 1, True
        elif (width := _PUTS.get(operation)) is not None:
            place = _number(data, at, width) if width else len(memo)
            _note(place, memo, tuples, is_tuple=is_tuple, most=size)
            at += 1 + width
        elif (width := _GETS.get(operation)) is not None and _number(data, at, width) not in tuples:
            at, is_tuple = at + 1 + width, False
        elif operation == _STOP:
            return
        else:
            what = "a tuple twice" if operation in _GETS else f"an operation {data[at : at + 1]!r}"
            raise ValueError(f"it has {what} at byte {at}, which no such file has")


def _number(data: bytes, at: int, width: int) -> int:
    return int.from_bytes(data[at + 1 : at + 1 + width], "little")


def _note(place: int, memo: set[int], tuples: set[int], *, is_tuple: bool, most: int) -> None:
    """Note what the memo has at a place."""
    if place > most:
        raise ValueError(f"its memo has a place {place}, which no such file has")
    memo.add(place)
    (tuples.add if is_tuple else tuples.discard)(place)
