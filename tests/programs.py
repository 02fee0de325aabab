"""Programs in real processes that are quick to start: forked from an interpreter that has torch imported.

Each of them is the main thread of its process and ends as the interpreter ends, with all that belongs to it.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import types
import warnings
from typing import TYPE_CHECKING

import torch  # noqa: F401 - imported once, before the programs are forked

import asyncckpt  # noqa: F401 - the same

if TYPE_CHECKING:
    from typing_extensions import Self

# After so many seconds a program that hangs says where, and ends.
PATIENCE = 100.0


class Program:
    """A process that runs."""

    def __init__(self, interpreter: Interpreter, script: str, arguments: tuple[str, ...]) -> None:
        self._interpreter = interpreter
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `end`
        stdin, to_stdin = os.pipe()
        from_stdout, stdout = os.pipe()
        self._input = os.fdopen(to_stdin, "w")
        self._output = os.fdopen(from_stdout)
        request: dict[str, object] = {"script": textwrap.dedent(script), "arguments": arguments}
        self.pid = interpreter.ask(request, stdin, stdout, self._errors.fileno())
        os.close(stdin)
        os.close(stdout)

    def line(self) -> str:
        """Wait for the next line of output."""
        line = self._output.readline()
        assert line.endswith("\n"), f"it ended after {line!r}:\n{self._seen()}"
        return line[:-1]

    def tell(self, line: str = "") -> None:
        """Give it a line to read."""
        self._input.write(line + "\n")
        self._input.flush()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def end(self, *, closing_input: bool = True) -> tuple[int, str, str]:
        """Wait for its end, and for that of all that it started; return status, rest of output, errors."""
        if closing_input:
            self._input.close()
        with self._output, self._errors:
            output = self._output.read()
            self._input.close()
            return self._interpreter.ask({"wait": self.pid}), output, self._seen()

    def _seen(self) -> str:
        self._errors.seek(0)
        return self._errors.read()


class Interpreter:
    """Starts programs. Use it as a context.

    Args:
        modules: what it imports, too, for programs that would take seconds to do so.
    """

    def __init__(self, *modules: str) -> None:
        ours, theirs = socket.socketpair()
        paths = os.pathsep.join(path for path in sys.path if path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", __file__, str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": paths},
            )
        self._socket = ours

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.wait()

    def start(self, script: str, *arguments: object) -> Program:
        """Start a program."""
        return Program(self, script, tuple(map(str, arguments)))

    def run(self, script: str, *arguments: object) -> tuple[int, str, str]:
        """Run a program to its end; return its exit status, its output and its errors."""
        return self.start(script, *arguments).end()

    def ask(self, request: dict[str, object], *fds: int) -> int:
        """Send a request; return its answer."""
        data = json.dumps(request).encode()
        socket.send_fds(self._socket, [len(data).to_bytes(4, "big")], fds)
        self._socket.sendall(data)
        return int.from_bytes(self._socket.recv(4), "big", signed=True)


def _serve(connection: socket.socket) -> tuple[str, list[str]] | None:
    """Answer requests; returns what to run in a forked child, and None at the end."""
    while True:
        head, fds, _, _ = socket.recv_fds(connection, 4, 3)
        if not head:
            return None
        data = b""
        while len(data) < int.from_bytes(head, "big"):
            data += connection.recv(65536)
        request = json.loads(data)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                for number, fd in enumerate(fds):
                    os.dup2(fd, number)
                    os.close(fd)
                return request["script"], request["arguments"]
            for fd in fds:
                os.close(fd)
        connection.sendall(answer.to_bytes(4, "big", signed=True))


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sys.argv[2:]:
            importlib.import_module(name)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        found = _serve(connection)
    if found is not None:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        sys.argv = ["program", *found[1]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(found[0], "program", "exec"), main.__dict__)
