"""What the measurements share: the bare process, the plain copy, and equal conditions for all."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import states
from asyncckpt import __version__
from asyncckpt._bench.place import sync

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PACKAGES = ("torch", "numpy", "anyio", "isal")

Samples = dict[str, list[float]]


class Options(NamedTuple):
    """How to measure.

    Attributes:
        directory: an existing one, where files may be written.
        repeat: how often.
        quick: with a small state.
        device: where the state is: "cpu" or "cuda".
    """

    directory: Path
    repeat: int
    quick: bool
    device: str = "cpu"

    def training(self) -> states.Training:
        """Make the model and the optimizer that are saved."""
        with torch.device(self.device):
            return states.training(states.QUICK if self.quick else states.GPT2)

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def settle(self) -> None:
        """Let the disk come to rest: what was removed before is forgotten, discards included."""
        sync(self.directory)
        time.sleep(0.05 if self.quick else 0.5)


def options(doc: str | None, *, repeat: int | None = None, to_json: bool = True) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark takes: where to write, how often, and where results go."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    if sys.platform != "linux":
        parser.error("the measurements need Linux: /proc, O_DIRECT, and posix_fadvise")
    place = "an existing directory, on the disk to measure"
    parser.add_argument("--dir", type=existing, default=Path(), metavar="DIR", help=place)
    often = "how often everything is measured" + ("" if repeat is None else " (default: %(default)s)")
    parser.add_argument("--repeat", type=positive, default=repeat, help=often)
    if to_json:
        parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to a file")
    return parser


def existing(text: str) -> Path:
    """Return the directory that an option names."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return Path(text)


def positive(text: str) -> int:
    """Return the number that an option gives, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of what takes part, and of `packages`."""
    found = {"asyncckpt": __version__, "python": platform.python_version()}
    for package in (*PACKAGES, *packages):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextmanager
def temporary_directory(parent: Path) -> Iterator[Path]:
    """Make a directory for the files of one measurement."""
    folder = Path(tempfile.mkdtemp(prefix="asyncckpt-bench-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def forget_cached(path: Path) -> None:
    """Drop a file from the page cache, so that it is read from the disk."""
    sync(path)  # what is not yet written cannot be dropped
    fd = os.open(path, os.O_RDONLY)
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


def run_apart(*arguments: str, limit: float | None = None, **environment: str) -> Any:
    """Run a Python program in a process of its own; returns the JSON in the last line of its output.

    What it has started is killed when it has ended; so is the program itself if this process is interrupted.

    Raises:
        subprocess.TimeoutExpired: it took longer than `limit` seconds, and was killed.
        subprocess.CalledProcessError: it failed.
        ValueError: its last line is no JSON.
    """
    # Not a pipe: what the program has started and left behind would keep its end open.
    with tempfile.TemporaryFile() as output:
        with subprocess.Popen(
            [sys.executable, *arguments], env=os.environ | environment, stdout=output, start_new_session=True
        ) as process:
            try:
                process.wait(limit)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
        output.seek(0)
        return json.loads([b"", *output.read().splitlines()][-1])


def order(keys: Sequence[str], turn: int) -> Sequence[str]:
    """Return another order for each turn: forwards and backwards, beginning with another one each time."""
    start = turn // 2 % max(len(keys), 1)
    turned = [*keys[start:], *keys[:start]]
    return turned[::-1] if turn % 2 else turned
