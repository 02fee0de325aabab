"""Number the checkpoints of a series and evict old ones, with one listing of the directory per save."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from asyncckpt._saving.engine import get_engine
from asyncckpt.errors import CheckpointExistsError
from asyncckpt.retention import evict

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from asyncckpt.layout.description import Description
    from asyncckpt.retention import Policy
    from asyncckpt.stores.base import Store
    from asyncckpt.types import Checkpoint

logger = logging.getLogger("asyncckpt")


class Listing(Protocol):
    """The checkpoints of a directory, as seen from one series."""

    @property
    def checkpoints(self) -> Sequence[Checkpoint]:
        """The checkpoints of the series, in order of commit."""

    @property
    def all_checkpoints(self) -> Sequence[Checkpoint]:
        """The checkpoints of all series."""


class SeriesWriter:
    """Give each save a sequence number, and evict the checkpoints that the policy does not keep.

    Its async methods run on the engine's loop, for one save at a time.

    Args:
        store: the directory.
        look: lists the directory.
        keep: the policy.
        overwrite: whether a checkpoint of another step may be replaced by one of the same name.
        prepared: whether the store is prepared.

    Attributes:
        own: checkpoints of the series as last listed, and those committed since.
    """

    def __init__(
        self,
        store: Store,
        look: Callable[[], Awaitable[Listing]],
        keep: Policy,
        *,
        overwrite: bool,
        prepared: bool,
    ) -> None:
        self.own: list[Checkpoint] = []
        self._store = store
        self._look = look
        self._keep = keep
        self._overwrite = overwrite
        self._prepared = prepared
        self._sequence = 0
        self._steps: dict[str, int | None] = {}  # by file name, pending saves included

    async def look(self) -> Sequence[Checkpoint]:
        """List the directory; return the checkpoints of all series in it."""
        listing = await self._look()
        self.own = list(listing.checkpoints)
        checkpoints = listing.all_checkpoints
        self._sequence = max((self._sequence, *(c.sequence for c in checkpoints)))
        self._steps |= {_name_of(c): c.step for c in checkpoints}
        return checkpoints

    def refuse_taken(self, name: str, step: int) -> None:
        """Raise CheckpointExistsError if another step has this name; no I/O unless one is known."""
        there = self._steps.get(name, step)
        if self._overwrite or there == step:
            return
        if get_engine().pending(self._store.path_of(name)):
            raise _exists(self._store.path_of(name), there, step)
        # That save may have failed, or its file may have been removed: look at the store.
        get_engine().call(self._refuse_listed, name, step)

    def note_name(self, name: str, step: int) -> None:
        self._steps[name] = step

    async def number(self, name: str, description: Description) -> Description:
        """Return the description with the next sequence number of the directory.

        Raises:
            CheckpointExistsError: a checkpoint of another step, or another file, has this name.
        """
        if not self._prepared:
            await self._store.prepare()
            self._prepared = True
        checkpoints = await self.look()
        if not self._overwrite and description.step is not None:
            await self._refuse_other_step(name, description.step, checkpoints)
        self._sequence += 1
        return replace(description, sequence=self._sequence)

    async def evict(self, committed: Checkpoint) -> None:
        """Remove the checkpoints that the policy does not keep, after a commit."""
        self.own = [c for c in self.own if c.path != committed.path] + [committed]
        for checkpoint in evict(self._keep, self.own):
            if checkpoint.path != committed.path:
                await self._store.remove(_name_of(checkpoint))
                logger.debug("evicted %s", checkpoint.path)
                self._steps.pop(_name_of(checkpoint), None)
                self.own = [c for c in self.own if c.path != checkpoint.path]

    async def _refuse_listed(self, name: str, step: int) -> None:
        # A save may be under way, whose listing has to stay as it is.
        await self._refuse_other_step(name, step, (await self._look()).all_checkpoints)

    async def _refuse_other_step(self, name: str, step: int, listed: Sequence[Checkpoint]) -> None:
        path = self._store.path_of(name)
        there = next((c for c in listed if c.path == path), None)
        if there is None and not await self._is_there(name):
            return
        if there is None or there.step != step:
            raise _exists(path, there.step if there else None, step)

    async def _is_there(self, name: str) -> bool:
        try:
            await self._store.stat(name)
        except FileNotFoundError:
            return False
        return True


def _name_of(checkpoint: Checkpoint) -> str:
    return checkpoint.path.rpartition("/")[2]


def _exists(path: str, there: int | None, step: int) -> CheckpointExistsError:
    if there is None:
        return CheckpointExistsError(
            f"{path} is damaged or was not written by asyncckpt, and would be replaced by step {step}; move"
            " it, add a description with `asyncckpt adopt`, or set overwrite=True"
        )
    msg = f"{path} is the checkpoint of step {there} and would be replaced by step {step}"
    return CheckpointExistsError(f"{msg}; put {{step}} into filename, or set overwrite=True")
