# ruff: noqa: ASYNC240 - the tests look at the directory with other means than the store's
from __future__ import annotations

import asyncio
import errno
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.errors import StoreError
from asyncckpt.stores.local import LocalStore
from asyncckpt.stores.local_file import PAGE, LocalFile, direct_range
from asyncckpt.stores.temporary import host_tag, is_temporary, temporary_name
from asyncckpt.testing.folder_contract import FolderContract
from asyncckpt.testing.store_contract import content, get, names, put
from file_operations import Call, FaultyOps, RecordingOps

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class TestContract(FolderContract):
    @pytest.fixture(autouse=True)
    def place(self, tmp_path: Path) -> None:
        self._directory = tmp_path / "runs" / "gpt"

    def make_store(self) -> LocalStore:
        return LocalStore(str(self._directory))


@pytest.fixture
def ops() -> FaultyOps:
    return FaultyOps()


@pytest.fixture
def store(tmp_path: Path, ops: FaultyOps) -> LocalStore:
    return LocalStore(str(tmp_path), ops)


def called(ops: RecordingOps, *operations: str) -> Sequence[Call]:
    return [call for call in ops.calls if call.operation in operations]


class TestNames:
    async def test_path_of_is_as_given_and_work_goes_to_where_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        store = LocalStore("runs")
        assert store.path_of("a.pt") == "runs/a.pt"
        assert repr(store) == "LocalStore('runs')"
        monkeypatch.chdir("/")
        await store.prepare()
        await put(store, "a.pt", b"one")
        assert (tmp_path / "runs" / "a.pt").read_bytes() == b"one"

    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\0b", "x" * 256, "é" * 128])
    async def test_what_is_no_name_is_refused(self, store: LocalStore, name: str) -> None:
        await put(store, "a.pt", b"one")
        buffer = memoryview(bytearray(1))
        for refused in (
            store.stat(name),
            store.read(name, 0, buffer),
            store.remove(name),
            store.copy("a.pt", name),
            store.link("a.pt", name),
            put(store, name, b"two"),
        ):
            with pytest.raises(StoreError, match="cannot be the name of a file"):
                await refused

    @pytest.mark.parametrize("source", ["", "..", "/a", "a/", "a\0b", "b/" + "x" * 256])
    async def test_what_leads_to_no_file_is_no_source(self, store: LocalStore, source: str) -> None:
        for refused in (store.copy(source, "a.pt"), store.link(source, "a.pt")):
            with pytest.raises(StoreError, match="cannot be the name of a file"):
                await refused

    @pytest.mark.parametrize("directory", ["sub", "../beside"])
    async def test_another_directory_may_hold_the_source(self, tmp_path: Path, directory: str) -> None:
        store, other = LocalStore(str(tmp_path / "run")), LocalStore(str(tmp_path / "run" / directory))
        await store.prepare()
        await other.prepare()
        await put(other, "a.pt", b"one")
        await store.copy(f"{directory}/a.pt", "copy.pt")
        await store.link(f"{directory}/a.pt", "link.pt")
        assert str((tmp_path / "run" / "link.pt").readlink()) == f"{directory}/a.pt"
        await put(other, "a.pt", b"two")
        assert await get(store, "copy.pt") == b"one"
        assert await get(store, "link.pt") == b"two"

    @pytest.mark.parametrize("name", ["x" * 255, "日" * 85])
    async def test_the_longest_names_work(self, store: LocalStore, name: str) -> None:
        await put(store, name, b"one")
        await store.copy(name, "a.pt")
        await store.link("a.pt", name)
        assert await get(store, name) == b"one"

    @given(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1))
    def test_temporary_names_fit_are_known_and_never_the_same(self, name: str) -> None:
        first, second = temporary_name(name), temporary_name(name)
        assert first != second
        assert is_temporary(first)
        assert len(os.fsencode(first)) <= 140
        assert host_tag() in first

    def test_windows_is_refused_in_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "win32")
        with pytest.raises(StoreError, match="does not support Windows"):
            LocalStore("runs")


class TestPrepare:
    async def test_each_new_directory_is_synced_in_its_parent(self, tmp_path: Path, ops: FaultyOps) -> None:
        await LocalStore(str(tmp_path / "a" / "b"), ops).prepare()
        assert called(ops, "mkdir", "fsync_directory") == [
            Call("mkdir", str(tmp_path / "a")),
            Call("fsync_directory", str(tmp_path)),
            Call("mkdir", str(tmp_path / "a" / "b")),
            Call("fsync_directory", str(tmp_path / "a")),
        ]

    async def test_a_directory_made_by_another_process_meanwhile_is_synced_too(self, tmp_path: Path) -> None:
        class Overtaken(RecordingOps):
            def mkdir(self, path: str) -> None:
                os.mkdir(path)  # noqa: PTH102 - the seam's own call
                super().mkdir(path)

        ops = Overtaken()
        await LocalStore(str(tmp_path / "a"), ops).prepare()
        assert called(ops, "fsync_directory") == [Call("fsync_directory", str(tmp_path))]

    @pytest.mark.parametrize("below", ["", "b"])
    async def test_a_file_in_the_way_is_an_error(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "a").write_bytes(b"file")
        with pytest.raises(StoreError, match="is a file, not a directory") as caught:
            await LocalStore(str(tmp_path / "a" / below)).prepare()
        assert caught.value.errno == errno.ENOTDIR

    async def test_a_link_to_nowhere_in_the_way_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("nowhere")
        with pytest.raises(StoreError):
            await LocalStore(str(tmp_path / "a")).prepare()

    async def test_only_what_dead_writers_left_is_removed(self, tmp_path: Path, store: LocalStore) -> None:
        abandoned = tmp_path / temporary_name("a.pt")
        abandoned.write_bytes(b"half")
        (tmp_path / temporary_name("last.pt")).symlink_to("a.pt")
        foreign = [
            "a.pt",
            "a.pt.asyncckpt-tmp",
            ".a.pt.tmp",
            f".a.pt.{host_tag()}.asyncckpt-tmp",
            temporary_name("a.pt")[1:],
            temporary_name("a.pt") + "~",
        ]
        for name in foreign:
            (tmp_path / name).write_bytes(b"whole")
        (tmp_path / temporary_name("folder")).mkdir()
        async with store.draft("b.pt", 1):
            living = [call.path for call in store._ops.calls if call.operation == "flock"]  # type: ignore[attr-defined]
            await LocalStore(str(tmp_path)).prepare()
            assert {str(path) for path in tmp_path.iterdir()} == {
                *(str(tmp_path / name) for name in foreign),
                *living,
            }

    async def test_what_cannot_be_removed_does_not_stop_the_start(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps, caplog: pytest.LogCaptureFixture
    ) -> None:
        stuck, abandoned = tmp_path / temporary_name("a.pt"), tmp_path / temporary_name("b.pt")
        stuck.touch()
        abandoned.touch()
        ops.fail("unlink", OSError(errno.EACCES, "Permission denied"), where=lambda path: path == str(stuck))
        await store.prepare()
        assert list(tmp_path.iterdir()) == [stuck]
        assert "could not remove the abandoned file" in caplog.text
        assert ops.open_paths == []


class TestList:
    async def test_only_regular_files_are_listed(self, tmp_path: Path, store: LocalStore) -> None:
        await put(store, "a.pt", b"one")
        (tmp_path / "directory").mkdir()
        (tmp_path / "link").symlink_to("a.pt")
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / ".a.pt.0badc0de.0123456789abcdef.asyncckpt-tmp").write_bytes(b"of another machine")
        assert await names(store) == ["a.pt"]

    async def test_a_file_removed_meanwhile_has_the_directory_listed_anew(
        self, store: LocalStore, ops: FaultyOps
    ) -> None:
        await put(store, "a.pt", b"one")
        await put(store, "b.pt", b"two")
        ops.calls.clear()
        ops.fail("lstat", FileNotFoundError(), where=lambda path: path.endswith("a.pt"))
        assert await names(store) == ["a.pt", "b.pt"]
        assert len(called(ops, "scandir")) == 2
        ops.fail("lstat", FileNotFoundError(), times=None, where=lambda path: path.endswith("a.pt"))
        with pytest.raises(StoreError, match="each of 100 attempts"):
            await store.list()

    async def test_stat_knows_regular_files_alone(self, tmp_path: Path, store: LocalStore) -> None:
        (tmp_path / "directory").mkdir()
        temporary = temporary_name("a.pt")
        (tmp_path / temporary).touch()
        (tmp_path / "dangling").symlink_to("nowhere")
        for name in ("directory", temporary, "dangling", "absent"):
            with pytest.raises(FileNotFoundError):
                await store.stat(name)

    async def test_files_are_found_while_the_interpreter_shuts_its_threads_down(
        self, store: LocalStore
    ) -> None:
        await put(store, "a.pt", b"one")
        executor = ThreadPoolExecutor()
        asyncio.get_running_loop().set_default_executor(executor)
        executor.shutdown()
        assert await names(store) == ["a.pt"]
        assert (await store.stat("a.pt")).nbytes == 3

    async def test_errors_are_store_errors(self, store: LocalStore, ops: FaultyOps) -> None:
        await put(store, "a.pt", b"one")
        for operation, refused in (
            ("scandir", store.list),
            ("stat", lambda: store.stat("a.pt")),
            ("preadv", lambda: store.read("a.pt", 0, memoryview(bytearray(1)))),
            ("unlink", lambda: store.remove("a.pt")),
            ("scandir", store.prepare),
        ):
            ops.fail(operation, OSError(errno.EIO, "Input/output error"))
            with pytest.raises(StoreError, match=r"the device that holds .* failed while") as caught:
                await refused()
            assert caught.value.errno == errno.EIO
            assert isinstance(caught.value.__cause__, OSError)
        assert await get(store, "a.pt") == b"one"


class TestRemove:
    async def test_a_removal_is_durable(self, tmp_path: Path, store: LocalStore, ops: FaultyOps) -> None:
        await put(store, "a.pt", b"one")
        ops.calls.clear()
        await store.remove("a.pt")
        assert called(ops, "unlink", "fsync_directory") == [
            Call("unlink", str(tmp_path / "a.pt")),
            Call("fsync_directory", str(tmp_path)),
        ]
        assert ops.open_paths == []

    async def test_a_directory_goes_at_once_with_all_that_is_in_it(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps
    ) -> None:
        (tmp_path / "a.ckpt" / "shard").mkdir(parents=True)
        (tmp_path / "a.ckpt" / "shard" / "0").touch()
        await store.remove("a.ckpt")
        assert list(tmp_path.iterdir()) == []
        steps = called(ops, "replace", "fsync_directory", "rmtree")
        assert [call.operation for call in steps] == ["replace", "fsync_directory", "rmtree"]
        assert is_temporary(steps[0].path.rpartition("/")[2])

    async def test_a_link_to_a_directory_goes_alone(self, tmp_path: Path, store: LocalStore) -> None:
        (tmp_path / "a.ckpt").mkdir()
        (tmp_path / "last.ckpt").symlink_to("a.ckpt")
        await store.remove("last.ckpt")
        assert list(tmp_path.iterdir()) == [tmp_path / "a.ckpt"]


class TestCopyAndLink:
    async def test_a_copy_is_a_hard_link_put_in_place_at_once(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps
    ) -> None:
        await put(store, "a.pt", b"one")
        ops.calls.clear()
        await store.copy("a.pt", "b.pt")
        assert (tmp_path / "a.pt").samefile(tmp_path / "b.pt")
        assert [call.operation for call in called(ops, "link", "replace", "fsync_directory")] == [
            "link",
            "replace",
            "fsync_directory",
        ]
        assert len(list(tmp_path.iterdir())) == 2

    async def test_copying_again_leaves_no_temporary_name(self, tmp_path: Path, store: LocalStore) -> None:
        await put(store, "a.pt", b"one")
        await store.copy("a.pt", "b.pt")
        await store.copy("a.pt", "b.pt")
        assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "b.pt"}

    async def test_a_copy_of_a_link_is_of_the_file(self, tmp_path: Path, store: LocalStore) -> None:
        await put(store, "a.pt", b"one")
        await store.link("a.pt", "last.pt")
        await store.copy("last.pt", "b.pt")
        await store.copy("a.pt", "last.pt")
        assert not (tmp_path / "b.pt").is_symlink()
        assert not (tmp_path / "last.pt").is_symlink()
        await store.remove("a.pt")
        assert await get(store, "b.pt") == await get(store, "last.pt") == b"one"

    @pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP])
    async def test_where_hard_links_are_refused_the_bytes_are_copied(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps, code: int
    ) -> None:
        data = content(17 << 20)
        await put(store, "a.pt", data)
        await put(store, "b.pt", b"old")
        ops.fail("link", OSError(code, os.strerror(code)))
        await store.copy("a.pt", "b.pt")
        assert not (tmp_path / "a.pt").samefile(tmp_path / "b.pt")
        assert await get(store, "b.pt") == data
        assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "b.pt"}
        assert ops.open_paths == []

    async def test_a_source_cut_short_while_it_is_copied_makes_no_copy(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps
    ) -> None:
        class Cut(FaultyOps):
            def preadv(self, fd: int, into: memoryview, offset: int) -> int:
                os.truncate(tmp_path / "a.pt", 1000)
                return super().preadv(fd, into, offset)

        ops = Cut()
        store = LocalStore(str(tmp_path), ops)
        await put(store, "a.pt", content(100_000))
        ops.fail("link", OSError(errno.EPERM, "Operation not permitted"))
        with pytest.raises(StoreError, match=r"a\.pt ends at byte 1000, within the 100000 bytes"):
            await store.copy("a.pt", "b.pt")
        assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]

    async def test_a_link_is_relative_and_direct(self, tmp_path: Path, store: LocalStore) -> None:
        await put(store, "a.pt", b"one")
        await store.link("a.pt", "last.pt")
        await store.link("last.pt", "newest.pt")
        assert (tmp_path / "last.pt").readlink().name == "a.pt"
        assert str((tmp_path / "newest.pt").readlink()) == "a.pt"

    async def test_where_symbolic_links_are_refused_a_link_is_a_copy(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps
    ) -> None:
        await put(store, "a.pt", b"one")
        ops.fail("symlink", OSError(errno.EPERM, "Operation not permitted"))
        await store.link("a.pt", "last.pt")
        assert not (tmp_path / "last.pt").is_symlink()
        assert await get(store, "last.pt") == b"one"

    async def test_a_link_may_lead_to_a_directory(self, tmp_path: Path, store: LocalStore) -> None:
        (tmp_path / "a.ckpt").mkdir()
        await store.link("a.ckpt", "last.ckpt")
        assert (tmp_path / "last.ckpt").samefile(tmp_path / "a.ckpt")

    @pytest.mark.parametrize("how", ["copy", "link"])
    async def test_a_directory_under_the_target_is_replaced(
        self, tmp_path: Path, store: LocalStore, how: str
    ) -> None:
        await put(store, "a.pt", b"one")
        (tmp_path / "last.pt" / "shard").mkdir(parents=True)
        await getattr(store, how)("a.pt", "last.pt")
        assert await get(store, "last.pt") == b"one"
        assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "last.pt"}

    @pytest.mark.parametrize("how", ["copy", "link"])
    async def test_a_temporary_link_taken_by_a_cleaner_is_made_again(self, tmp_path: Path, how: str) -> None:
        class Cleaned(FaultyOps):
            def replace(self, source: str, target: str) -> None:
                if not called(self, "replace"):
                    self.unlink(source)
                super().replace(source, target)

        store = LocalStore(str(tmp_path))
        await put(store, "a.pt", b"one")
        await getattr(LocalStore(str(tmp_path), Cleaned()), how)("a.pt", "b.pt")
        assert await get(store, "b.pt") == b"one"

    @pytest.mark.parametrize("how", ["copy", "link"])
    async def test_a_failed_replacement_leaves_the_former_one(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps, how: str
    ) -> None:
        await put(store, "a.pt", b"one")
        await put(store, "b.pt", b"two")
        ops.fail("replace", OSError(errno.EIO, "Input/output error"))
        with pytest.raises(StoreError):
            await getattr(store, how)("a.pt", "b.pt")
        assert await get(store, "b.pt") == b"two"
        assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "b.pt"}


class TestRead:
    @pytest.fixture
    async def data(self, store: LocalStore) -> bytes:
        data = content((3 << 20) + 100)
        await put(store, "a.pt", data)
        return data

    async def read(self, store: LocalStore, offset: int, length: int) -> bytes:
        """Read into memory that begins on a page."""
        memory = memoryview(mmap.mmap(-1, length))
        await store.read("a.pt", offset, memory)
        return bytes(memory)

    @pytest.mark.parametrize(
        ("offset", "length"),
        [(0, (3 << 20) + 100), (0, 2 << 20), (PAGE, 2 << 20), (PAGE, (2 << 20) + 5), (100, 2 << 20)],
    )
    async def test_large_reads_give_the_same_bytes_in_every_way(
        self, store: LocalStore, ops: FaultyOps, data: bytes, offset: int, length: int
    ) -> None:
        for longest in (None, 300_000, 65_536):
            ops.longest_read = longest
            assert await self.read(store, offset, length) == data[offset : offset + length]
            assert ops.open_paths == []

    @pytest.mark.parametrize("operation", ["open_direct", "preadv"])
    async def test_direct_reads_that_are_refused_are_done_through_the_cache(
        self, store: LocalStore, ops: FaultyOps, data: bytes, operation: str
    ) -> None:
        ops.fail(operation, OSError(errno.EINVAL, "Invalid argument"))
        assert await self.read(store, 0, len(data)) == data
        assert ops.open_paths == []

    async def test_small_and_unaligned_reads_never_go_past_the_cache(
        self, store: LocalStore, ops: FaultyOps, data: bytes
    ) -> None:
        ops.calls.clear()
        await self.read(store, 0, (1 << 20) - 1)
        await self.read(store, 1, 2 << 20)
        assert called(ops, "open_direct") == []
        await self.read(store, PAGE, 1 << 20)
        assert len(called(ops, "open_direct")) == 1
        assert len(called(ops, "open")) == 3
        assert data

    async def test_the_end_is_named(self, store: LocalStore, data: bytes) -> None:
        with pytest.raises(StoreError, match=r"a\.pt ends at byte 3145828, .* 2097152 bytes .* byte 2097152"):
            await self.read(store, 2 << 20, 2 << 20)
        assert data

    def test_what_is_closed_before_a_thread_opens_it_stays_closed(
        self, tmp_path: Path, ops: FaultyOps
    ) -> None:
        path = tmp_path / "a"
        path.write_bytes(b"x")
        file = LocalFile(ops, "a", str(path), str(path))
        file.close()
        with pytest.raises(StoreError, match="was closed while it was opened"):
            file.open()
        assert ops.open_paths == []

    async def test_a_directory_cannot_be_read(self, tmp_path: Path, store: LocalStore) -> None:
        (tmp_path / "a.pt").mkdir()
        with pytest.raises(FileNotFoundError, match="not a committed file"):
            await self.read(store, 0, 10)


@given(st.integers(0, 3 * PAGE), st.integers(0, 5 * PAGE), st.integers(0, 5 * PAGE))
def test_the_direct_range_is_all_whole_pages_or_nothing(shift: int, length: int, offset: int) -> None:
    data = memoryview(mmap.mmap(-1, 9 * PAGE))[shift : shift + length]
    start, stop = direct_range(data, offset)
    assert 0 <= start <= stop <= length
    if start < stop:
        assert (shift + start) % PAGE == (offset + start) % PAGE == (stop - start) % PAGE == 0
        assert start < PAGE
        assert length - stop < PAGE
    else:
        first = -(-offset // PAGE) * PAGE
        assert (shift - offset) % PAGE or first + PAGE > offset + length
