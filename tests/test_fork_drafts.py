"""A forked child holds no descriptor of its parent's drafts, and cannot use or remove them."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from asyncckpt.stores.local import LocalStore
from programs import Interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Writes a.pt in a thread, which is held before or after a call of a file operation.
PREPARE = """
import errno, faulthandler, gc, itertools, mmap, os, signal, sys, threading, traceback, warnings
from asyncckpt import StoreError
from asyncckpt.stores.fileops import FileOps
from asyncckpt.stores.local_draft import LocalDraft

warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)

def give_up(*error):
    traceback.print_exception(*error)
    sys.stderr.flush()
    os._exit(1)  # the end of the program would wait for the thread that is held

sys.excepthook = give_up
faulthandler.cancel_dump_traceback_later()  # its thread does not survive a fork
signal.alarm(100)
path = sys.argv[1]
SIZE = (2 << 20) + 100
DATA = memoryview(mmap.mmap(-1, SIZE))  # of whole pages, which go past the page cache
DATA[:] = bytes(i % 251 for i in range(1000)) * 2097 + bytes(252)
arrived, release = threading.Event(), threading.Event()

def held(operation, call, when):
    def run(*args):
        if next(calls) != call:
            return real(*args)
        if when == "after":
            result = real(*args)
        arrived.set()
        assert release.wait(80)
        return result if when == "after" else real(*args)

    calls, ops = itertools.count(1), FileOps()
    real = getattr(ops, operation)
    setattr(ops, operation, run)
    return ops

def started(operation, call, when, commit=True):
    # returns the draft and the thread that writes it
    def write():
        try:
            draft.open()
            draft._write(0, DATA)
            if commit:
                draft._commit()
        finally:
            draft.drop()

    draft = LocalDraft(held(operation, call, when), path, "a.pt", SIZE)
    thread = threading.Thread(target=write)
    thread.start()
    assert arrived.wait(80)
    return draft, thread

def opened():
    # the files of the directory that this process has open
    links = [os.readlink(fd.path) for fd in os.scandir("/proc/self/fd") if os.path.lexists(fd.path)]
    return [link for link in links if link.startswith(path + "/")]

def child(body):
    # runs a function in a forked child; returns its process id
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(80)
    try:
        body()
    except BaseException as error:
        give_up(error)
    os._exit(0)

def run_child(body):
    assert os.waitstatus_to_exitcode(os.waitpid(child(body), 0)[1]) == 0
"""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


def run(interpreter: Interpreter, body: str, *arguments: object) -> None:
    # The orderly end of an interpreter with torch would take most of the time.
    status, _, errors = interpreter.run(PREPARE + textwrap.dedent(body) + "os._exit(0)", *arguments)
    assert (status, errors) == (0, "")


INSTANTS = [
    "open 1 after",  # the lock's, which no object holds yet
    "flock 1 before",
    "open 2 after",
    "fallocate 1 before",
    "open_direct 1 after",
    "pwrite 1 before",
    "fsync 1 before",
    "close 1 before",
    "close 1 after",
    "close 2 before",
    "replace 1 before",
    "replace 1 after",
    "fsync_directory 1 before",
]


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_child_holds_no_descriptor_of_a_draft_at_any_instant(
    interpreter: Interpreter, tmp_path: Path, instant: str
) -> None:
    body = """
        draft, thread = started(sys.argv[2], int(sys.argv[3]), sys.argv[4])

        def body():
            assert opened() == [], opened()

        assert opened() != []
        run_child(body)
        release.set()
        thread.join()
        with open(path + "/a.pt", "rb") as file:
            assert file.read() == DATA
        assert os.listdir(path) == ["a.pt"] and opened() == []
        """
    run(interpreter, body, tmp_path, *instant.split())


@pytest.mark.parametrize("instant", ["unlink 1 before", "unlink 1 after", "close 3 before"])
def test_a_child_holds_no_descriptor_of_a_draft_that_is_dropped(
    interpreter: Interpreter, tmp_path: Path, instant: str
) -> None:
    body = """
        draft, thread = started(sys.argv[2], int(sys.argv[3]), sys.argv[4], commit=False)

        def body():
            assert opened() == [], opened()

        assert opened() != []
        run_child(body)
        release.set()
        thread.join()
        assert os.listdir(path) == opened() == []
        """
    run(interpreter, body, tmp_path, *instant.split())


@pytest.mark.parametrize("instant", ["open 1 after", "pwrite 1 before", "fsync 1 before"])
def test_a_draft_cannot_be_used_in_a_child_and_its_file_stays(
    interpreter: Interpreter, tmp_path: Path, instant: str
) -> None:
    body = """
        draft, thread = started(sys.argv[2], int(sys.argv[3]), sys.argv[4])

        def body():
            global draft
            for use in (draft.open, lambda: draft._write(0, DATA), draft._commit):
                try:
                    use()
                except StoreError as error:
                    assert "draft of a.pt has ended, here: it belongs to the process that" in str(error)
                    assert error.errno == errno.EBADF
                else:
                    raise AssertionError(use)
            draft.drop()
            draft.drop()
            del draft, use
            gc.collect()

        before = os.listdir(path)
        assert len(before) == 1
        run_child(body)
        assert os.listdir(path) == before
        release.set()
        thread.join()
        with open(path + "/a.pt", "rb") as file:
            assert file.read() == DATA
        """
    run(interpreter, body, tmp_path, *instant.split())


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_descriptor_that_got_a_number_of_a_draft_stays_open_in_a_child(
    interpreter: Interpreter, tmp_path: Path, call: int
) -> None:
    """The number is free again as soon as the system has closed it, before the draft is told."""
    body = """
        draft, thread = started("close", int(sys.argv[2]), "after")
        ours = [os.open(sys.executable, os.O_RDONLY) for _ in range(8)]

        def body():
            for fd in ours:
                assert os.pread(fd, 4, 0) == b"\\x7fELF"

        run_child(body)
        release.set()
        thread.join()
        """
    run(interpreter, body, tmp_path, call)


async def test_a_draft_of_a_killed_parent_is_removed_while_its_child_lives(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    body = """
        def body():
            os.close(1)  # the test reads until the end of the parent
            signal.pause()

        draft, thread = started("fsync", 1, "before")
        print(child(body), flush=True)
        """
    program = interpreter.start(PREPARE + textwrap.dedent(body), tmp_path)
    child = int(program.line())
    try:
        program.kill()
        assert program.end()[0] == -signal.SIGKILL
        await LocalStore(str(tmp_path)).prepare()
        assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240 - looks with other means than the store's
    finally:
        os.kill(child, signal.SIGKILL)
