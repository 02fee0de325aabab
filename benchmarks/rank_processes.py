"""Run a program as the ranks of a process group on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_PAUSE = 0.05
_TOLD = 4096  # bytes of what each rank has told, if one fails


def run_ranks(size: int, *arguments: str, limit: float) -> list[Any]:
    """Run a Python program as each rank; returns the JSON in the last line of each one's output, by rank.

    Each has the variables that torchrun sets, `OMP_NUM_THREADS=1` among them. When one fails, all are killed,
    with what they have started.

    Args:
        size: how many ranks.
        arguments: the program, and its arguments.
        limit: seconds.

    Raises:
        subprocess.TimeoutExpired: they took longer than `limit`.
        subprocess.CalledProcessError: a rank failed.
        ValueError: the last line of a rank is no JSON.
    """
    command = [sys.executable, *arguments]
    with ExitStack() as stack:
        outputs, errors = (
            [stack.enter_context(tempfile.TemporaryFile()) for _ in range(size)] for _ in range(2)
        )
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(_kill, processes)
        environment = os.environ | {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(size),
            "OMP_NUM_THREADS": "1",
        }
        for rank, (output, error) in enumerate(zip(outputs, errors, strict=True)):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                subprocess.Popen(command, env=own, stdout=output, stderr=error, start_new_session=True)
            )
        try:
            _wait(processes, limit)
        except subprocess.SubprocessError:
            for error in errors:
                error.seek(0)
                sys.stderr.buffer.write(error.read()[-_TOLD:])
            raise
        return [_last_line(output) for output in outputs]


def _wait(processes: Sequence[subprocess.Popen[bytes]], limit: float) -> None:
    """Wait until all have ended, or one has failed."""
    end = time.monotonic() + limit
    while True:
        statuses = [process.poll() for process in processes]
        for process, status in zip(processes, statuses, strict=True):
            if status:
                raise subprocess.CalledProcessError(status, process.args)
        if None not in statuses:
            return
        if time.monotonic() > end:
            raise subprocess.TimeoutExpired(processes[0].args, limit)
        time.sleep(_PAUSE)


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def _last_line(output: IO[bytes]) -> Any:
    output.seek(0)
    return json.loads([b"", *output.read().splitlines()][-1])
