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
from asyncckpt.stores.local import LocalStore
from asyncckpt.testing import FaultyOps
from asyncckpt.testing.store_contract import content, get, names, put

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SIZE = 3 << 20

HELPER = """
import errno, os, resource, signal, sys
import anyio
from asyncckpt.errors import StoreError
from asyncckpt.stores.local import LocalStore
from asyncckpt.testing import RecordingOps
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

async def hold(directory):
    async with LocalStore(directory).draft("a.pt", 40 << 20) as draft:
        await draft.write(0, memoryview(bytes(draft.chunk)))
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
    place = tmp_path / "disk"
    place.mkdir()
    if request.param == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    else:
        image = tmp_path / "image"
        image.touch()
        os.truncate(image, 8 << 20)
        run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image)])
        mount = ["mount", "-o", "loop", str(image), str(place)]
    run(mount)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"no {command[0]} on this machine")
    if done.returncode:
        pytest.skip(f"{command[0]} is not possible here: {done.stderr.strip()}")


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
        with pytest.raises(StoreError, match=r"no space left .* a\.pt \(7\.3 MB\); free space") as caught:
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
