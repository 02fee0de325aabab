"""What several test modules need."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from asyncckpt.series import Series

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from asyncckpt import Checkpointer
    from asyncckpt.stores.base import Store

S = TypeVar("S", bound="Store")


def torch_round_trip(state: object) -> Any:
    """Return what torch itself makes of a state that is saved and loaded."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def put_under(checkpointer: Checkpointer, store: S) -> S:
    """Let a Checkpointer work on another store from now on, such as a double that wraps its own."""
    checkpointer._store = store
    checkpointer._series = Series(store, checkpointer.directory, checkpointer._names)
    return store


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
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors
