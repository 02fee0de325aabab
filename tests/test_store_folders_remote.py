"""Folders of remote stores: the mark alone decides; what crashed writers left is removed later."""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from asyncckpt.errors import StoreError
from asyncckpt.stores import FOLDER_MARK, open_store, remote, s3
from asyncckpt.stores.remote_folder import RemoteFolderDraft
from asyncckpt.stores.temporary import intent_name
from asyncckpt.testing.folder_contract import fill, folder_names, get_folder, put_folder
from asyncckpt.testing.store_contract import get, names, put
from object_servers import status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncckpt.stores import StoredFile
    from asyncckpt.stores.remote import RemoteStore
    from object_servers import FaultyProxy, MotoServer, Request

OLD = {"__0_0.distcp": b"zero", "__1_0.distcp": b"one"}
NEW = {"__0_0.distcp": b"none", "__2_0.distcp": b"two"}
count = itertools.count()


@pytest.fixture(params=["memory", "s3"])
async def store(request: pytest.FixtureRequest) -> RemoteStore:
    if request.param == "memory":
        store = open_store(f"memory://folders-{next(count)}/run")
    else:
        moto: MotoServer = request.getfixturevalue("moto")
        options = {"key": "k", "secret": "s", "endpoint_url": moto.url}
        store = open_store(f"s3://bucket/folders-{next(count)}/run", options)
    assert isinstance(store, remote.RemoteStore)
    await store.prepare()
    return store


@pytest.fixture
async def proxied(proxy: FaultyProxy) -> RemoteStore:
    """A store on S3 whose requests are seen, and fail if told to."""
    options = {"key": "k", "secret": "s", "endpoint_url": proxy.url}
    store = open_store(f"s3://bucket/folders-{next(count)}/run", options)
    assert isinstance(store, remote.RemoteStore)
    await store.prepare()
    return store


async def everything(store: RemoteStore) -> list[str]:
    """Return all names under the directory, temporary ones and those in folders included."""
    store.changed()
    try:
        found = await store.call_fs("find", store._root)
    except FileNotFoundError:
        return []
    return sorted(path[len(store._root) + 1 :] for path in found)


def started_later(store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> RemoteStore:
    """Return the store of a writer to whom all that is there is old."""
    monkeypatch.setattr(remote, "ABANDONED_AFTER", -3600.0)
    return type(store)(store._fs, store.path_of("").rstrip("/"), store._root)


async def crash(store: RemoteStore, name: str) -> str:
    """Leave the draft of a folder as a killed process leaves it; returns its attempt."""
    draft = RemoteFolderDraft(store, name)
    await draft.open()
    await fill(draft, NEW)
    return draft.attempt


class TestAbandoned:
    async def test_the_draft_of_a_killed_writer_is_removed_once_it_is_old(
        self, store: RemoteStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await put_folder(store, "a", OLD)
        before = await everything(store)
        for name in ("a", "b"):
            await crash(store, name)
        left = await everything(store)
        assert len(left) == len(before) + 6
        assert await names(store) == []
        store._prepared = False
        await store.prepare()
        assert await everything(store) == left
        await started_later(store, monkeypatch).prepare()
        assert await everything(store) == before
        assert await get_folder(store, "a") == OLD

    async def test_a_folder_that_was_committed_stays_though_its_record_is_still_there(
        self, store: RemoteStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draft = RemoteFolderDraft(store, "a")
        await draft.open()
        recorded = await store.read_all(draft.attempt)
        await draft.commit(await fill(draft, NEW))
        committed = await everything(store)
        await store.call_fs("pipe_file", f"{store._root}/{draft.attempt}", recorded)
        await started_later(store, monkeypatch).prepare()
        assert await everything(store) == committed
        assert await get_folder(store, "a") == NEW

    async def test_what_cannot_be_read_does_not_stop_the_start(
        self, store: RemoteStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        odd = intent_name("a")
        await store.call_fs("pipe_file", f"{store._root}/{odd}", b"{")
        await crash(store, "b")
        await started_later(store, monkeypatch).prepare()
        assert await everything(store) == [odd]
        assert "what a crashed writer left is still there" in caplog.text

    async def test_the_removal_of_a_killed_writer_is_finished(
        self, store: RemoteStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Killed(BaseException):
            pass

        async def die(_: str) -> None:
            raise Killed

        await put_folder(store, "a", OLD)
        await put_folder(store, "b", OLD)
        with monkeypatch.context() as patch:
            patch.setattr(store, "remove_directory", die)
            with pytest.raises(Killed):
                await store.remove("a")
        assert await folder_names(store) == ["b"]
        assert len(await names(store.folder("a"))) == 2
        await started_later(store, monkeypatch).prepare()
        assert {name.partition("/")[0] for name in await everything(store)} == {"b"}
        assert await get_folder(store, "b") == OLD

    async def test_the_rest_of_a_folder_stays_that_is_made_anew(
        self, store: RemoteStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await put_folder(store, "a", OLD)
        prefixes = sorted({f"{name.partition('.')[0]}." for name in await names(store.folder("a"))} - {"."})
        record = json.dumps({"folder": "a", "prefixes": prefixes, "given_up": True}).encode()
        await store.remove("a")
        await put_folder(store, "a", NEW)
        await store.call_fs("pipe_file", f"{store._root}/{intent_name('a')}", record)
        await started_later(store, monkeypatch).prepare()
        assert await get_folder(store, "a") == NEW
        assert len(await everything(store)) == 3


class TestJoined:
    async def test_what_comes_after_a_draft_was_given_up_is_removed_by_who_made_it(
        self, store: RemoteStore
    ) -> None:
        async with store.folder_draft("a") as draft:
            joining = store.join_folder("a", draft.attempt)
            joined = await joining.__aenter__()
        await put(joined.store, joined.member("__1_0.distcp"), b"late")
        assert len(await everything(store)) == 1
        await joining.__aexit__(None, None, None)
        assert await everything(store) == []

    async def test_what_comes_while_a_draft_is_removed_is_removed_too(
        self, store: RemoteStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It comes after the files were listed, and is there before the record is gone."""
        real, calls = type(store).list, itertools.count(1)

        async def listed(listing: RemoteStore) -> Sequence[StoredFile]:
            files = await real(listing)
            if next(calls) == 1:
                await put(joined.store, joined.member("__1_0.distcp"), b"late")
                await joining.__aexit__(None, None, None)
            return files

        async with store.folder_draft("a") as draft:
            joining = store.join_folder("a", draft.attempt)
            joined = await joining.__aenter__()
            monkeypatch.setattr(type(store), "list", listed)
        assert next(calls) > 1
        assert await everything(store) == []

    async def test_what_was_committed_stays(self, store: RemoteStore) -> None:
        async with store.folder_draft("a") as draft, store.join_folder("a", draft.attempt) as joined:
            await put(joined.store, joined.member("__1_0.distcp"), b"one")
            await draft.commit(f"__1_0.distcp {joined.member('__1_0.distcp')}\n".encode())
        assert await get_folder(store, "a") == {"__1_0.distcp": b"one"}

    async def test_a_draft_is_of_one_folder(self, store: RemoteStore) -> None:
        async with store.folder_draft("a") as draft:
            with pytest.raises(StoreError, match="not shared by the hosts"):
                async with store.join_folder("b", draft.attempt):
                    pass


class TestCopies:
    async def test_a_failed_copy_leaves_nothing_and_the_former_folder(
        self, store: RemoteStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await put_folder(store, "a", NEW)
        await put_folder(store, "b", OLD)
        before = await everything(store)
        method = "_cp_file" if store._fs.async_impl else "cp_file"
        real, calls = getattr(store._fs, method), itertools.count(1)

        def fail(*paths: str, **options: Any) -> Any:
            if next(calls) == 2:
                raise OSError("the other side is gone")
            return real(*paths, **options)

        monkeypatch.setattr(store._fs, method, fail)
        with pytest.raises(StoreError, match="the other side is gone"):
            await store.copy("a", "b")
        monkeypatch.undo()
        assert await everything(store) == before
        assert await get_folder(store, "b") == OLD

    async def test_a_folder_replaced_while_it_is_copied_makes_no_copy(
        self, store: RemoteStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = type(store).copy_to

        async def copy_to(origin: RemoteStore, other: RemoteStore, name: str) -> None:
            await real(origin, other, name)
            await put_folder(store, "a", OLD)

        await put_folder(store, "a", {"__0_0.distcp": b"one"})
        monkeypatch.setattr(type(store), "copy_to", copy_to)
        with pytest.raises(FileNotFoundError, match="replaced while it was copied"):
            await store.copy("a", "b")
        assert await folder_names(store) == ["a"]
        assert len(await everything(store)) == len(OLD) + 1

    async def test_files_of_an_attempt_under_way_are_not_copied(self, store: RemoteStore) -> None:
        await put_folder(store, "a", NEW)
        async with store.folder_draft("a") as draft:
            await fill(draft, OLD)
            await store.copy("a", "b")
        assert len(await names(store.folder("b"))) == len(NEW) + 1

    async def test_a_folder_of_another_writer_is_copied_over_one_of_the_same_names(
        self, store: RemoteStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, seen = type(store).copy_to, []

        async def copy_to(origin: RemoteStore, other: RemoteStore, name: str) -> None:
            seen.append(await folder_names(store))
            await real(origin, other, name)

        monkeypatch.setattr(type(store), "copy_to", copy_to)
        for name, files in (("a", NEW), ("b", OLD)):
            await store.make_folder(name)
            for file, data in files.items():
                await put(store.folder(name), file, data)
            mark = "".join(f"{file} {file}\n" for file in files)
            await put(store.folder(name), FOLDER_MARK, mark.encode())
        await put(store.folder("a"), "meta.pt", b"more")
        await store.copy("a", "b")
        assert seen == [["a"]] * 3  # a mixture of both is never a committed folder
        assert await get_folder(store, "b") == NEW
        assert await names(store.folder("b")) == [".metadata", "__0_0.distcp", "__2_0.distcp", "meta.pt"]

    async def test_a_folder_of_another_directory_is_copied(self, store: RemoteStore) -> None:
        other = type(store)(store._fs, f"{store._given}/../other", store._root.replace("/run", "/other"))
        await put_folder(other, "a", NEW)
        await store.copy("../other/a", "b")
        assert await get_folder(store, "b") == NEW

    async def test_a_directory_without_a_mark_is_not_copied(self, store: RemoteStore) -> None:
        await store.make_folder("a")
        await put(store.folder("a"), "file", b"one")
        with pytest.raises(FileNotFoundError):
            await store.copy("a", "b")
        assert await everything(store) == ["a/file"]


def is_mark(request: Request) -> bool:
    return request.method == "PUT" and request.path.endswith(FOLDER_MARK)


class TestS3:
    async def test_the_mark_comes_last_and_goes_first(self, proxied: RemoteStore, proxy: FaultyProxy) -> None:
        async with proxied.folder_draft("a") as draft:
            mark = await fill(draft, OLD)
            proxy.reset()
            await draft.commit(mark)
        steps = [(request.operation, request.path.rpartition("/")[2]) for request in proxy.requests]
        assert [operation for operation, _ in steps] == ["GetObject", "PutObject"] + 2 * ["DeleteObjects"]
        assert steps[1][1] == FOLDER_MARK
        proxy.reset()
        await proxied.remove("a")
        operations = [request.operation for request in proxy.requests]
        changes = [name for name in operations if name in {"PutObject", "DeleteObjects"}]
        assert changes == ["PutObject", *3 * ["DeleteObjects"]]

    @pytest.mark.parametrize("code", [403, 500])
    async def test_a_mark_that_cannot_be_written_leaves_the_former_folder(
        self,
        proxied: RemoteStore,
        proxy: FaultyProxy,
        monkeypatch: pytest.MonkeyPatch,
        code: int,
    ) -> None:
        await put_folder(proxied, "a", OLD)
        before = await everything(proxied)
        proxy.fail(is_mark, status(code, "AccessDenied" if code == 403 else "InternalError"), times=math.inf)
        with pytest.raises(StoreError, match="whether a is committed is not known"):
            await put_folder(proxied, "a", NEW)
        assert await get_folder(proxied, "a") == OLD
        # The store may yet carry the request out: the new files are removed when that cannot be any more.
        proxy.reset()
        assert len(await everything(proxied)) == len(before) + 3
        await started_later(proxied, monkeypatch).prepare()
        assert await everything(proxied) == before
        assert await get_folder(proxied, "a") == OLD

    async def test_replaced_files_that_cannot_be_removed_do_not_fail_the_commit(
        self, proxied: RemoteStore, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        await put_folder(proxied, "a", OLD)
        proxy.fail(lambda request: request.operation == "DeleteObjects", status(403, "AccessDenied"), times=9)
        await put_folder(proxied, "a", NEW)
        assert await get_folder(proxied, "a") == NEW
        assert "removing replaced files failed" in caplog.text

    async def test_a_file_of_that_name_is_replaced(self, proxied: RemoteStore) -> None:
        await put(proxied, "a", b"file")
        await put_folder(proxied, "a", NEW)
        assert await names(proxied) == []
        assert await get_folder(proxied, "a") == NEW

    async def test_as_many_are_removed_with_a_request_as_it_may_name(
        self, proxied: RemoteStore, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3, "_REMOVED_AT_ONCE", 2)
        for name in "abcde":
            await put(proxied, name, b"one")
        proxy.reset()
        await proxied.remove_files(["a", "b", "c", "e", "none"])
        assert await names(proxied) == ["d"]
        assert len(proxy.seen("DeleteObjects")) == 3
        assert await get(proxied, "d") == b"one"
