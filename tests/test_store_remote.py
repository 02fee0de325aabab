"""Stores behind URLs keep the contract of every store."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from asyncckpt.stores import open_store
from asyncckpt.testing.store_contract import StoreContract
from object_servers import MotoServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncckpt.stores.base import Store

count = itertools.count()


@pytest.fixture(scope="module")
def moto() -> Iterator[MotoServer]:
    with MotoServer() as server:
        server.make_bucket("bucket")
        yield server


class TestMemory(StoreContract):
    def make_store(self) -> Store:
        return open_store(f"memory://store-{next(count)}/run")


class TestS3(StoreContract):
    @pytest.fixture(autouse=True)
    def options(self, moto: MotoServer) -> None:
        self._options = {"key": "k", "secret": "s", "endpoint_url": moto.url}

    def make_store(self) -> Store:
        return open_store(f"s3://bucket/store-{next(count)}/run", self._options)
