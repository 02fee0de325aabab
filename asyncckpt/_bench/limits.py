"""What no save can beat: a plain copy of the tensors, and a process that does nothing but write."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch

from asyncckpt._bench.bare import filled
from asyncckpt._bench.states import distinct_tensors

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class BareResult(NamedTuple):
    """What the bare process measured of itself."""

    seconds: float
    cpu: float


class Bare:
    """A process without torch that writes and reads as fast as the machine lets it.

    Args:
        directory: where it will write.
        nbytes: of memory that it makes ready; what it writes is taken from there again and again, what it
            reads has to fit.
    """

    def __init__(self, directory: Path, nbytes: int) -> None:
        program = Path(__file__).with_name("bare.py")
        # Without site-packages it starts at once and cannot import torch by accident.
        self._process = subprocess.Popen(  # noqa: S603 - a program of ours, by its path
            [sys.executable, "-S", "-E", str(program), str(directory), str(nbytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.direct: bool = self._answer()["direct"]
        self._poll = select.poll()
        self._poll.register(_pipe(self._process.stdout), select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._process.communicate()

    def write(self, path: Path, nbytes: int) -> BareResult:
        """Write a new file and remove it again; the removal is not in the result."""
        self.begin_write(path, nbytes)
        return self.end_write(path)

    def begin_write(self, path: Path, nbytes: int) -> None:
        """Ask for a new file."""
        self._ask("write", path, nbytes)

    def writing(self) -> bool:
        """Whether what was asked for is not yet done."""
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
        request = {"action": action, "path": str(path), "nbytes": nbytes}
        pipe = _pipe(self._process.stdin)
        pipe.write(json.dumps(request) + "\n")
        pipe.flush()

    def _answer(self) -> dict[str, Any]:
        line = _pipe(self._process.stdout).readline()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"the bare process ended with status {status}; see its error above")
        answer: dict[str, Any] = json.loads(line)
        return answer


class PlainCopy:
    """Copies the tensors of a state, each storage once, into host buffers that are there and warm.

    Those on a GPU go into pinned memory.
    """

    def __init__(self, state: Any) -> None:
        self._pairs = [(_buffer(source), source) for source in distinct_tensors(state)]
        self._on_gpu = any(source.is_cuda for _, source in self._pairs)
        self.run()

    def run(self) -> float:
        """Copy everything; returns seconds."""
        began = time.perf_counter()
        for target, source in self._pairs:
            target.copy_(source, non_blocking=source.is_cuda)
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began


def _pipe(end: IO[str] | None) -> IO[str]:
    if end is None:
        raise RuntimeError("the bare process was started without pipes")
    return end


def _buffer(source: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)


def bring_in_memory(nbytes: int) -> None:
    """Make sure that free memory of this size is there at once for whoever asks for it next.

    A virtual machine's host may take free memory back; to get it again takes up to seconds for a gigabyte,
    which would count against whichever measurement happens to be the first to ask.
    """
    filled(nbytes)
