"""A gate at which operations of another thread or event loop wait until a test opens it."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

from anyio import to_thread


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
