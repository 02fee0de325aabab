"""Watch the memory of a process and of all that it has started, from a process without torch.

Started as `python tree_memory.py PID`, it answers each line of its input with the bytes of now and the peak
since the line before. Memory that several of the processes share is counted once (the proportional set size).
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from typing_extensions import Self

INTERVAL = 0.02


class Reading(NamedTuple):
    """Bytes of a tree of processes: now, and at most since the reading before."""

    now: int
    peak: int


class TreeMemory:
    """The memory of a process and of all its children.

    Args:
        pid: of the process; None for this one.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._pid = os.getpid() if pid is None else pid

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", __file__, str(self._pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._process.communicate()

    def read(self) -> Reading:
        """Return the memory of now and the peak since the last time."""
        requests, answers = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)
        requests.write("\n")
        requests.flush()
        return Reading(*json.loads(answers.readline()))


def tree(pid: int) -> Iterator[int]:
    """Yield a process and all below it, but not this one."""
    if pid == os.getpid():
        return
    yield pid
    for task in _entries(Path(f"/proc/{pid}/task")):
        with suppress(OSError):
            for child in (task / "children").read_text(encoding="ascii").split():
                yield from tree(int(child))


def memory(pid: int) -> int:
    """Return the proportional set size of a process in bytes; 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def main() -> None:
    """Watch, and answer, until the input ends."""
    pid, peak = int(sys.argv[1]), 0
    while True:
        now = sum(map(memory, tree(pid)))
        peak = max(peak, now)
        if select.select([sys.stdin], [], [], INTERVAL)[0]:
            if not sys.stdin.readline():
                return
            print(json.dumps([now, peak]), flush=True)
            peak = 0


if __name__ == "__main__":
    main()
