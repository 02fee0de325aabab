"""What several test modules need."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncckpt._threads import Condition
from asyncckpt.stores import LocalStore
from asyncckpt.testing import FaultyStore, SlowStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path
    from types import FrameType

    from asyncckpt.testing import Gate


def torch_round_trip(state: object) -> Any:
    """Return what torch itself makes of a state that is saved and loaded."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def faulty_store(path: Path) -> FaultyStore:
    """Return the store of a local directory, whose operations can be made to fail."""
    return FaultyStore(LocalStore(str(path)))


def gated_store(path: Path, gate: Gate, *operations: str) -> SlowStore:
    """Return the store of a local directory that holds back operations, the commit if none are named."""
    return SlowStore(LocalStore(str(path)), gates=dict.fromkeys(operations or ["commit"], gate))


def payload_offset(path: Path, record: str) -> int:
    """Return where torch's reader finds the bytes of a record."""
    reader: Any = torch._C.PyTorchFileReader(str(path))
    offset: int = reader.get_record_offset(record)
    return offset


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def assert_waits(ended: Callable[[], object], threads: Iterable[threading.Thread] | None = None) -> None:
    """Return once a call in a thread of the test waits for asyncckpt's threads; fail if it ends instead.

    Args:
        ended: whether it has ended.
        threads: where it may be; any thread with none of asyncckpt's names if not told.
    """
    while not ended():
        frames = sys._current_frames()
        for thread in threading.enumerate() if threads is None else threads:
            ours = thread is threading.current_thread() or thread.name.startswith("asyncckpt")
            if not ours and is_waiting(frames.get(thread.ident or 0)):
                return
        time.sleep(0.001)
    pytest.fail("it has not waited")


def is_waiting(frame: FrameType | None) -> bool:
    """Return whether a thread with this frame waits for asyncckpt's threads."""
    while frame is not None:
        # The first attempt has failed, and the call sleeps until something changes.
        if frame.f_code is Condition.until.__code__ and "wakeup" in frame.f_locals:
            return True
        frame = frame.f_back
    return False


def start_python(script: str, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a Python program with asyncckpt at hand."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **(env or {})}
    )


def run_python(script: str, *arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run a Python program to its end; returns its exit status, its output and its errors."""
    process = start_python(script, *arguments, env=env)
    output, errors = process.communicate(timeout=100)
    return process.returncode, output, errors


@contextmanager
def mounted(kind: str, path: Path) -> Iterator[Path]:
    """Mount a small file system of a kind below `path`; the test is skipped where that is impossible."""
    place = path / "mounted"
    place.mkdir()
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    elif kind == "overlay":
        layers = [path / name for name in ("lower", "upper", "work")]
        for layer in layers:
            layer.mkdir()
        options = ",".join(f"{layer.name}dir={layer}" for layer in layers)
        command = ["mount", "-t", "overlay", "-o", options, "overlay", str(place)]
    else:
        image = path / "image"
        image.touch()
        os.truncate(image, 8 << 20)
        _run_or_skip([f"mkfs.{kind}", "-q", "-m", "0", "-O", "^has_journal", str(image)])
        command = ["mount", "-o", "loop", str(image), str(place)]
    _run_or_skip(command)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _run_or_skip(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"no {command[0]} on this machine")
    if done.returncode:
        pytest.skip(f"{command[0]} is not possible here: {done.stderr.strip()}")
