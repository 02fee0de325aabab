"""What a caller holds of a save: two futures and what it cost."""

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
    """A future that those who wait for it cannot cancel, and that knows whether its error was seen."""

    heard = False

    def __init__(self) -> None:
        super().__init__()
        # An interrupt in whoever waits must not keep the engine from setting the result.
        self._condition = Condition()  # type: ignore[assignment] # it has what a future needs of it

    def cancel(self) -> bool:
        """Refuse: the save goes on, and others may be waiting for it."""
        return False

    def abandon(self, error: BaseException | None) -> None:
        """End it in a forked child, where nobody else will; another thread may have held its lock."""
        self._condition = Condition()  # type: ignore[assignment]
        self.heard = True
        if not self.done():
            self.set_exception(error)

    def failed(self) -> bool:
        """Return whether it is done and failed; asking this does not make the failure heard."""
        return self.done() and super().exception() is not None

    def result(self, timeout: float | None = None) -> T:
        """Return what the save became, or raise what it failed with."""
        self._wait(timeout)
        try:
            return super().result(0)
        finally:
            self.heard = self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the save failed with, or None."""
        self._wait(timeout)
        try:
            return super().exception(0)
        finally:
            self.heard = self.done()

    def _wait(self, timeout: float | None) -> None:
        condition: Any = self._condition
        if not condition.until(self._is_done, timeout):
            raise FutureTimeoutError

    def _is_done(self) -> bool:
        return self._state == FINISHED


@dataclass(eq=False, slots=True)
class Save:
    """One save under way.

    Attributes:
        step: as given to `save`; None for a file saved without one.
        path: where the checkpoint will be.
        snapshotted: done when the state may be changed again, which is before `save` returns.
        committed: done when the checkpoint is durable; its result is the `Checkpoint`.
        skipped: whether nothing is saved, as the writer was busy; `committed` then raises `SaveSkipped`.
        stats: what the save cost, complete when `committed` is done.

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
    """Say that a save is not made, which is no failure."""
    save.skipped = True
    save.committed.heard = True
    if not save.snapshotted.done():
        save.snapshotted.set_result(None)
    save.committed.set_exception(SaveSkipped(f"{save.path} was not saved: {why}"))
    return save
