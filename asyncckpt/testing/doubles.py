"""Stores that wrap another one and make it slow, or make it fail."""

# ruff: noqa: D102 - methods without a docstring do what `Store`, `Draft` and `OpenFile` say

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from abc import abstractmethod
from collections import Counter
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
from anyio import to_thread

from asyncckpt.stores import Draft, OpenFile, Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping


class Gate:
    """A gate that operations wait at until a test opens it.

    It may be used from every thread and event loop: a test holds work back that runs in the background, and
    waits until that work has arrived, without ever sleeping. The operations that wait at it run on asyncio.
    """

    def __init__(self, *, opened: bool = False) -> None:
        self._changed = threading.Condition()
        self._opened = opened
        self._arrived = 0
        self._waiting: list[Future[None]] = []

    def __repr__(self) -> str:
        state = "open" if self._opened else "closed"
        return f"<{type(self).__name__} {state}, {self._arrived} arrived, {len(self._waiting)} waiting>"

    @property
    def arrived(self) -> int:
        """How many operations have come to the gate so far, whether they had to wait or not."""
        return self._arrived

    def open(self) -> None:
        """Let all operations through, those that wait and those to come."""
        with self._changed:
            self._opened = True
            waiting, self._waiting = self._waiting, []
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_result(None)

    def close(self) -> None:
        """Hold back the operations to come."""
        with self._changed:
            self._opened = False

    def wait_for_arrival(self, count: int = 1, *, timeout: float = 30.0) -> None:
        """Block until `count` operations in all have come to the gate.

        Raises:
            TimeoutError: fewer came within `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._arrived >= count, timeout):
                raise TimeoutError(f"{self._arrived} of {count} operations came to the gate in {timeout} s")

    async def arrival(self, count: int = 1, *, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - of the thread
        """Wait as `wait_for_arrival` does, without blocking the event loop."""
        await to_thread.run_sync(lambda: self.wait_for_arrival(count, timeout=timeout))

    async def passing(self) -> None:
        """Come to the gate, and wait until it is open."""
        future: Future[None] = Future()
        with self._changed:
            self._arrived += 1
            self._changed.notify_all()
            if self._opened:
                return
            self._waiting.append(future)
        await asyncio.wrap_future(future)


def _wrapped(operation: str) -> Any:
    """Return the method of a wrapper that calls `before`, then the same method of the inner store."""

    async def call(self: WrapperStore, *names: str) -> Any:
        await self.before(operation, names[-1] if names else "")
        return await getattr(self.inner, operation)(*names)

    return call


class WrapperStore(Store):
    """A store that does something before each operation of another one.

    Operations are named by their methods: `prepare`, `draft`, `write`, `commit`, `list`, `stat`,
    `open`, `read`, `remove`, `copy` and `link`. Their subject is the name of the file; for `copy` and `link`
    that of the target, for `prepare` and `list` an empty string.

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
