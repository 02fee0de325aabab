"""What the measurements share: the bare process, the plain copy, and equal conditions for all."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import states
from bare import filled

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

Samples = dict[str, list[float]]


class Options(NamedTuple):
    """How to measure.

    Attributes:
        directory: an existing one, where files may be written.
        repeat: how often.
        quick: with a small state.
    """

    directory: Path
    repeat: int
    quick: bool

    def training(self) -> states.Training:
        """Make the model and the optimizer that are saved."""
        return states.training(states.QUICK if self.quick else states.GPT2)

    def settle(self) -> None:
        """Let the disk come to rest: what was removed before is forgotten, discards included."""
        fd = os.open(self.directory, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        time.sleep(0.05 if self.quick else 0.5)


class BareResult(NamedTuple):
    """What the bare process measured of itself."""

    seconds: float
    cpu: float


class Bare:
    """A process without torch that writes and reads as fast as the machine lets it.

    Args:
        directory: where it will write.
        nbytes: the most that it will be asked to move; it makes that much memory ready.
    """

    def __init__(self, directory: Path, nbytes: int) -> None:
        program = Path(__file__).with_name("bare.py")
        # Without site-packages it starts at once and cannot import torch by accident.
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(program), str(directory), str(nbytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.direct: bool = self._answer()["direct"]
        self._poll = select.poll()
        assert self._process.stdout is not None
        self._poll.register(self._process.stdout, select.POLLIN)

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
        assert self._process.stdin is not None
        request = {"action": action, "path": str(path), "nbytes": nbytes}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"the bare process ended with status {status}; see its error above")
        answer: dict[str, Any] = json.loads(line)
        return answer


class PlainCopy:
    """Copies the tensors of a state, each storage once, into buffers that are there and warm."""

    def __init__(self, state: Any) -> None:
        sources = states.distinct_tensors(state)
        self._pairs = [(torch.empty_like(source), source) for source in sources]
        self.run()

    def run(self) -> float:
        """Copy everything; returns seconds."""
        began = time.perf_counter()
        for target, source in self._pairs:
            target.copy_(source)
        return time.perf_counter() - began


def bring_in_memory(nbytes: int) -> None:
    """Make sure that free memory of this size is there at once for whoever asks for it next.

    A virtual machine's host may take free memory back; to get it again takes up to seconds for a gigabyte,
    which would count against whichever measurement happens to be the first to ask.
    """
    filled(nbytes)


def forget_cached(path: Path) -> None:
    """Drop a file from the page cache, so that it is read from the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def forget_peak() -> None:
    """Let the peak of this process's memory count from now on."""
    # Where it cannot be reset, what came before counts as well: never less than the truth.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def status(field: str) -> float:
    """Return a figure of this process in bytes. Both resident ones count shared memory as well."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def run_apart(*arguments: str, **environment: str) -> Any:
    """Run a Python program in a process of its own; returns the JSON in the last line of its output.

    If this process is interrupted, the program and all that it has started are killed.
    """
    with subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return json.loads(output.splitlines()[-1])


def clear_up_when_told_to_go() -> None:
    """Let SIGTERM and SIGHUP raise, as Ctrl-C does: what was started ends, what was written goes."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # and not ignored, as under nohup
            signal.signal(number, leave)
