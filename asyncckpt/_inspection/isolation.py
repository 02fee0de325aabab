"""Read foreign pickles in a child process without torch, with limits on its memory, time and rights."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

# What the child may use, and beyond that for each byte of the pickles. One of a hundred thousand tensors has
# 10 MB; it takes 150 MB and a second, and the result 14 MB.
MEMORY, MEMORY_PER_BYTE = 1 << 30, 4
SECONDS, BYTES_PER_SECOND = 20, 1 << 20
OUTPUT, OUTPUT_PER_BYTE = 64 << 20, 8

_NAMED = 3  # of many paths, in a message

# The package itself would import torch: a stub of its name leads to the modules that do not.
_PROGRAM = """
import sys, types
package = sys.modules["asyncckpt"] = types.ModuleType("asyncckpt")
package.__path__ = sys.argv[1:2]
from asyncckpt._inspection.child import main
main(sys.argv[2], *map(int, sys.argv[3:]))
"""


def look_at(
    task: str,
    pickles: Sequence[tuple[str, bytes]],
    states: Sequence[Any] = (None, None),
    record: str = "data.pkl",
) -> dict[str, Any]:
    """Return the result of a task of `child.main`. Nothing in the pickles is run; their cost is bounded.

    Args:
        task: which one.
        pickles: the path of the file and the bytes of each.
        states: for `differences`, the entries of each state as `folder_state` takes them; None for one that
            is one pickle.
        record: what the pickles are called, for errors.

    Raises:
        CorruptCheckpointError: a pickle is damaged, or takes more than that.
    """
    sizes = [len(data) for _, data in pickles]
    header = json.dumps({"sizes": sizes, "states": states, "record": record}).encode()
    total = len(header) + sum(sizes)
    memory, seconds = MEMORY + MEMORY_PER_BYTE * total, SECONDS + total // BYTES_PER_SECOND
    most = OUTPUT + OUTPUT_PER_BYTE * total
    arguments = [Path(__file__).parents[1], task, memory, seconds, len(header)]
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM, *map(str, arguments)]
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing) as child:  # noqa: S603 - our own
        try:
            output = _exchange(child, [header, *(data for _, data in pickles)], most)
        finally:
            child.kill()
    result: dict[str, Any] | None = None
    if len(output) <= most:
        with suppress(ValueError):
            result = json.loads(output)
    if result is None:
        paths = list(dict.fromkeys(path for path, _ in pickles))
        raise CorruptCheckpointError(
            f"{' or '.join(paths[:_NAMED])}: its {record} of {sum(sizes):,} bytes cannot be looked at"
            f" in {memory >> 20:,} MiB of memory and {seconds:,} s (exit status {child.returncode})"
        )
    if "error" in result:
        raise CorruptCheckpointError(f"{pickles[result['pickle']][0]}: {result['error']}")
    return result


def _exchange(child: subprocess.Popen[bytes], given: Sequence[bytes], most: int) -> bytes:
    """Give a process what it reads, and return what it prints, up to one byte more than `most`."""
    if child.stdin is None or child.stdout is None:
        raise AssertionError
    with suppress(BrokenPipeError):  # it was ended
        for data in given:
            child.stdin.write(data)
    with suppress(BrokenPipeError):
        child.stdin.close()
    return child.stdout.read(most + 1)
