"""Stores behind URLs keep the contract of every store."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from asyncckpt.errors import StoreError
from asyncckpt.stores import open_store
from asyncckpt.stores.remote import RemoteStore
from asyncckpt.stores.s3 import S3Draft, S3Store
from asyncckpt.testing.folder_contract import FolderContract
from asyncckpt.testing.store_contract import names, put

if TYPE_CHECKING:
    from asyncckpt.stores.base import Store
    from object_servers import MotoServer

count = itertools.count()


class TestMemory(FolderContract):
    def make_store(self) -> Store:
        return open_store(f"memory://store-{next(count)}/run")


class TestS3(FolderContract):
    @pytest.fixture(autouse=True)
    def options(self, moto: MotoServer) -> None:
        self._options = {"key": "k", "secret": "s", "endpoint_url": moto.url}

    def make_store(self) -> Store:
        return open_store(f"s3://bucket/store-{next(count)}/run", self._options)


class FailingFile:
    """A stream whose disk is full."""

    def __init__(self, file: Any, at: str) -> None:
        self._file = file
        self._at = at

    def write(self, data: memoryview) -> int:
        if self._at == "write":
            raise RuntimeError("the other side has no room")
        return self._file.write(data)  # type: ignore[no-any-return]

    def close(self) -> None:
        if self._at == "close":
            raise RuntimeError("the other side has no room")
        self._file.close()


@pytest.mark.parametrize("at", ["write", "close"])
async def test_whatever_a_file_system_raises_is_an_error_of_the_store(at: str) -> None:
    class Failing(MemoryFileSystem):  # type: ignore[misc] # it has no types
        def open(self, *arguments: Any, **options: Any) -> Any:
            return FailingFile(super().open(*arguments, **options), at)

    store = RemoteStore(Failing(skip_instance_cache=True), "memory://failing", f"/failing-{at}")
    await store.prepare()
    with pytest.raises(StoreError, match="the other side has no room"):
        await put(store, "a.pt", b"one")
    assert await names(store) == []


@pytest.mark.parametrize("size", [0, 1, 5 << 20, 50_000 << 20, (50_000 << 20) + 1, 5 << 40])
def test_no_upload_has_more_parts_than_it_may(size: int) -> None:
    store = S3Store(MemoryFileSystem(), "s3://bucket/run", "bucket/run")
    draft = S3Draft(store, "run/a.pt", size, "s3://bucket/run/a.pt")
    assert draft.chunk >= 5 << 20
    assert draft.chunk % 4096 == 0
    assert -(-size // draft.chunk) <= 10_000
    assert draft.chunk == 5 << 20 or draft.chunk < size / 10_000 + 4096
