"""What real processes, limits and full disks do to the local store."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import anyio
import pytest

from asyncckpt.errors import StoreError
from asyncckpt.stores.fileops import FileOps
from asyncckpt.stores.local import LocalStore
from asyncckpt.testing.store_contract import content, get, names, put
from file_operations import FaultyOps
from support import mounted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SIZE = 3 << 20


class SharedOps(FileOps):
    """Reports a file system that several machines can mount."""

    def fstatfs(self, _fd: int) -> int:
        return 0x6969  # NFS


HELPER = """
import errno, fcntl, os, resource, signal, sys
import anyio
import asyncckpt.stores.temporary
from asyncckpt.errors import StoreError
from asyncckpt.stores.local import LocalStore
from file_operations import RecordingOps
from asyncckpt.testing.store_contract import content, put

DATA = content(3 << 20, seed=2)

class Deadly(RecordingOps):
    def __init__(self, operation, call):
        super().__init__()
        self.last = operation, int(call)

    def before(self, operation, path):
        super().before(operation, path)
        if ([call.operation for call in self.calls].count(self.last[0])) == self.last[1]:
            os.kill(os.getpid(), signal.SIGKILL)

class Reserving(RecordingOps):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def fallocate(self, fd, size):
        if self.how == "truncate":
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        if self.how == "allocate":
            super().fallocate(fd, size)

async def hold(directory, tag=""):
    if tag:
        asyncckpt.stores.temporary.host_tag = lambda: tag
    async with LocalStore(directory).draft("a.pt", 40 << 20) as draft:
        await draft.write(0, memoryview(bytes(draft.chunk)))
        print(os.getpid(), flush=True)
        await anyio.sleep_forever()

async def serve(path):
    with open(path, "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        print(os.getpid(), flush=True)
        await anyio.sleep_forever()

async def die(directory, operation, call):
    await put(LocalStore(directory, Deadly(operation, call)), "a.pt", DATA)

async def limited(directory, how):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    ops = Reserving(how)
    try:
        await put(LocalStore(directory, ops), "a.pt", DATA)
    except StoreError as error:
        writes = [call.operation for call in ops.calls].count("pwrite")
        print(errno.errorcode[error.errno], writes, error, flush=True)

for line in sys.stdin:
    what, *args = line.split()
    if what == "wait":
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    elif os.fork() == 0:
        anyio.run(globals()[what], *args)
        os._exit(0)
"""


class Children:
    """Processes that use the store, forked by one that has it imported."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._helper = subprocess.Popen(
            [sys.executable, "-c", HELPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, *request: str) -> None:
        assert self._helper.stdin is not None
        self._helper.stdin.write(" ".join(request) + "\n")
        self._helper.stdin.flush()

    def line(self) -> str:
        assert self._helper.stdout is not None
        return self._helper.stdout.readline().rstrip()

    def wait(self) -> int:
        self.start("wait")
        return int(self.line())

    def close(self) -> None:
        self._helper.communicate()


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    children = Children()
    yield children
    children.close()


def entries(path: Path) -> Sequence[str]:
    return sorted(entry.name for entry in path.iterdir())


class TestKilled:
    async def test_what_a_dead_writer_left_is_removed_and_what_a_living_one_holds_is_not(
        self, tmp_path: Path, children: Children
    ) -> None:
        store = LocalStore(str(tmp_path))
        await put(store, "a.pt", b"former")
        children.start("hold", str(tmp_path))
        process = int(children.line())
        try:
            held = entries(tmp_path)
            assert len(held) == 2
            await store.prepare()
            assert entries(tmp_path) == held
        finally:
            os.kill(process, signal.SIGKILL)
        assert children.wait() == -signal.SIGKILL
        assert entries(tmp_path) == held
        await store.prepare()
        assert entries(tmp_path) == ["a.pt"]
        assert await get(store, "a.pt") == b"former"

    @pytest.mark.parametrize("ops", [FileOps(), SharedOps()], ids=["one kernel", "shared"])
    async def test_an_old_file_of_a_living_writer_with_another_host_tag_stays(
        self, tmp_path: Path, children: Children, ops: FileOps
    ) -> None:
        store = LocalStore(str(tmp_path), ops)
        children.start("hold", str(tmp_path), "0badc0de")
        process = int(children.line())
        try:
            (temporary,) = entries(tmp_path)
            assert ".0badc0de." in temporary
            os.utime(tmp_path / temporary, (0, 0))
            await store.prepare()
            assert entries(tmp_path) == [temporary]
        finally:
            os.kill(process, signal.SIGKILL)
        assert children.wait() == -signal.SIGKILL
        await store.prepare()
        assert entries(tmp_path) == []

    async def test_a_file_that_a_server_has_locked_for_a_remote_writer_stays(
        self, tmp_path: Path, children: Children
    ) -> None:
        """As NFS and SMB servers do: the flock of a client is a POSIX lock on the server's file."""
        store = LocalStore(str(tmp_path))
        temporary = tmp_path / ".a.pt.0badc0de.0123456789abcdef.asyncckpt-tmp"
        temporary.touch()
        children.start("serve", str(temporary))
        process = int(children.line())
        try:
            await store.prepare()
            assert entries(tmp_path) == [temporary.name]
        finally:
            os.kill(process, signal.SIGKILL)
        assert children.wait() == -signal.SIGKILL
        await store.prepare()
        assert entries(tmp_path) == []

    @pytest.mark.parametrize(
        ("instant", "committed"),
        [
            ("flock 1", False),
            ("fallocate 1", False),
            ("pwrite 1", False),
            ("fsync 1", False),
            ("close 1", False),
            ("replace 1", False),
            ("fsync_directory 1", True),
            ("close 4", True),
        ],
    )
    async def test_at_any_instant_one_whole_file_stands(
        self, tmp_path: Path, children: Children, instant: str, *, committed: bool
    ) -> None:
        store = LocalStore(str(tmp_path))
        await put(store, "a.pt", content(SIZE, seed=1))
        children.start("die", str(tmp_path), instant)
        assert children.wait() == -signal.SIGKILL
        assert await names(store) == ["a.pt"]
        assert await get(store, "a.pt") == content(SIZE, seed=2 if committed else 1)
        await store.prepare()
        assert entries(tmp_path) == ["a.pt"]


class TestLimits:
    @pytest.mark.parametrize(("how", "writes"), [("allocate", 0), ("truncate", 0), ("nothing", 2)])
    async def test_a_limit_on_the_size_of_files_is_an_error(
        self, tmp_path: Path, children: Children, how: str, writes: int
    ) -> None:
        await put(LocalStore(str(tmp_path)), "a.pt", b"former")
        children.start("limited", str(tmp_path), how)
        told = children.line()
        assert told.startswith(f"EFBIG {writes} ")
        assert "raise the limit (ulimit -f)" in told
        assert children.wait() == 0
        assert entries(tmp_path) == ["a.pt"]


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MiB."""
    with mounted(request.param, tmp_path) as place:
        yield place


class TestFullDisk:
    @pytest.mark.parametrize("reserve", [True, False])
    async def test_a_full_disk_is_an_error_and_takes_nothing_away(
        self, small_disk: Path, *, reserve: bool
    ) -> None:
        ops = FaultyOps()
        store = LocalStore(str(small_disk / "runs"), ops)
        await store.prepare()
        await put(store, "a.pt", content(SIZE, seed=1))
        if not reserve:
            ops.fail("fallocate", OSError(errno.EOPNOTSUPP, "Operation not supported"))
        with pytest.raises(
            StoreError, match=r"no space left .* a\.pt \(7,340,032 bytes\); free space"
        ) as caught:
            await put(store, "a.pt", content(7 << 20, seed=2))
        assert caught.value.errno == errno.ENOSPC
        assert entries(small_disk / "runs") == ["a.pt"]
        assert await get(store, "a.pt") == content(SIZE, seed=1)
        assert ops.open_paths == []
        await put(store, "a.pt", content(SIZE, seed=3))
        assert await get(store, "a.pt") == content(SIZE, seed=3)

    async def test_several_drafts_that_do_not_fit_together_fail_alone(self, small_disk: Path) -> None:
        store = LocalStore(str(small_disk / "runs"))
        await store.prepare()
        failed = []

        async def save(name: str) -> None:
            try:
                await put(store, name, content(SIZE))
            except StoreError as error:
                failed.append(error.errno)

        async with anyio.create_task_group() as group:
            for i in range(4):
                group.start_soon(save, f"{i}.pt")
        assert failed
        assert set(failed) == {errno.ENOSPC}
        whole = await names(store)
        assert len(whole) == 4 - len(failed)
        assert entries(small_disk / "runs") == whole
        for name in whole:
            assert await get(store, name) == content(SIZE)
