"""Folders of the local store at every step: whole or not there, whatever fails, is killed or interferes."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.lowlevel import checkpoint

from asyncckpt.errors import StoreError
from asyncckpt.stores import FOLDER_MARK
from asyncckpt.stores.fileops import FileOps
from asyncckpt.stores.local import LocalStore
from asyncckpt.stores.temporary import is_temporary, name_aside, temporary_name
from asyncckpt.testing.folder_contract import fill, folder_names, get_folder, put_folder
from asyncckpt.testing.store_contract import content, get, put
from file_operations import Call, FaultyOps
from support import mounted
from test_store_own import DictStore

if TYPE_CHECKING:
    from collections.abc import Sequence

OLD = {"__0_0.distcp": content(5_000, seed=1), "__1_0.distcp": b"one"}
NEW = {"__0_0.distcp": content(7_000, seed=2), "__2_0.distcp": b"two"}
OTHER_HOST = ".a.0badc0de.0123456789abcdef.asyncckpt-tmp"
HOUR = 3600

linux = pytest.mark.skipif(sys.platform != "linux", reason="mounts file systems, and exchanges names")


class SharedOps(FaultyOps):
    """Reports a file system that several machines can mount."""

    def fstatfs(self, fd: int) -> int:
        super().fstatfs(fd)
        return 0x6969  # NFS


@pytest.fixture
def ops() -> FaultyOps:
    return FaultyOps()


@pytest.fixture
def store(tmp_path: Path, ops: FaultyOps) -> LocalStore:
    return LocalStore(str(tmp_path), ops)


def called(ops: FaultyOps, *operations: str) -> Sequence[str]:
    return [call.operation for call in ops.calls if call.operation in operations]


def entries(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def no_exchange(ops: FaultyOps, code: int = errno.EINVAL) -> None:
    ops.fail("exchange", OSError(code, os.strerror(code)), times=None)


async def test_a_store_without_folders_says_so() -> None:
    store = DictStore()
    assert await store.list_folders() == []
    for use in (
        lambda: store.folder("a"),
        lambda: store.folder_draft("a"),
        lambda: store.join_folder("a", "x"),
    ):
        with pytest.raises(StoreError, match="DictStore has no folders") as caught:
            use()
        assert caught.value.errno == errno.ENOTSUP


class TestOrder:
    COMMIT = ("pwrite", "fsync", "fsync_directory", "replace", "exchange", "rmtree")

    async def test_all_is_durable_before_the_folder_is_in_place(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps
    ) -> None:
        async with store.folder_draft("a") as draft:
            mark = await fill(draft, NEW)
            place = str(tmp_path / draft.attempt)
            ops.calls.clear()
            await draft.commit(mark)
            steps = [call for call in ops.calls if call.operation in self.COMMIT]
            assert steps == [
                Call("pwrite", f"{place}/{FOLDER_MARK}"),
                Call("fsync", f"{place}/{FOLDER_MARK}"),
                Call("fsync_directory", place),
                Call("replace", str(tmp_path / "a")),
                Call("fsync_directory", str(tmp_path)),
            ]
            # The lock is given back last.
            assert ops.calls[-1] == Call("close", f"{place}/{FOLDER_MARK}")
        assert ops.open_paths == []

    @linux
    async def test_a_replaced_folder_goes_after_the_new_one_is_durably_in_place(
        self, store: LocalStore, ops: FaultyOps
    ) -> None:
        await put_folder(store, "a", OLD)
        async with store.folder_draft("a") as draft:
            mark = await fill(draft, NEW)
            ops.calls.clear()
            await draft.commit(mark)
        assert called(ops, *self.COMMIT) == [
            *("pwrite", "fsync", "fsync_directory", "replace", "exchange", "fsync_directory", "rmtree")
        ]

    @pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
    async def test_where_names_cannot_be_exchanged_the_old_one_is_moved_aside(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps, code: int
    ) -> None:
        await put_folder(store, "a", OLD)
        no_exchange(ops, code)
        async with store.folder_draft("a") as draft:
            mark = await fill(draft, NEW)
            ops.calls.clear()
            await draft.commit(mark)
        steps = [call for call in ops.calls if call.operation in self.COMMIT]
        assert [call.operation for call in steps[3:]] == [
            *("replace", "exchange", "replace", "replace", "fsync_directory", "rmtree")
        ]
        assert steps[5].path.endswith(".asyncckpt-old")
        assert await get_folder(store, "a") == NEW
        assert entries(tmp_path) == ["a"]

    async def test_a_removed_folder_is_gone_at_once(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps
    ) -> None:
        await put_folder(store, "a", OLD)
        ops.fail("rmtree", OSError(errno.EIO, "Input/output error"))
        with pytest.raises(StoreError):
            await store.remove("a")
        assert await folder_names(store) == []
        assert len(entries(tmp_path)) == 1
        await store.prepare()
        assert entries(tmp_path) == []


async def replace_old(store: LocalStore) -> None:
    async with store.folder_draft("a") as draft:
        await draft.commit(await fill(draft, NEW))


async def calls_of_a_replacement(path: Path, *, exchanges: bool, first: bool) -> list[tuple[str, int]]:
    """Return the operations that make a folder, each with its number among those of its kind."""
    ops = FaultyOps()
    store = LocalStore(str(path), ops)
    await store.prepare()
    if not first:
        await put_folder(store, "a", OLD)
    if not exchanges:
        no_exchange(ops)
    ops.calls.clear()
    await replace_old(store)
    seen: dict[str, int] = {}
    numbered = []
    for call in ops.calls:
        seen[call.operation] = seen.get(call.operation, 0) + 1
        numbered.append((call.operation, seen[call.operation]))
    return numbered


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("first", [True, False])
async def test_whichever_operation_fails_one_whole_folder_stands(
    tmp_path: Path, *, exchanges: bool, first: bool
) -> None:
    numbered = await calls_of_a_replacement(tmp_path / "clean", exchanges=exchanges, first=first)
    assert len(numbered) > 20
    failed = 0
    for operation, number in numbered:
        path = tmp_path / f"{operation}-{number}"
        ops = FaultyOps()
        store = LocalStore(str(path), ops)
        await store.prepare()
        if not first:
            await put_folder(store, "a", OLD)
        ops.fail(operation, OSError(errno.EIO, "Input/output error"), at=number)
        if not exchanges:
            no_exchange(ops)
        try:
            await replace_old(store)
            expected = [NEW]
        except StoreError as error:
            failed += 1
            expected = [NEW] if "the new a is in place" in str(error) else [OLD]
        ops.reset()
        assert ops.open_paths == []
        absent = first and "a" not in entries(path)
        whole = [OLD if absent else await get_folder(store, "a")]
        assert whole == expected, (operation, number)
        if first:
            assert ("a" in entries(path)) == (expected == [NEW])
        await store.prepare()
        assert entries(path) == (["a"] if not first or expected == [NEW] else []), (operation, number)
    assert failed > 10


class TestReplaced:
    @pytest.mark.parametrize("exchanges", [True, False])
    @pytest.mark.parametrize("kind", ["file", "link", "empty", "foreign"])
    async def test_whatever_has_the_name_is_replaced(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps, kind: str, *, exchanges: bool
    ) -> None:
        other = tmp_path / "other"
        other.mkdir()
        if not exchanges:
            no_exchange(ops)
        match kind:
            case "file":
                await put(store, "a", b"file")
            case "link":
                await store.link("other", "a")
            case "empty":
                (tmp_path / "a").mkdir()
            case _:
                (tmp_path / "a" / "b" / "c").mkdir(parents=True)
        await put_folder(store, "a", NEW)
        assert await get_folder(store, "a") == NEW
        assert entries(tmp_path) == ["a", "other"]
        assert entries(other) == []

    @linux
    @pytest.mark.parametrize("how", ["copy", "link"])
    async def test_a_file_takes_the_place_of_a_folder_at_once(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps, how: str
    ) -> None:
        await put_folder(store, "last", OLD)
        await put(store, "a.pt", b"one")
        ops.calls.clear()
        await getattr(store, how)("a.pt", "last")
        assert await get(store, "last") == b"one"
        assert entries(tmp_path) == ["a.pt", "last"]
        assert called(ops, "exchange", "fsync_directory", "rmtree") == [
            "exchange",
            "fsync_directory",
            "rmtree",
        ]

    async def test_what_a_starting_writer_puts_back_is_replaced_all_the_same(self, tmp_path: Path) -> None:
        """It sees the folder moved aside, and its name free."""

        class Overtaken(FaultyOps):
            prepared = 0

            def before(self, operation: str, path: str) -> None:
                super().before(operation, path)
                moved = self.calls[-2:-1] and self.calls[-2].path.endswith(".asyncckpt-old")
                if operation == "replace" and moved and not self.prepared:
                    self.prepared += 1
                    other = LocalStore(str(tmp_path))
                    other._prepare()
                    assert "a" in entries(tmp_path)

        ops = Overtaken()
        store = LocalStore(str(tmp_path), ops)
        await put_folder(store, "a", OLD)
        no_exchange(ops)
        await put_folder(store, "a", NEW)
        assert ops.prepared == 1
        assert await get_folder(store, "a") == NEW
        assert entries(tmp_path) == ["a"]

    @pytest.mark.parametrize("taken", [True, False])
    async def test_what_a_crash_left_aside_is_put_back_if_its_name_is_free(
        self, tmp_path: Path, store: LocalStore, *, taken: bool
    ) -> None:
        await put_folder(store, "a", OLD)
        (tmp_path / "a").rename(tmp_path / name_aside("a"))
        assert await folder_names(store) == []
        if taken:
            await put_folder(store, "a", NEW)
        await store.prepare()
        assert await get_folder(store, "a") == (NEW if taken else OLD)
        assert entries(tmp_path) == ["a"]

    async def test_a_name_too_long_to_be_moved_aside_is_not_replaced(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps
    ) -> None:
        name = "x" * 255
        await put_folder(store, name, OLD)
        no_exchange(ops)
        with pytest.raises(StoreError, match="the name is too long"):
            await put_folder(store, name, NEW)
        assert await get_folder(store, name) == OLD
        assert entries(tmp_path) == [name]


class TestListing:
    async def test_only_folders_with_a_mark_are_listed(self, tmp_path: Path, store: LocalStore) -> None:
        await put_folder(store, "a", NEW)
        (tmp_path / "no-mark").mkdir()
        (tmp_path / "odd" / FOLDER_MARK).mkdir(parents=True)
        (tmp_path / "last").symlink_to("a")
        await put(store, "file", b"one")
        (tmp_path / "a").rename(tmp_path / temporary_name("b"))
        assert await folder_names(store) == []
        await put_folder(store, "a", NEW)
        assert await folder_names(store) == ["a"]

    async def test_a_folder_that_is_removed_meanwhile_has_the_directory_listed_anew(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps
    ) -> None:
        await put_folder(store, "a", NEW)
        await put_folder(store, "b", NEW)
        ops.calls.clear()
        folder = str(tmp_path / "a")
        for gone in ({folder}, {f"{folder}/{FOLDER_MARK}"}):
            ops.fail("lstat", FileNotFoundError(), where=gone.__contains__)
        assert await folder_names(store) == ["a", "b"]
        assert called(ops, "scandir") == ["scandir", "scandir"]

    async def test_paths_of_files_in_a_folder_are_as_given(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        store = LocalStore("runs")
        folder = store.folder("a")
        assert folder.path_of("x") == "runs/a/x"
        monkeypatch.chdir("/")
        await store.prepare()
        await put_folder(store, "a", NEW)
        assert await get(folder, "__2_0.distcp") == b"two"
        for name in ("", "..", "a/b"):
            with pytest.raises(StoreError, match="cannot be the name"):
                store.folder(name)


class TestCopy:
    async def test_a_copy_is_made_of_hard_links_and_a_mark_of_its_own(
        self, tmp_path: Path, store: LocalStore
    ) -> None:
        await put_folder(store, "a", NEW)
        await store.copy("a", "b")
        for name in NEW:
            assert (tmp_path / "a" / name).samefile(tmp_path / "b" / name)
        assert not (tmp_path / "a" / FOLDER_MARK).samefile(tmp_path / "b" / FOLDER_MARK)
        assert entries(tmp_path) == ["a", "b"]

    async def test_where_hard_links_are_refused_the_bytes_are_copied(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps
    ) -> None:
        await put_folder(store, "a", NEW)
        ops.fail("link", OSError(errno.EPERM, "Operation not permitted"))
        await store.copy("a", "b")
        same = [(tmp_path / "a" / name).samefile(tmp_path / "b" / name) for name in NEW]
        assert sorted(same) == [False, True]
        assert await get_folder(store, "b") == NEW
        assert ops.open_paths == []

    async def test_a_copy_of_a_link_replaces_the_link_itself(self, tmp_path: Path, store: LocalStore) -> None:
        await put_folder(store, "a", NEW)
        await store.link("a", "last")
        await store.copy("a", "last")
        assert not (tmp_path / "last").is_symlink()
        await store.remove("a")
        assert await get_folder(store, "last") == NEW

    async def test_a_folder_of_another_directory_is_copied_and_linked(self, tmp_path: Path) -> None:
        store, other = LocalStore(str(tmp_path / "run")), LocalStore(str(tmp_path / "other"))
        await store.prepare()
        await other.prepare()
        await put_folder(other, "a", NEW)
        await store.copy("../other/a", "copy")
        await store.link("../other/a", "link")
        assert str((tmp_path / "run" / "link").readlink()) == "../other/a"
        assert await get_folder(store, "copy") == await get_folder(store, "link") == NEW

    async def test_a_folder_that_holds_more_than_files_is_not_copied(
        self, tmp_path: Path, store: LocalStore
    ) -> None:
        await put_folder(store, "a", NEW)
        (tmp_path / "a" / "more").mkdir()
        with pytest.raises(StoreError, match="more in the folder is not a regular file"):
            await store.copy("a", "b")
        assert entries(tmp_path) == ["a"]

    async def test_a_folder_without_a_mark_is_not_copied(self, tmp_path: Path, store: LocalStore) -> None:
        (tmp_path / "a").mkdir()
        with pytest.raises(FileNotFoundError):
            await store.copy("a", "b")
        assert entries(tmp_path) == ["a"]

    async def test_a_folder_replaced_while_it_is_copied_makes_no_copy(self, tmp_path: Path) -> None:
        class Replacing(FaultyOps):
            def link(self, source: str, target: str) -> None:
                if not called(self, "link"):
                    other = tmp_path / "other"
                    (tmp_path / "a").rename(other)
                    (tmp_path / "new").rename(tmp_path / "a")
                super().link(source, target)

        store = LocalStore(str(tmp_path), Replacing())
        await put_folder(store, "a", OLD)
        await put_folder(store, "new", OLD)
        with pytest.raises(FileNotFoundError, match="replaced while it was copied"):
            await store.copy("a", "b")
        assert entries(tmp_path) == ["a", "other"]


class TestAbandoned:
    async def leave(self, path: Path, name: str, hours: float = 0) -> None:
        (path / name).mkdir()
        (path / name / "__0_0.distcp").write_bytes(b"half")
        mark = path / name / FOLDER_MARK
        mark.touch()
        made = mark.stat().st_mtime
        os.utime(mark, (made, made - hours * HOUR))

    @pytest.mark.parametrize("name", [OTHER_HOST, temporary_name("a")], ids=["other host", "this host"])
    async def test_under_one_kernel_an_unlocked_draft_is_removed(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps, name: str
    ) -> None:
        await self.leave(tmp_path, name)
        await store.prepare()
        assert entries(tmp_path) == []
        assert ops.open_paths == []

    @pytest.mark.parametrize(("hours", "stays"), [(0, True), (23.99, True), (24, False)])
    async def test_on_a_shared_file_system_that_of_another_host_is_removed_after_24_hours(
        self, tmp_path: Path, hours: float, *, stays: bool
    ) -> None:
        await self.leave(tmp_path, OTHER_HOST, hours)
        await self.leave(tmp_path, temporary_name("b"))
        await LocalStore(str(tmp_path), SharedOps()).prepare()
        assert entries(tmp_path) == [OTHER_HOST] * stays

    async def test_the_rest_of_a_folder_whose_removal_was_cut_off_is_removed(
        self, tmp_path: Path, store: LocalStore
    ) -> None:
        rest = tmp_path / temporary_name("a")
        rest.mkdir()
        (rest / "__0_0.distcp").write_bytes(b"half")
        await store.prepare()
        assert entries(tmp_path) == []

    @pytest.mark.parametrize("at", ["open", "flock"])
    async def test_a_draft_that_a_starting_writer_removes_at_once_is_made_again(
        self, tmp_path: Path, at: str
    ) -> None:
        class Cleaned(FaultyOps):
            cleaned = 0

            def before(self, operation: str, path: str) -> None:
                super().before(operation, path)
                if operation == at and not self.cleaned:
                    self.cleaned += 1
                    LocalStore(str(tmp_path))._prepare()
                    assert entries(tmp_path) == []

        ops = Cleaned()
        store = LocalStore(str(tmp_path), ops)
        await put_folder(store, "a", NEW)
        assert ops.cleaned == 1
        assert await get_folder(store, "a") == NEW
        assert ops.open_paths == []

    async def test_a_folder_that_gets_its_mark_just_before_it_is_removed_stays(self, tmp_path: Path) -> None:
        class Overtaken(FaultyOps):
            mark = -1

            def before(self, operation: str, path: str) -> None:
                super().before(operation, path)
                if operation == "rmdir":
                    self.mark = os.open(f"{path}/{FOLDER_MARK}", os.O_CREAT | os.O_RDWR)
                    FileOps().flock(self.mark)

        ops = Overtaken()
        (tmp_path / temporary_name("a")).mkdir()
        await LocalStore(str(tmp_path), ops).prepare()
        (draft,) = entries(tmp_path)
        assert entries(tmp_path / draft) == [FOLDER_MARK]
        os.close(ops.mark)
        await LocalStore(str(tmp_path)).prepare()
        assert entries(tmp_path) == []

    async def test_another_rank_makes_no_file_in_a_draft_that_is_being_removed(self, tmp_path: Path) -> None:
        class Late(FaultyOps):
            attempt = ""

            def rmtree(self, path: str) -> None:
                for name in entries(Path(path)):
                    self.unlink(f"{path}/{name}")
                with suppress(FileNotFoundError):
                    (tmp_path / self.attempt / "late").touch()
                self.rmdir(path)

        ops = Late()
        async with LocalStore(str(tmp_path), ops).folder_draft("a") as draft:
            ops.attempt = draft.attempt
        assert called(ops, "rmdir") == ["rmdir"]
        assert entries(tmp_path) == []

    async def test_what_cannot_be_removed_does_not_stop_the_start(
        self, tmp_path: Path, store: LocalStore, ops: FaultyOps, caplog: pytest.LogCaptureFixture
    ) -> None:
        await self.leave(tmp_path, temporary_name("a"))
        await self.leave(tmp_path, temporary_name("b"))
        ops.fail("rmtree", OSError(errno.EACCES, "Permission denied"))
        await store.prepare()
        assert len(entries(tmp_path)) == 1
        assert "could not remove the abandoned file" in caplog.text
        assert ops.open_paths == []


@linux
@pytest.mark.parametrize("kind", ["ext4", "tmpfs", "overlay"])
async def test_folders_are_exchanged_where_the_file_system_can(
    tmp_path: Path, ops: FaultyOps, kind: str
) -> None:
    with mounted(kind, tmp_path) as place:
        store = LocalStore(str(place / "run"), ops)
        await store.prepare()
        await put_folder(store, "a", OLD)
        await put_folder(store, "a", NEW)
        assert await get_folder(store, "a") == NEW
        assert entries(place / "run") == ["a"]
        assert not [call for call in ops.calls if call.path.endswith("-old")]


def test_names_that_the_system_cannot_exchange_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match=r".") as caught:
        FileOps().exchange(str(tmp_path / "a"), str(tmp_path / "b"))
    assert caught.value.errno == (errno.ENOENT if sys.platform == "linux" else errno.ENOSYS)


def test_a_directory_that_others_also_remove_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "c").touch()
    real = os.unlink

    def overtaken(path: str, **options: int) -> None:
        real(path, **options)
        real(path, **options)

    monkeypatch.setattr(os, "unlink", overtaken)
    FileOps().rmtree(str(tmp_path / "a"))
    FileOps().rmtree(str(tmp_path / "a"))
    assert entries(tmp_path) == []


async def test_a_draft_under_way_can_be_cancelled_while_another_rank_writes(
    tmp_path: Path, store: LocalStore, ops: FaultyOps
) -> None:
    with anyio.CancelScope() as scope:
        async with (
            store.folder_draft("a") as draft,
            store.join_folder("a", draft.attempt) as joined,
            joined.store.draft(joined.member("__1_0.distcp"), 3) as member,
        ):
            await member.write(0, memoryview(b"one"))
            scope.cancel()
            await checkpoint()
    assert scope.cancelled_caught
    assert entries(tmp_path) == []
    assert ops.open_paths == []
    assert is_temporary(draft.attempt)
