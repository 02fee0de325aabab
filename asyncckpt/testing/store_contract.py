"""The contract of `Store` as tests, for the tests of every store to inherit."""

# ruff: noqa: D102, S101 - tests: their names say what they show, they assert, and their values are literal

from __future__ import annotations

import mmap
import random
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.lowlevel import checkpoint

from asyncckpt._threads import for_each, in_thread
from asyncckpt.errors import StoreError

if TYPE_CHECKING:
    from asyncckpt.stores import Draft, Store


def content(size: int, seed: int = 0) -> bytes:
    """Return `size` bytes that look like nothing else."""
    return random.Random(seed).randbytes(size)  # noqa: S311 - test data


async def write_all(draft: Draft, data: bytes) -> None:
    """Write all of `data` into a draft in the pieces, and as many at once, as it wants."""

    async def write(offset: int) -> None:
        await draft.write(offset, memoryview(data)[offset : offset + draft.chunk])

    await for_each(write, range(0, len(data), draft.chunk), draft.writers)


async def put(store: Store, name: str, data: bytes) -> None:
    """Save `data` under a name."""
    async with store.draft(name, len(data)) as draft:
        await write_all(draft, data)
        await draft.commit()


async def get(store: Store, name: str) -> bytes:
    """Return all that a name holds."""
    buffer = bytearray((await store.stat(name)).nbytes)
    await store.read(name, 0, memoryview(buffer))
    return bytes(buffer)


async def names(store: Store) -> list[str]:
    """Return the names that a store lists, sorted."""
    return sorted(file.name for file in await store.list())


class _ExpectedError(Exception):
    pass


class StoreContract(ABC):
    """What every store does. Inherit it in a test class named `Test…` and give it a store.

    The tests are coroutines: they need pytest-asyncio in auto mode. For pytest to explain a failed
    assertion here, call `pytest.register_assert_rewrite("asyncckpt.testing.store_contract")` before
    the import.
    """

    @abstractmethod
    def make_store(self) -> Store:
        """Return a store in a place that does not exist yet, another one for each test."""

    @pytest.fixture
    def unprepared(self) -> Store:
        return self.make_store()

    @pytest.fixture
    async def store(self, unprepared: Store) -> Store:
        await unprepared.prepare()
        return unprepared

    async def test_a_place_that_does_not_exist_is_empty(self, unprepared: Store) -> None:
        assert await names(unprepared) == []
        with pytest.raises(FileNotFoundError):
            await unprepared.stat("a.pt")

    async def test_prepare_leaves_committed_files(self, store: Store) -> None:
        await put(store, "a.pt", b"one")
        await store.prepare()
        assert await get(store, "a.pt") == b"one"

    @pytest.mark.parametrize(
        ("chunks", "more"),
        [(0, 0), (0, 1), (0, 4096), (0, 1_500_001), (1, -1), (1, 0), (1, 1), (2, 4096), (2, 12_345)],
    )
    async def test_what_is_committed_is_read_back(self, store: Store, chunks: int, more: int) -> None:
        async with store.draft("probe.pt", 0) as draft:
            size = chunks * draft.chunk + more
            assert draft.chunk > 0
            assert draft.chunk % 4096 == 0
            assert draft.writers >= 1
        data = content(size)
        await put(store, "a.pt", data)
        assert await get(store, "a.pt") == data
        assert [(file.name, file.nbytes) for file in await store.list()] == [("a.pt", size)]

    @pytest.mark.parametrize(("offset", "length"), [(0, 3 << 20), (4096, 1 << 20), (1, 5), (3_000_000, 0)])
    async def test_a_range_is_read_on_any_thread(self, store: Store, offset: int, length: int) -> None:
        data = content(3 << 20)
        await put(store, "a.pt", data)
        async with store.open("a.pt") as file:
            assert file.chunk > 0
            assert file.chunk % 4096 == 0
            assert file.readers >= 1
            one, other = (memoryview(mmap.mmap(-1, max(length, 1)))[:length] for _ in range(2))
            await file.read(offset, one)
            read = file.blocking_reader()
            if read is not None:
                await in_thread(read, offset, other)
                assert other == data[offset : offset + length]
        assert one == data[offset : offset + length]

    @pytest.mark.parametrize(
        "name",
        ["epoch=3-val_loss=0.25.ckpt", "no suffix", ".hidden", "größe-日本.pt", "a#b%20?.pt", "-v"],
    )
    async def test_names_stay_as_they_are(self, store: Store, name: str) -> None:
        await put(store, name, b"data")
        assert await names(store) == [name]
        assert (await store.stat(name)).name == name
        assert await get(store, name) == b"data"
        assert name in store.path_of(name)

    async def test_a_version_stays_until_the_content_changes(self, store: Store) -> None:
        await put(store, "a.pt", b"one")
        first = await store.stat("a.pt")
        assert list(await store.list()) == [first]
        await put(store, "b.pt", b"two")
        assert await store.stat("a.pt") == first
        await put(store, "a.pt", b"six")
        assert (await store.stat("a.pt")).version != first.version

    async def test_a_draft_is_invisible_until_its_commit(self, store: Store) -> None:
        async with store.draft("a.pt", 3) as draft:
            await write_all(draft, b"one")
            assert await names(store) == []
            with pytest.raises(FileNotFoundError):
                await store.stat("a.pt")
            await draft.commit()
            assert draft.sync_seconds >= 0
            assert await get(store, "a.pt") == b"one"

    async def test_a_commit_replaces_the_whole_file(self, store: Store) -> None:
        await put(store, "a.pt", content(100_000))
        async with store.draft("a.pt", 3) as draft:
            await write_all(draft, b"one")
            assert await get(store, "a.pt") == content(100_000)
            await draft.commit()
        assert await get(store, "a.pt") == b"one"

    @pytest.mark.parametrize("by", ["return", "error", "cancellation"])
    async def test_a_draft_left_without_commit_leaves_nothing(self, store: Store, by: str) -> None:
        async def leave(name: str) -> None:
            async with store.draft(name, 100) as draft:
                await write_all(draft, content(100))
                if by == "error":
                    raise _ExpectedError
                if by == "cancellation":
                    scope.cancel()
                    await checkpoint()

        await put(store, "a.pt", b"one")
        for name in ("a.pt", "b.pt"):
            with anyio.CancelScope() as scope:
                if by == "error":
                    with pytest.raises(_ExpectedError):
                        await leave(name)
                else:
                    await leave(name)
            assert scope.cancelled_caught == (by == "cancellation")
        assert await names(store) == ["a.pt"]
        assert await get(store, "a.pt") == b"one"

    async def test_drafts_of_several_names_are_independent(self, store: Store) -> None:
        async with anyio.create_task_group() as group:
            for i in range(5):
                group.start_soon(put, store, f"{i}.pt", content(10_000, seed=i))
        for i in range(5):
            assert await get(store, f"{i}.pt") == content(10_000, seed=i)

    async def test_of_two_drafts_of_one_name_the_last_commit_stays_whole(self, store: Store) -> None:
        one, two = content(10_000, seed=1), content(20_000, seed=2)
        async with store.draft("a.pt", len(one)) as first, store.draft("a.pt", len(two)) as second:
            await write_all(second, two)
            await write_all(first, one)
            await second.commit()
            assert await get(store, "a.pt") == two
            await first.commit()
        assert await get(store, "a.pt") == one
        assert await names(store) == ["a.pt"]

    async def test_ranges_are_read_many_at_once(self, store: Store) -> None:
        data = content(2_000_000)
        await put(store, "a.pt", data)
        ranges = [(0, 0), (0, 10), (1, 4095), (4096, 4096), (99_999, 1), (2_000_000, 0), (4096, 1 << 20)]
        ranges += [(offset, 77_777) for offset in range(0, 1_900_000, 77_777)]
        buffers = [bytearray(length) for _, length in ranges]
        async with anyio.create_task_group() as group:
            for (offset, _), buffer in zip(ranges, buffers, strict=True):
                group.start_soon(store.read, "a.pt", offset, memoryview(buffer))
        assert buffers == [data[offset : offset + length] for offset, length in ranges]

    @pytest.mark.parametrize(("offset", "length"), [(0, 101), (99, 2), (100, 1), (5000, 1), (0, 3_000_000)])
    async def test_a_range_beyond_the_end_is_an_error(self, store: Store, offset: int, length: int) -> None:
        await put(store, "a.pt", content(100))
        with pytest.raises(StoreError, match=r"a\.pt"):
            await store.read("a.pt", offset, memoryview(bytearray(length)))

    async def test_a_file_that_does_not_exist_cannot_be_read_copied_or_linked(self, store: Store) -> None:
        await put(store, "b.pt", b"two")
        with pytest.raises(FileNotFoundError):
            await store.read("a.pt", 0, memoryview(bytearray(1)))
        for make in (store.copy, store.link):
            with pytest.raises(FileNotFoundError):
                await make("a.pt", "b.pt")
        assert await get(store, "b.pt") == b"two"

    async def test_remove_removes_one_name_which_can_be_used_again(self, store: Store) -> None:
        await put(store, "a.pt", b"one")
        await put(store, "b.pt", b"two")
        for _ in range(2):  # a name that does not exist is no error
            await store.remove("a.pt")
        assert await names(store) == ["b.pt"]
        with pytest.raises(FileNotFoundError):
            await store.stat("a.pt")
        await put(store, "a.pt", b"two")
        assert await get(store, "a.pt") == b"two"

    @pytest.mark.parametrize("existing", [None, b"old"])
    async def test_a_copy_is_independent(self, store: Store, existing: bytes | None) -> None:
        if existing is not None:
            await put(store, "b.pt", existing)
        await put(store, "a.pt", b"one")
        await store.copy("a.pt", "b.pt")
        await put(store, "a.pt", b"two")
        assert await get(store, "b.pt") == b"one"
        await store.remove("a.pt")
        assert await get(store, "b.pt") == b"one"
        assert await names(store) == ["b.pt"]

    async def test_a_copy_can_be_made_again_and_onto_itself(self, store: Store) -> None:
        await put(store, "a.pt", b"one")
        for target in ("b.pt", "b.pt", "a.pt"):
            await store.copy("a.pt", target)
        assert await names(store) == ["a.pt", "b.pt"]
        await store.remove("b.pt")
        assert await get(store, "a.pt") == b"one"

    async def test_a_link_leads_to_its_source_and_replaces_what_was_there(self, store: Store) -> None:
        await put(store, "a.pt", b"one")
        await put(store, "b.pt", b"three")
        await put(store, "last.pt", b"old")
        for source, data in (("a.pt", b"one"), ("b.pt", b"three"), ("b.pt", b"three"), ("a.pt", b"one")):
            await store.link(source, "last.pt")
            assert await get(store, "last.pt") == data
            assert (await store.stat("last.pt")).nbytes == len(data)
        assert await get(store, "a.pt") == b"one"
        assert await get(store, "b.pt") == b"three"

    async def test_removing_or_replacing_a_link_leaves_its_source(self, store: Store) -> None:
        await put(store, "a.pt", b"one")
        await store.link("a.pt", "last.pt")
        await put(store, "last.pt", b"two")
        assert await get(store, "last.pt") == b"two"
        assert await get(store, "a.pt") == b"one"
        await store.link("a.pt", "last.pt")
        await store.remove("last.pt")
        assert await names(store) == ["a.pt"]
        assert await get(store, "a.pt") == b"one"

    async def test_a_link_to_itself_changes_nothing(self, store: Store) -> None:
        await put(store, "a.pt", b"one")
        await store.link("a.pt", "last.pt")
        await store.link("a.pt", "a.pt")
        await store.link("last.pt", "a.pt")
        assert await get(store, "a.pt") == b"one"
        assert await get(store, "last.pt") == b"one"
