"""Which temporary files of dead writers are removed, by file system, host tag, lock and age."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from asyncckpt.stores.fileops import FileOps
from asyncckpt.stores.local import LocalStore
from asyncckpt.stores.temporary import temporary_name
from file_operations import FaultyOps
from support import mounted

if TYPE_CHECKING:
    from pathlib import Path

NFS = 0x6969
HOUR = 3600
OTHER_HOST = ".a.pt.0badc0de.0123456789abcdef.asyncckpt-tmp"

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks statfs(2)")


class SharedOps(FaultyOps):
    """Reports a file system that several machines can mount."""

    def fstatfs(self, fd: int) -> int:
        super().fstatfs(fd)
        return NFS


def leave(path: Path, hours: float) -> None:
    """Make a file last modified so many hours ago."""
    path.write_bytes(b"half")
    made = path.stat().st_mtime
    os.utime(path, (made, made - hours * HOUR))


async def prepared(path: Path, ops: FileOps) -> list[str]:
    """Return the names in the directory after the start of a run."""
    await LocalStore(str(path), ops).prepare()
    if isinstance(ops, FaultyOps):
        assert ops.open_paths == []
    return [entry.name for entry in path.iterdir()]  # noqa: ASYNC240 - looks with other means than the store's


class TestOneKernel:
    @linux
    @pytest.mark.parametrize("kind", ["ext4", "tmpfs", "overlay"])
    async def test_an_unlocked_file_of_another_host_is_removed(self, tmp_path: Path, kind: str) -> None:
        with mounted(kind, tmp_path) as place:
            leave(place / OTHER_HOST, 0)
            ops = FaultyOps()
            remaining = await prepared(place, ops)
            assert OTHER_HOST not in remaining
            # The age does not matter: nothing was made to compare with.
            assert [call.operation for call in ops.calls].count("open") == 1

    @linux
    def test_the_type_is_that_of_statfs(self, tmp_path: Path) -> None:
        for path in (str(tmp_path), "/dev/shm", "/proc"):
            told = subprocess.run(
                ["stat", "-f", "-c", "%t", path], capture_output=True, check=True, text=True
            )
            fd = os.open(path, os.O_RDONLY)
            try:
                assert FileOps().fstatfs(fd) == int(told.stdout, 16)
            finally:
                os.close(fd)

    def test_a_descriptor_that_is_not_open_is_an_error(self) -> None:
        with pytest.raises(OSError, match=r".") as caught:
            FileOps().fstatfs(-1)
        assert caught.value.errno == (errno.EBADF if sys.platform == "linux" else errno.ENOSYS)


class TestSharedFileSystem:
    @pytest.mark.parametrize(("hours", "stays"), [(0, True), (23.99, True), (24, False), (-48, True)])
    async def test_an_unlocked_file_of_another_host_is_removed_after_24_hours(
        self, tmp_path: Path, hours: float, *, stays: bool
    ) -> None:
        leave(tmp_path / OTHER_HOST, hours)
        assert await prepared(tmp_path, SharedOps()) == [OTHER_HOST] * stays

    async def test_an_unlocked_file_of_this_host_is_removed_at_once(self, tmp_path: Path) -> None:
        leave(tmp_path / temporary_name("a.pt"), 0)
        assert await prepared(tmp_path, SharedOps()) == []

    async def test_a_file_system_that_cannot_be_identified_counts_as_shared(self, tmp_path: Path) -> None:
        fresh = OTHER_HOST.replace("0123", "4567")
        leave(tmp_path / OTHER_HOST, 25)
        leave(tmp_path / fresh, 0)
        ops = FaultyOps()
        ops.fail("fstatfs", OSError(errno.ENOSYS, "Function not implemented"), times=None)
        assert await prepared(tmp_path, ops) == [fresh]

    async def test_a_file_stays_if_its_age_cannot_be_told(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        leave(tmp_path / OTHER_HOST, 25)
        ops = SharedOps()
        ops.fail("open", OSError(errno.ENOSPC, "No space left on device"), where=lambda path: "clock" in path)
        assert await prepared(tmp_path, ops) == [OTHER_HOST]
        assert "could not remove the abandoned file" in caplog.text


@pytest.mark.parametrize("ops", [FaultyOps(), SharedOps()], ids=["one kernel", "shared"])
class TestAnywhere:
    @pytest.mark.parametrize("name", [OTHER_HOST, temporary_name("a.pt")], ids=["other host", "this host"])
    async def test_a_file_that_cannot_be_locked_stays(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, ops: FaultyOps, name: str
    ) -> None:
        leave(tmp_path / name, 48)
        ops.fail("flock", OSError(errno.ENOLCK, "No locks available"))
        assert await prepared(tmp_path, ops) == [name]
        assert "could not remove the abandoned file" in caplog.text

    async def test_a_symbolic_link_of_another_host_is_removed_after_24_hours(
        self, tmp_path: Path, ops: FaultyOps
    ) -> None:
        link = tmp_path / OTHER_HOST
        link.symlink_to("a.pt")
        (tmp_path / temporary_name("last.pt")).symlink_to("a.pt")
        assert await prepared(tmp_path, ops) == [OTHER_HOST]
        made = link.lstat().st_mtime
        os.utime(link, (made, made - 24 * HOUR), follow_symlinks=False)
        assert await prepared(tmp_path, ops) == []
