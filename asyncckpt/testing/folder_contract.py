"""The contract of `Store` with folders as tests, for the tests of every store that has them to inherit."""

# ruff: noqa: D102, S101 - tests: their names say what they show, they assert, and their values are literal

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.lowlevel import checkpoint

from asyncckpt.errors import StoreError
from asyncckpt.stores import FOLDER_MARK
from asyncckpt.testing.store_contract import StoreContract, content, get, names, put

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncckpt.stores import FolderDraft, Store


async def fill(draft: FolderDraft, files: Mapping[str, bytes]) -> bytes:
    """Write files into a folder draft; returns a mark that holds their names."""
    for name, data in files.items():
        await put(draft.store, draft.member(name), data)
    return "".join(f"{name} {draft.member(name)}\n" for name in files).encode()


async def put_folder(store: Store, name: str, files: Mapping[str, bytes]) -> None:
    """Save a folder of files under a name."""
    async with store.folder_draft(name) as draft:
        await draft.commit(await fill(draft, files))


async def get_folder(store: Store, name: str) -> dict[str, bytes]:
    """Return what a folder that was made so holds, by the names that `member` was given."""
    folder = store.folder(name)
    lines = [line.split(" ") for line in (await get(folder, FOLDER_MARK)).decode().splitlines()]
    return {name: await get(folder, member) for name, member in lines}


async def folder_names(store: Store) -> list[str]:
    """Return the names of the committed folders, sorted."""
    return sorted(folder.name for folder in await store.list_folders())


class _ExpectedError(Exception):
    pass


ONE = {"__0_0.distcp": content(100_000, seed=1), "__1_0.distcp": b"", "größe": b"one"}
TWO = {"__0_0.distcp": content(50_000, seed=2), "__2_0.distcp": b"two"}


class FolderContract(StoreContract):
    """What every store with folders does, beside the rest of its contract."""

    async def test_a_place_that_does_not_exist_has_no_folders(self, unprepared: Store) -> None:
        assert await folder_names(unprepared) == []
        assert await names(unprepared.folder("a")) == []

    async def test_a_committed_folder_is_listed_and_read_back(self, store: Store) -> None:
        await put_folder(store, "a", ONE)
        assert await get_folder(store, "a") == ONE
        (listed,) = await store.list_folders()
        mark = await store.folder("a").stat(FOLDER_MARK)
        assert (listed.name, listed.nbytes, listed.version) == ("a", mark.nbytes, mark.version)
        assert listed.modified == mark.modified
        assert len(await names(store.folder("a"))) == len(ONE) + 1
        assert "a" in store.folder("a").path_of("x")

    async def test_files_and_folders_are_listed_apart(self, store: Store) -> None:
        await put_folder(store, "a", ONE)
        assert await store.exists()
        await put(store, "a.pt", b"one")
        assert await names(store) == ["a.pt"]
        assert await folder_names(store) == ["a"]

    async def test_a_folder_is_no_file(self, store: Store) -> None:
        await put_folder(store, "a", ONE)
        with pytest.raises(FileNotFoundError):
            await store.stat("a")
        with pytest.raises(FileNotFoundError):
            async with store.open("a"):
                pass

    async def test_prepare_leaves_committed_folders_and_drafts(self, store: Store, unprepared: Store) -> None:
        await put_folder(store, "a", ONE)
        async with store.folder_draft("b") as draft:
            mark = await fill(draft, TWO)
            await unprepared.prepare()
            await draft.commit(mark)
        assert await get_folder(store, "a") == ONE
        assert await get_folder(store, "b") == TWO

    async def test_a_folder_draft_is_invisible_until_its_commit(self, store: Store) -> None:
        async with store.folder_draft("a") as draft:
            mark = await fill(draft, ONE)
            assert await folder_names(store) == await names(store) == []
            with pytest.raises(FileNotFoundError):
                await store.folder("a").stat(FOLDER_MARK)
            await draft.commit(mark)
            assert await get_folder(store, "a") == ONE

    async def test_several_writers_fill_one_draft(self, store: Store) -> None:
        async with store.folder_draft("a") as draft:

            async def join(rank: int) -> None:
                async with store.join_folder("a", draft.attempt) as joined:
                    assert joined.attempt == draft.attempt
                    await put(joined.store, joined.member(f"__{rank}_0.distcp"), content(10_000, seed=rank))

            async with anyio.create_task_group() as group:
                for rank in range(1, 4):
                    group.start_soon(join, rank)
            mark = await fill(draft, {"__0_0.distcp": b"zero"})
            lines = [f"__{i}_0.distcp {draft.member(f'__{i}_0.distcp')}\n" for i in range(1, 4)]
            await draft.commit(mark + "".join(lines).encode())
        files = {f"__{i}_0.distcp": content(10_000, seed=i) for i in range(1, 4)}
        assert await get_folder(store, "a") == {"__0_0.distcp": b"zero", **files}

    async def test_a_draft_that_is_not_there_cannot_be_joined(self, store: Store) -> None:
        async with store.folder_draft("a") as draft:
            attempt = draft.attempt
        for name in (attempt, "a"):
            with pytest.raises(StoreError, match="not shared by the hosts"):
                async with store.join_folder("a", name):
                    pass

    async def test_who_joined_a_draft_cannot_commit_it(self, store: Store) -> None:
        async with store.folder_draft("a") as draft:
            mark = await fill(draft, ONE)
            async with store.join_folder("a", draft.attempt) as joined:
                with pytest.raises(StoreError, match="by the process that made the draft"):
                    await joined.commit(mark)
            await draft.commit(mark)
        assert await get_folder(store, "a") == ONE

    @pytest.mark.parametrize("name", [FOLDER_MARK, "", "a/b", ".."])
    async def test_what_is_no_name_of_a_file_in_a_folder_is_refused(self, store: Store, name: str) -> None:
        async with store.folder_draft("a") as draft:
            with pytest.raises(StoreError, match="name"):
                draft.member(name)

    async def test_a_commit_replaces_the_whole_folder(self, store: Store) -> None:
        await put_folder(store, "a", ONE)
        first = (await store.list_folders())[0].version
        async with store.folder_draft("a") as draft:
            mark = await fill(draft, TWO)
            assert await get_folder(store, "a") == ONE
            await draft.commit(mark)
        assert await get_folder(store, "a") == TWO
        assert len(await names(store.folder("a"))) == len(TWO) + 1
        assert (await store.list_folders())[0].version != first

    @pytest.mark.parametrize("by", ["return", "error", "cancellation"])
    async def test_a_folder_draft_left_without_commit_leaves_nothing(self, store: Store, by: str) -> None:
        async def leave(name: str) -> None:
            async with store.folder_draft(name) as draft:
                await fill(draft, TWO)
                if by == "error":
                    raise _ExpectedError
                if by == "cancellation":
                    scope.cancel()
                    await checkpoint()

        await put_folder(store, "a", ONE)
        for name in ("a", "b"):
            with anyio.CancelScope() as scope:
                if by == "error":
                    with pytest.raises(_ExpectedError):
                        await leave(name)
                else:
                    await leave(name)
            assert scope.cancelled_caught == (by == "cancellation")
        assert await folder_names(store) == ["a"]
        assert await get_folder(store, "a") == ONE
        assert len(await names(store.folder("a"))) == len(ONE) + 1
        assert await names(store.folder("b")) == await names(store) == []

    async def test_of_two_drafts_of_one_folder_the_last_commit_stays_whole(self, store: Store) -> None:
        async with store.folder_draft("a") as first, store.folder_draft("a") as second:
            marks = await fill(first, ONE), await fill(second, TWO)
            await second.commit(marks[1])
            assert await get_folder(store, "a") == TWO
            await first.commit(marks[0])
        assert await get_folder(store, "a") == ONE
        assert len(await names(store.folder("a"))) == len(ONE) + 1

    async def test_remove_removes_a_folder_which_can_be_used_again(self, store: Store) -> None:
        await put_folder(store, "a", ONE)
        await put_folder(store, "b", ONE)
        for _ in range(2):
            await store.remove("a")
        assert await folder_names(store) == ["b"]
        assert await names(store.folder("a")) == []
        await put_folder(store, "a", TWO)
        assert await get_folder(store, "a") == TWO

    @pytest.mark.parametrize("existing", [None, TWO])
    async def test_a_copy_of_a_folder_is_independent(
        self, store: Store, existing: dict[str, bytes] | None
    ) -> None:
        if existing is not None:
            await put_folder(store, "b", existing)
        await put_folder(store, "a", ONE)
        await store.copy("a", "b")
        assert len(await names(store.folder("b"))) == len(ONE) + 1
        await put_folder(store, "a", TWO)
        assert await get_folder(store, "b") == ONE
        await store.remove("a")
        assert await get_folder(store, "b") == ONE
        assert await folder_names(store) == ["b"]

    async def test_a_copy_of_a_folder_can_be_made_again_and_onto_itself(self, store: Store) -> None:
        await put_folder(store, "a", ONE)
        for target in ("b", "b", "a"):
            await store.copy("a", target)
        assert await get_folder(store, "a") == await get_folder(store, "b") == ONE
        await store.remove("b")
        assert await get_folder(store, "a") == ONE

    async def test_a_link_leads_to_a_folder_and_replaces_what_was_there(self, store: Store) -> None:
        await put_folder(store, "a", ONE)
        await put_folder(store, "b", TWO)
        await put_folder(store, "last", TWO)
        for source, files in (("a", ONE), ("b", TWO), ("b", TWO), ("a", ONE)):
            await store.link(source, "last")
            assert await get_folder(store, "last") == files
        await store.remove("last")
        assert await folder_names(store) == ["a", "b"]
        assert await get_folder(store, "a") == ONE
        assert await get_folder(store, "b") == TWO

    async def test_a_folder_that_does_not_exist_cannot_be_copied(self, store: Store) -> None:
        await put_folder(store, "b", ONE)
        with pytest.raises(FileNotFoundError):
            await store.copy("a", "b")
        assert await get_folder(store, "b") == ONE
