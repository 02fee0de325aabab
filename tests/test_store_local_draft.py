# ruff: noqa: ASYNC240 - the tests look at the directory with other means than the store's
from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
import threading
from typing import TYPE_CHECKING, ClassVar

import anyio
import pytest
from anyio import to_thread
from anyio.lowlevel import checkpoint

from asyncckpt.errors import StoreError
from asyncckpt.stores.local import LocalStore
from asyncckpt.testing.store_contract import content, get, put, write_all
from file_operations import FaultyOps

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = (2 << 20) + 100
PIECES = (33 << 20) + 100


class DirectOps(FaultyOps):
    """Counts the bytes that go past the page cache."""

    def __init__(self) -> None:
        super().__init__()
        self.direct_bytes = 0
        self.direct_calls = 0
        self.buffered_bytes = 0

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        count = self.pwrite_direct(fd, data, offset) if direct else super().pwrite(fd, data, offset)
        if direct:
            self.direct_bytes += count
        else:
            self.buffered_bytes += count
        return count

    def pwrite_direct(self, fd: int, data: memoryview, offset: int) -> int:
        self.direct_calls += 1
        return super().pwrite(fd, data, offset)


class HeldOps(FaultyOps):
    """Holds back the first call of an operation in its worker thread."""

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.arrived = threading.Event()
        self.release = threading.Event()
        self._operation = operation

    def before(self, operation: str, path: str) -> None:
        super().before(operation, path)
        if operation == self._operation and not self.arrived.is_set():
            self.arrived.set()
            if not self.release.wait(30):
                raise TimeoutError
            super().before("released", path)


@pytest.fixture
def ops() -> FaultyOps:
    return FaultyOps()


@pytest.fixture
def store(tmp_path: Path, ops: FaultyOps) -> LocalStore:
    return LocalStore(str(tmp_path), ops)


@pytest.fixture
def direct(tmp_path: Path) -> DirectOps:
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("no O_DIRECT on this system")
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no O_DIRECT in the temporary directory: {error}")
    (tmp_path / "probe").unlink()
    return DirectOps()


def aligned(data: bytes, shift: int = 0) -> memoryview:
    """Return `data` in memory that begins on a page, or `shift` bytes after."""
    memory = memoryview(mmap.mmap(-1, len(data) + shift))[shift:]
    memory[:] = data
    return memory


async def put_aligned(store: LocalStore, name: str, data: bytes, shift: int = 0) -> None:
    memory = aligned(data, shift)
    async with store.draft(name, len(data)) as draft:
        for offset in range(0, len(data), draft.chunk):
            await draft.write(offset, memory[offset : offset + draft.chunk])
        await draft.commit()


def leftovers(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.iterdir() if path.name != "a.pt"]


def is_temporary_path(path: str) -> bool:
    return path.endswith(".asyncckpt-tmp")


class TestOrder:
    async def test_a_commit_syncs_closes_replaces_and_syncs_the_directory(
        self, tmp_path: Path, direct: DirectOps
    ) -> None:
        ops = direct
        await put_aligned(LocalStore(str(tmp_path), ops), "a.pt", content(PIECES))
        calls = [
            (operation, "temporary" if is_temporary_path(path) else path)
            for operation, path in ops.calls
            if operation not in {"stat", "lstat", "fstat"}
        ]
        writes = [i for i, (operation, _) in enumerate(calls) if operation == "pwrite"]
        assert calls[: writes[0]] == [
            ("open", "temporary"),
            ("flock", "temporary"),
            ("open", "temporary"),
            ("fallocate", "temporary"),
            ("open_direct", "temporary"),
        ]
        assert {operation for operation, _ in calls[writes[0] : writes[-1]]} == {"pwrite"}
        assert calls[writes[-1] + 1 :] == [
            ("fsync", "temporary"),
            ("close", "temporary"),
            ("close", "temporary"),
            ("open_directory", str(tmp_path)),
            ("replace", str(tmp_path / "a.pt")),
            ("fsync_directory", str(tmp_path)),
            ("close", str(tmp_path)),
            ("close", "temporary"),
        ]
        assert ops.open_paths == []

    async def test_the_temporary_file_is_locked_until_it_is_in_its_place(self, tmp_path: Path) -> None:
        class Checked(FaultyOps):
            def replace(self, source: str, target: str) -> None:
                self.check(source)
                super().replace(source, target)
                self.check(target)

            def check(self, path: str) -> None:
                fd = os.open(path, os.O_RDWR)
                try:
                    with pytest.raises(BlockingIOError):
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                finally:
                    os.close(fd)

        ops = Checked()
        await put(LocalStore(str(tmp_path), ops), "a.pt", b"one")
        assert any(call.operation == "replace" for call in ops.calls)
        fd = os.open(tmp_path / "a.pt", os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)

    async def test_the_mode_is_that_of_the_umask(self, tmp_path: Path, store: LocalStore) -> None:
        former = os.umask(0o027)
        try:
            await put(store, "a.pt", b"one")
        finally:
            os.umask(former)
        assert (tmp_path / "a.pt").stat().st_mode & 0o7777 == 0o640


class TestFailures:
    @pytest.mark.parametrize(
        ("operation", "at"),
        [
            ("open", 1),
            ("open", 2),
            ("open_direct", 1),
            ("flock", 1),
            ("lstat", 1),
            ("fallocate", 1),
            ("pwrite", 1),
            ("pwrite", 2),
            ("fsync", 1),
            ("close", 1),
            ("open_directory", 1),
            ("replace", 1),
        ],
    )
    async def test_each_one_leaves_the_former_file_whole_and_nothing_else(
        self, tmp_path: Path, operation: str, at: int
    ) -> None:
        await self.fail_and_look(tmp_path, FaultyOps(), operation, at)

    async def test_closing_what_was_written_past_the_page_cache_is_one(
        self, tmp_path: Path, direct: DirectOps
    ) -> None:
        await self.fail_and_look(tmp_path, direct, "close", 1)
        await self.fail_and_look(tmp_path, direct, "close", 2)

    async def fail_and_look(self, tmp_path: Path, ops: FaultyOps, operation: str, at: int) -> None:
        store = LocalStore(str(tmp_path), ops)
        former, following = content(SIZE, seed=1), content(SIZE, seed=2)
        await put_aligned(store, "a.pt", former)
        for code in (errno.EIO, errno.ENOSPC):
            ops.fail(operation, OSError(code, os.strerror(code)), at=at)
            with pytest.raises(StoreError) as caught:
                await put_aligned(store, "a.pt", following)
            assert caught.value.errno == code
            assert caught.value.filename == str(tmp_path / "a.pt")
            assert isinstance(caught.value.__cause__, OSError)
            assert leftovers(tmp_path) == []
            assert ops.open_paths == []
            assert await get(store, "a.pt") == former
        await put_aligned(store, "a.pt", following)
        assert await get(store, "a.pt") == following

    async def test_a_directory_that_cannot_be_synced_is_told_of(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps
    ) -> None:
        await put(store, "a.pt", b"one")
        ops.fail("fsync_directory", OSError(errno.EIO, "Input/output error"))
        with pytest.raises(StoreError, match=r"the new a\.pt is in place, but may not outlive a power loss"):
            await put(store, "a.pt", b"two")
        assert leftovers(tmp_path) == []
        assert ops.open_paths == []
        assert await get(store, "a.pt") == b"two"

    async def test_a_directory_that_knows_no_sync_is_no_failure(
        self, store: LocalStore, ops: FaultyOps
    ) -> None:
        ops.fail("fsync_directory", OSError(errno.EINVAL, "Invalid argument"))
        await put(store, "a.pt", b"one")
        assert await get(store, "a.pt") == b"one"

    @pytest.mark.parametrize("at", [2, 3])
    async def test_closing_what_was_not_written_through_is_no_failure(
        self, store: LocalStore, ops: FaultyOps, caplog: pytest.LogCaptureFixture, at: int
    ) -> None:
        ops.fail("close", OSError(errno.EIO, "Input/output error"), at=at)
        await put(store, "a.pt", b"one")
        assert "could not close a file" in caplog.text
        assert await get(store, "a.pt") == b"one"

    async def test_a_failed_sync_is_never_tried_again(self, store: LocalStore, ops: FaultyOps) -> None:
        ops.fail("fsync", OSError(errno.EIO, "Input/output error"))
        async with store.draft("a.pt", 3) as draft:
            await write_all(draft, b"one")
            for message in ("the device that holds", "the draft of a.pt has ended"):
                with pytest.raises(StoreError, match=message):
                    await draft.commit()
                assert sum(call.operation == "fsync" for call in ops.calls) == 1
                assert ops.open_paths == []

    @pytest.mark.parametrize("commit", [True, False])
    async def test_a_draft_that_ended_takes_nothing_more(self, store: LocalStore, *, commit: bool) -> None:
        async with store.draft("a.pt", 3) as draft:
            await write_all(draft, b"one")
            if commit:
                await draft.commit()
                with pytest.raises(StoreError, match="has ended"):
                    await draft.commit()
        with pytest.raises(StoreError, match="has ended"):
            await draft.write(0, memoryview(b"two"))
        with pytest.raises(StoreError, match="has ended"):
            await draft.commit()
        assert [file.nbytes for file in await store.list()] == ([3] if commit else [])

    async def test_an_incomplete_draft_is_not_committed(self, tmp_path: Path, store: LocalStore) -> None:
        async with store.draft("a.pt", PIECES) as draft:
            await draft.write(0, memoryview(content(draft.chunk)))
            with pytest.raises(StoreError, match="to 16777216 bytes, not to the 34603108 of") as caught:
                await draft.commit()
            assert caught.value.__cause__ is None
        assert list(tmp_path.iterdir()) == []

    async def test_clean_up_that_fails_hides_nothing(
        self, store: LocalStore, ops: FaultyOps, caplog: pytest.LogCaptureFixture
    ) -> None:
        for operation in ("unlink", "close"):
            ops.fail(operation, OSError(errno.EIO, "Input/output error"), times=None)
        ops.fail("pwrite", OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(StoreError, match="no space left"):
            await put(store, "a.pt", b"one")
        assert "could not remove the temporary file" in caplog.text
        assert "could not close a file" in caplog.text

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (
                errno.ENOSPC,
                r"no space left on the disk that holds {} while writing a\.pt \(3 bytes\); free space",
            ),
            (errno.EDQUOT, "quota"),
            (errno.EACCES, "no permission in {} while .*; check its owner and mode"),
            (errno.EROFS, "read-only"),
            (errno.EFBIG, "ulimit -f"),
            (errno.EMFILE, "ulimit -n"),
            (errno.ESTALE, "{} while .*; check the disk and its mount"),
        ],
    )
    async def test_a_failure_says_what_where_and_what_to_do(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps, code: int, message: str
    ) -> None:
        ops.fail("pwrite", OSError(code, os.strerror(code)))
        with pytest.raises(StoreError, match=message.format(tmp_path)):
            await put(store, "a.pt", b"one")

    async def test_a_directory_removed_meanwhile_is_no_file_not_found(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="was removed meanwhile"):
            await put(LocalStore(str(tmp_path / "gone")), "a.pt", b"one")

    async def test_a_directory_under_the_name_is_not_replaced(
        self, tmp_path: Path, store: LocalStore
    ) -> None:
        (tmp_path / "a.pt").mkdir()
        with pytest.raises(StoreError, match="a directory stands in the way"):
            await put(store, "a.pt", b"one")
        assert leftovers(tmp_path) == []


class TestCleaners:
    async def test_a_file_locked_by_a_cleaner_is_given_up(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps
    ) -> None:
        ops.fail("flock", BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"))
        await put(store, "a.pt", b"one")
        assert len({path for operation, path in ops.calls if operation == "flock"}) == 2
        assert leftovers(tmp_path) == []
        assert ops.open_paths == []

    async def test_a_file_removed_by_a_cleaner_before_it_was_locked_is_given_up(self, tmp_path: Path) -> None:
        class Cleaned(FaultyOps):
            def flock(self, fd: int) -> None:
                if all(call.operation != "flock" for call in self.calls):
                    os.unlink(self.calls[-1].path)  # noqa: PTH108 - the seam's own call
                super().flock(fd)

        ops = Cleaned()
        store = LocalStore(str(tmp_path), ops)
        await put(store, "a.pt", b"one")
        assert await get(store, "a.pt") == b"one"
        assert ops.open_paths == []

    async def test_a_cleaner_that_takes_every_file_is_an_error(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps
    ) -> None:
        ops.fail("flock", BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), times=None)
        with pytest.raises(StoreError, match="keep other programs out"):
            await put(store, "a.pt", b"one")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
    async def test_a_file_system_without_locks_will_do(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps, code: int
    ) -> None:
        ops.fail("flock", OSError(code, os.strerror(code)), times=None)
        async with store.draft("a.pt", 3) as draft:
            await LocalStore(str(tmp_path), ops).prepare()
            await write_all(draft, b"one")
            await draft.commit()
        assert await get(store, "a.pt") == b"one"


class TestWriting:
    @pytest.mark.parametrize("longest", [1, 5000, 8192])
    async def test_short_writes_are_continued(self, store: LocalStore, ops: FaultyOps, longest: int) -> None:
        ops.longest_write = longest
        data = content(20_000 if longest == 1 else SIZE)
        await put_aligned(store, "a.pt", data)
        assert await get(store, "a.pt") == data

    async def test_a_system_that_takes_nothing_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError) as caught:
            await put(LocalStore(str(tmp_path), FaultyOps(longest_write=0)), "a.pt", b"one")
        assert caught.value.errno == errno.EIO
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
    async def test_where_space_cannot_be_reserved_the_size_is_set(
        self, store: LocalStore, ops: FaultyOps, code: int
    ) -> None:
        ops.fail("fallocate", OSError(code, os.strerror(code)))
        await put_aligned(store, "a.pt", content(SIZE))
        assert await get(store, "a.pt") == content(SIZE)

    async def test_space_is_reserved_before_the_first_byte(self, tmp_path: Path, store: LocalStore) -> None:
        async with store.draft("a.pt", PIECES):
            (temporary,) = tmp_path.iterdir()
            assert temporary.stat().st_size == PIECES
            assert temporary.stat().st_blocks * 512 >= PIECES

    async def test_whole_pages_go_past_the_page_cache(self, tmp_path: Path, direct: DirectOps) -> None:
        store = LocalStore(str(tmp_path), direct)
        await put_aligned(store, "a.pt", content(PIECES))
        assert (direct.direct_bytes, direct.buffered_bytes) == (33 << 20, 100)
        assert await get(store, "a.pt") == content(PIECES)

    async def test_unaligned_memory_and_small_files_go_through_it(
        self, tmp_path: Path, direct: DirectOps
    ) -> None:
        store = LocalStore(str(tmp_path), direct)
        await put_aligned(store, "a.pt", content(SIZE), shift=64)
        assert await get(store, "a.pt") == content(SIZE)
        await put_aligned(store, "a.pt", content((1 << 20) - 1))
        assert direct.direct_bytes == 0

    async def test_refusal_at_open_falls_back(self, tmp_path: Path, direct: DirectOps) -> None:
        store = LocalStore(str(tmp_path), direct)
        direct.fail("open_direct", OSError(errno.EINVAL, "Invalid argument"))
        await put_aligned(store, "a.pt", content(SIZE))
        assert (direct.direct_bytes, direct.buffered_bytes) == (0, SIZE)
        assert await get(store, "a.pt") == content(SIZE)

    async def test_refusal_at_the_first_write_falls_back_for_good(
        self, tmp_path: Path, direct: DirectOps
    ) -> None:
        store = LocalStore(str(tmp_path), direct)
        direct.fail("pwrite", OSError(errno.EINVAL, "Invalid argument"))
        await put_aligned(store, "a.pt", content(PIECES))
        assert (direct.direct_calls, direct.direct_bytes, direct.buffered_bytes) == (1, 0, PIECES)
        assert await get(store, "a.pt") == content(PIECES)

    async def test_a_direct_write_that_ends_within_a_page_is_finished_through_the_cache(
        self, tmp_path: Path, direct: DirectOps
    ) -> None:
        class Short(DirectOps):
            def pwrite_direct(self, fd: int, data: memoryview, offset: int) -> int:
                buffered = os.open(self._paths[fd], os.O_WRONLY)
                try:
                    return os.pwrite(buffered, data[:5000], offset)
                finally:
                    os.close(buffered)

        ops = Short()
        assert type(direct) is DirectOps
        store = LocalStore(str(tmp_path), ops)
        await put_aligned(store, "a.pt", content(SIZE))
        assert (ops.direct_bytes, ops.buffered_bytes) == (5000, SIZE - 5000)
        assert await get(store, "a.pt") == content(SIZE)

    async def test_the_time_of_the_sync_is_told(self, tmp_path: Path) -> None:
        ops = HeldOps("fsync")
        async with LocalStore(str(tmp_path), ops).draft("a.pt", 3) as draft:
            await write_all(draft, b"one")
            assert draft.sync_seconds == 0
            ops.release.set()
            await draft.commit()
            assert draft.sync_seconds > 0


async def started(ops: HeldOps) -> None:
    assert await to_thread.run_sync(ops.arrived.wait, 30)


class TestCancellation:
    """What a worker thread has begun is waited for, and then nothing is left."""

    @pytest.fixture(params=["pwrite", "fallocate"])
    def held(self, request: pytest.FixtureRequest) -> HeldOps:
        return HeldOps(request.param)

    def assert_nothing_left(self, tmp_path: Path, ops: HeldOps) -> None:
        assert leftovers(tmp_path) == []
        assert ops.open_paths == []
        operations = [operation for operation, _ in ops.calls]
        assert operations.index("released") < operations.index("close")
        assert "replace" not in operations

    async def test_by_a_cancel_scope(self, tmp_path: Path, held: HeldOps) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(put_aligned, LocalStore(str(tmp_path), held), "a.pt", content(PIECES))
            await started(held)
            group.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.wait_all_tasks_blocked()
            held.release.set()
        self.assert_nothing_left(tmp_path, held)

    @pytest.mark.parametrize("times", [1, 2])
    async def test_by_asyncio_itself(self, tmp_path: Path, held: HeldOps, times: int) -> None:
        task = asyncio.create_task(put_aligned(LocalStore(str(tmp_path), held), "a.pt", content(PIECES)))
        await started(held)
        task.cancel()
        await anyio.wait_all_tasks_blocked()
        held.release.set()
        if times == 2:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        self.assert_nothing_left(tmp_path, held)

    async def test_of_many_writes_at_once(self, tmp_path: Path) -> None:
        ops = HeldOps("pwrite")
        async with anyio.create_task_group() as group:
            group.start_soon(put, LocalStore(str(tmp_path), ops), "a.pt", content(8 * 16 << 20))
            await started(ops)
            group.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.wait_all_tasks_blocked()
            ops.release.set()
        self.assert_nothing_left(tmp_path, ops)

    async def test_is_cleaned_up_after_in_a_worker_thread(self, tmp_path: Path) -> None:
        class Where(FaultyOps):
            threads: ClassVar[list[int]] = []

            def unlink(self, path: str) -> None:
                self.threads.append(threading.get_ident())
                super().unlink(path)

        with anyio.CancelScope() as scope:
            async with LocalStore(str(tmp_path), Where()).draft("a.pt", 3):
                scope.cancel()
                await checkpoint()
        assert len(Where.threads) == 1
        assert threading.get_ident() not in Where.threads

    @pytest.mark.parametrize("operation", ["fsync", "replace", "fsync_directory"])
    @pytest.mark.parametrize("native", [True, False])
    async def test_of_a_commit_that_has_begun_lets_it_end(
        self, tmp_path: Path, operation: str, *, native: bool
    ) -> None:
        ops = HeldOps(operation)
        scope = anyio.CancelScope()

        async def save() -> None:
            with scope:
                await put(LocalStore(str(tmp_path), ops), "a.pt", content(SIZE))

        task = asyncio.create_task(save())
        await started(ops)
        cancel: Callable[[], object] = task.cancel if native else scope.cancel
        cancel()
        await anyio.wait_all_tasks_blocked()
        ops.release.set()
        await asyncio.wait([task])
        assert task.cancelled() == native
        assert (tmp_path / "a.pt").read_bytes() == content(SIZE)
        assert leftovers(tmp_path) == []
        assert ops.open_paths == []

    async def test_before_a_commit_does_not_stop_it(self, tmp_path: Path, store: LocalStore) -> None:
        with anyio.CancelScope() as scope:
            async with store.draft("a.pt", 3) as draft:
                await write_all(draft, b"one")
                scope.cancel()
                await draft.commit()
        assert (tmp_path / "a.pt").read_bytes() == b"one"
        assert leftovers(tmp_path) == []


class TestManyAtOnce:
    async def test_drafts_of_one_name_replace_each_other_whole(
        self, tmp_path: Path, store: LocalStore
    ) -> None:
        contents = {content(SIZE + i, seed=i) for i in range(6)}

        async def look() -> None:
            while True:
                await checkpoint()
                if (tmp_path / "a.pt").exists():
                    assert (tmp_path / "a.pt").read_bytes() in contents

        async with anyio.create_task_group() as readers:
            readers.start_soon(look)
            async with anyio.create_task_group() as writers:
                for data in contents:
                    writers.start_soon(put, store, "a.pt", data)
            readers.cancel_scope.cancel()
        assert (tmp_path / "a.pt").read_bytes() in contents
        assert leftovers(tmp_path) == []
