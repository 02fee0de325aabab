"""A process without torch that writes and reads as fast as the machine lets it.

Started as `python bare.py DIRECTORY BYTES`, it takes requests as lines of JSON and answers each with one.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from asyncckpt._bench.bare import allocate, direct_flag, filled, in_parallel, whole_pages, write

if TYPE_CHECKING:
    from typing_extensions import Self


class BareResult(NamedTuple):
    """What the process measured of itself."""

    seconds: float
    cpu: float


class Bare:
    """The process.

    Args:
        directory: where it will write.
        nbytes: of memory that it makes ready; what it writes is taken from there again and again, what it
            reads has to fit.
    """

    def __init__(self, directory: Path, nbytes: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(directory), str(nbytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.direct: bool = self._answer()["direct"]
        self._poll = select.poll()
        self._poll.register(cast("IO[str]", self._process.stdout), select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def write(self, path: Path, nbytes: int) -> BareResult:
        """Write a new file and remove it again; the removal is not in the result."""
        self.begin_write(path, nbytes)
        return self.end_write(path)

    def begin_write(self, path: Path, nbytes: int) -> None:
        """Ask for a new file."""
        self._ask("write", path, nbytes)

    def writing(self) -> bool:
        """Return whether what was asked for is not yet done."""
        return not self._poll.poll(0)

    def end_write(self, path: Path) -> BareResult:
        """Wait for the file and remove it."""
        result = BareResult(**self._answer())
        path.unlink()
        return result

    def read(self, path: Path, *, fresh: bool) -> BareResult:
        """Read a whole file, into memory that was never touched or into warm memory."""
        self._ask("read fresh" if fresh else "read", path, path.stat().st_size)
        return BareResult(**self._answer())

    def _ask(self, action: str, path: Path, nbytes: int) -> None:
        requests = cast("IO[str]", self._process.stdin)
        requests.write(json.dumps({"action": action, "path": str(path), "nbytes": nbytes}) + "\n")
        requests.flush()

    def _answer(self) -> dict[str, Any]:
        line = cast("IO[str]", self._process.stdout).readline()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"the bare process ended with status {status}; see its error above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def bring_in_memory(nbytes: int) -> None:
    """Make sure that free memory of this size is there at once for whoever asks for it next.

    A virtual machine's host may take free memory back; to get it again takes up to seconds for a gigabyte,
    which would count against whichever measurement happens to be the first to ask.
    """
    filled(nbytes)


def read(path: str, into: memoryview, flags: int) -> float:
    """Read a whole file; returns seconds."""
    began = time.perf_counter()
    fd = os.open(path, os.O_RDONLY | flags)

    def read_range(start: int, stop: int) -> None:
        while start < stop:
            # Whole pages are asked for: the last of them ends behind the file.
            start += os.preadv(fd, [into[start : whole_pages(stop)]], start)

    try:
        in_parallel(read_range, os.fstat(fd).st_size)
        return time.perf_counter() - began
    finally:
        os.close(fd)


def main() -> None:
    """Answer requests until the input ends.

    Each has an `action`: "write" a new file from warm memory, "read" one into warm memory, or "read fresh",
    into memory that was never touched. All have `path`, and `nbytes`, the size of the file. The warm memory
    has as many bytes as the command line says, in whole chunks; a file read into it must not be larger.
    """
    flags = direct_flag(Path(sys.argv[1]))
    warm = filled(int(sys.argv[2]))
    print(json.dumps({"direct": bool(flags)}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        action, path, nbytes = request["action"], request["path"], request["nbytes"]
        memory = allocate(nbytes) if action == "read fresh" else warm
        began = time.process_time()
        seconds = write(path, nbytes, memory, flags) if action == "write" else read(path, memory, flags)
        cpu = time.process_time() - began
        del memory
        print(json.dumps({"seconds": seconds, "cpu": cpu}), flush=True)


if __name__ == "__main__":
    main()
