"""Stores that wrap another one and make it slow, or make it fail."""

# ruff: noqa: D102 - methods without a docstring do what `Store`, `Draft` and `OpenFile` say

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from asyncckpt.stores import Draft, FolderDraft, OpenFile, Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from asyncckpt.testing.gate import Gate


def _wrapped(operation: str) -> Any:
    """Return the method of a wrapper that calls `before`, then the same method of the inner store."""

    async def call(self: WrapperStore, *names: str) -> Any:
        await self.before(operation, names[-1] if names else "")
        return await getattr(self.inner, operation)(*names)

    return call


class WrapperStore(Store):
    """A store that does something before each operation of another one.

    Operations are named by their methods: `prepare`, `draft`, `write`, `commit`, `list`, `stat`,
    `open`, `read`, `remove`, `copy`, `link`, `list_folders`, `folder_draft` and `join_folder`; the commit of
    a folder is `commit_folder`. Their subject is the name of the file or folder; for `copy` and `link` that
    of the target, for `prepare`, `list` and `list_folders` an empty string. A file in a folder is
    "folder/file".

    Attributes:
        inner: the store that does the work.
    """

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.overlaps = inner.overlaps

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    @abstractmethod
    async def before(self, operation: str, subject: str) -> None:
        """Called before each operation, which fails with what this raises."""

    prepare = _wrapped("prepare")
    list = _wrapped("list")
    stat = _wrapped("stat")
    remove = _wrapped("remove")
    copy = _wrapped("copy")
    link = _wrapped("link")
    list_folders = _wrapped("list_folders")

    def path_of(self, name: str) -> str:
        return self.inner.path_of(name)

    async def exists(self) -> bool:
        return await self.inner.exists()

    @asynccontextmanager
    async def draft(self, name: str, size: int) -> AsyncIterator[Draft]:
        await self.before("draft", name)
        async with self.inner.draft(name, size) as draft:
            yield _WrapperDraft(self, draft, name)

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[OpenFile]:
        await self.before("open", name)
        async with self.inner.open(name) as file:
            yield _WrapperFile(self, file)

    def folder(self, name: str) -> Store:
        return _WrapperFolder(self, self.inner.folder(name), name)

    @asynccontextmanager
    async def folder_draft(self, name: str) -> AsyncIterator[FolderDraft]:
        await self.before("folder_draft", name)
        async with self.inner.folder_draft(name) as draft:
            yield _WrapperFolderDraft(self, draft, name)

    @asynccontextmanager
    async def join_folder(self, name: str, attempt: str) -> AsyncIterator[FolderDraft]:
        await self.before("join_folder", name)
        async with self.inner.join_folder(name, attempt) as draft:
            yield _WrapperFolderDraft(self, draft, name)


class _WrapperFolder(WrapperStore):
    """The files of a folder, whose operations the wrapper of the directory is told of."""

    def __init__(self, outer: WrapperStore, inner: Store, name: str) -> None:
        super().__init__(inner)
        self._outer, self._name = outer, name

    async def before(self, operation: str, subject: str) -> None:
        await self._outer.before(operation, f"{self._name}/{subject}")


class _WrapperFolderDraft(FolderDraft):
    def __init__(self, store: WrapperStore, inner: FolderDraft, name: str) -> None:
        self.attempt = inner.attempt
        self.store = _WrapperFolder(store, inner.store, name)
        self._store, self._inner, self._name = store, inner, name

    def member(self, name: str) -> str:
        return self._inner.member(name)

    async def commit(self, mark: bytes) -> None:
        await self._store.before("commit_folder", self._name)
        await self._inner.commit(mark)


class _WrapperFile(OpenFile):
    def __init__(self, store: WrapperStore, inner: OpenFile) -> None:
        self.file, self.path = inner.file, inner.path
        self.chunk, self.readers = inner.chunk, inner.readers
        self._store, self._inner = store, inner

    async def read(self, offset: int, into: memoryview) -> None:
        await self._store.before("read", self.file.name)
        await self._inner.read(offset, into)


class _WrapperDraft(Draft):
    def __init__(self, store: WrapperStore, inner: Draft, name: str) -> None:
        self.chunk, self.writers = inner.chunk, inner.writers
        self._store, self._inner, self._name = store, inner, name

    async def write(self, offset: int, data: memoryview) -> None:
        await self._store.before("write", self._name)
        await self._inner.write(offset, data)

    async def commit(self) -> None:
        await self._store.before("commit", self._name)
        await self._inner.commit()
        self.sync_seconds = self._inner.sync_seconds


class SlowStore(WrapperStore):
    """A store whose operations wait.

    Args:
        inner: the store that does the work.
        gates: for each operation to be held back, the gate that it waits at.
        delays: for each operation to be slowed down, the seconds that it waits then.
        sleep: what waits for a delay, for tests that keep a clock of their own.
    """

    def __init__(
        self,
        inner: Store,
        *,
        gates: Mapping[str, Gate] | None = None,
        delays: Mapping[str, float] | None = None,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        super().__init__(inner)
        self._gates = dict(gates or {})
        self._delays = dict(delays or {})
        self._sleep = sleep

    async def before(self, operation: str, subject: str) -> None:  # noqa: ARG002 - all files wait alike
        """Wait at the gate of the operation, then for its delay."""
        if operation in self._gates:
            await self._gates[operation].passing()
        if operation in self._delays:
            await self._sleep(self._delays[operation])


class Faults:
    """Failures that a test asks for."""

    def __init__(self) -> None:
        self._faults: list[tuple[Callable[[str, str], bool], BaseException]] = []

    def fail(
        self,
        operation: str,
        error: BaseException,
        *,
        at: int = 1,
        times: int | None = 1,
        where: Callable[[str], bool] | None = None,
    ) -> None:
        """Let calls of an operation fail, instead of carrying them out.

        Args:
            operation: the name of the method, or `write`, `commit` or `read`; see `WrapperStore`.
            error: what it raises.
            at: which call from now on is the first to fail, counted from 1.
            times: how many fail from there on; None for all.
            where: counts only calls whose subject, a name or a path, this is true of.
        """
        calls, end = itertools.count(1), math.inf if times is None else at + times

        def strikes(called: str, subject: str) -> bool:
            return called == operation and (where is None or where(subject)) and at <= next(calls) < end

        self._faults.append((strikes, error))

    def reset(self) -> None:
        """Let everything work again."""
        self._faults.clear()

    def raise_chosen(self, operation: str, subject: str) -> None:
        """Raise what this call is to fail with, if anything; from any thread."""
        struck = [error for strikes, error in tuple(self._faults) if strikes(operation, subject)]
        if struck:
            raise struck[0]


class FaultyStore(Faults, WrapperStore):
    """A store of which chosen operations fail, before they reach the inner one.

    Attributes:
        calls: how often each operation was called, those that failed included.
    """

    def __init__(self, inner: Store) -> None:
        Faults.__init__(self)
        WrapperStore.__init__(self, inner)
        self.calls: Counter[str] = Counter()

    def reset(self) -> None:
        """Let everything work again, and count the calls from 0."""
        super().reset()
        self.calls.clear()

    async def before(self, operation: str, subject: str) -> None:
        """Count the call, and fail it if it is one that was chosen."""
        self.calls[operation] += 1
        self.raise_chosen(operation, subject)
