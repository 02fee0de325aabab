"""Check the operations of a pickle before it is read: only such as build plain data, in bounded memory."""

from __future__ import annotations

import re

# Repeats are bounded: the regular expressions of Python keep a mark for each.
_RUN = re.compile(
    rb"""(?:
        [\x81\x85-\x89\x93\x94()NRabestu\]}]      # without an argument
        | [Khq\x80].                              # of one byte
        | M..
        | [Jj]....
        | [G\x95].{8}
        | c[^\n]{1,200}\n[^\n]{1,200}\n           # a name, up to protocol 3
    ){1,4096}""",
    re.DOTALL | re.VERBOSE,
)
# What is followed by as many bytes as its argument says, and how long the argument is.
_COUNTED = {b"\x8c": 1, b"\x8a": 1, b"C": 1, b"X": 4, b"B": 4}
_PUT = b"r"  # with a place in the memo, for which the unpickler then has memory
_STOP = b"."


def check_opcodes(data: bytes) -> None:
    """Refuse a pickle with an operation that those of plain objects do not have.

    Raises:
        ValueError: what is wrong, and where.
    """
    at = 0
    while True:
        if match := _RUN.match(data, at):
            at = match.end()
            continue
        operation = data[at : at + 1]
        if operation == _STOP:
            return
        if operation == _PUT and int.from_bytes(data[at + 1 : at + 5], "little") <= len(data):
            at += 5
        elif (width := _COUNTED.get(operation)) is not None:
            at += 1 + width + int.from_bytes(data[at + 1 : at + 1 + width], "little")
        elif at >= len(data):
            raise ValueError("it is truncated")
        else:
            raise ValueError(f"it has an operation {operation!r} at byte {at}, which no such file has")
