"""The handle of a save: two futures and its cost."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures._base import FINISHED
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from asyncckpt._threads import Condition
from asyncckpt.errors import SaveSkipped
from asyncckpt.types import Checkpoint, SaveStats

if TYPE_CHECKING:
    from collections.abc import Generator

T = TypeVar("T")


class Outcome(Future[T]):
    """A future that cannot be cancelled and knows whether its result was retrieved.

    Attributes:
        retrieved: whether its result was retrieved, or its failure is reported elsewhere.
    """

    retrieved = False

    def __init__(self) -> None:
        super().__init__()
        # An interrupted waiter must not keep the engine from setting the result.
        self._condition = Condition()  # type: ignore[assignment] # it has the methods that a future uses

    def cancel(self) -> bool:
        """Return False: the save continues, and others may wait for it."""
        return False

    def abandon(self, error: BaseException | None) -> None:
        """Resolve it in a forked child; a thread that exists only in the parent may hold its lock."""
        self._condition = Condition()  # type: ignore[assignment]
        self.retrieved = True
        if not self.done():
            self.set_exception(error)

    def failed(self) -> bool:
        """Return whether it is done and failed, without marking the failure as retrieved."""
        return self.done() and super().exception() is not None

    def result(self, timeout: float | None = None) -> T:
        """Return the result, or raise the error."""
        self._wait(timeout)
        try:
            return super().result(0)
        finally:
            self.retrieved = self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the error, or None."""
        self._wait(timeout)
        try:
            return super().exception(0)
        finally:
            self.retrieved = self.done()

    def _wait(self, timeout: float | None) -> None:
        condition: Any = self._condition
        if not condition.until(self._is_done, timeout):
            raise FutureTimeoutError

    def _is_done(self) -> bool:
        return self._state == FINISHED


@dataclass(eq=False, slots=True)
class Save:
    """A save, from the snapshot to the durable checkpoint.

    Attributes:
        step: as given to `save`; None for a file saved without one.
        path: path or URL of the checkpoint.
        snapshotted: done once the state may be changed again, which is before `save` returns; if it was
            overlapped, after the next step or `fence`, or once `committed` is done.
        committed: done once the checkpoint is durable; its result is the `Checkpoint`.
        skipped: whether it was skipped because earlier saves were pending; `committed` then raises
            `SaveSkipped`.
        stats: cost of the save, complete once `committed` is done.

    `await save` waits for `committed` without blocking the event loop.
    """

    step: int | None
    path: str
    snapshotted: Outcome[None] = field(default_factory=Outcome)
    committed: Outcome[Checkpoint] = field(default_factory=Outcome)
    skipped: bool = False
    stats: SaveStats = field(default_factory=SaveStats)

    def __await__(self) -> Generator[object, None, Checkpoint]:
        return asyncio.wrap_future(self.committed).__await__()


def skipped(save: Save, why: str) -> Save:
    """Resolve a save as skipped, which is not a failure."""
    return resolve_skipped(save, SaveSkipped(f"{save.path} was not saved: {why}"))


def resolve_skipped(save: Save, error: SaveSkipped) -> Save:
    """Do what `skipped` does, with an error that says why."""
    save.skipped = True
    save.committed.retrieved = True
    if not save.snapshotted.done():
        save.snapshotted.set_result(None)
    save.committed.set_exception(error)
    return save
