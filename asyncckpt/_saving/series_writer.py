"""Number the checkpoints of a series, and evict old ones: one listing of the directory a save."""

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
    """What a directory holds, as seen from one series."""

    @property
    def checkpoints(self) -> Sequence[Checkpoint]:
        """The checkpoints of the series, in order of commit."""

    @property
    def all_checkpoints(self) -> Sequence[Checkpoint]:
        """Those of every series."""


class SeriesWriter:
    """Gives each save its place in the order of commits, and evicts what the policy does not keep.

    Its methods run on the engine's loop, one save after the other, except `refuse_taken`.

    Args:
        store: the directory.
        look: lists it.
        keep: the policy.
        overwrite: whether a checkpoint of another step may be replaced by one of the same name.
        prepared: whether the store is.

    Attributes:
        own: the checkpoints of the series when the directory was last listed, and those committed since.
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
        self._steps: dict[str, int | None] = {}  # by file name, saves that are pending included

    async def look(self) -> Sequence[Checkpoint]:
        """List the directory; returns the checkpoints of every series in it."""
        listing = await self._look()
        self.own = list(listing.checkpoints)
        checkpoints = listing.all_checkpoints
        self._sequence = max((self._sequence, *(c.sequence for c in checkpoints)))
        self._steps |= {_name_of(c): c.step for c in checkpoints}
        return checkpoints

    def refuse_taken(self, name: str, step: int) -> None:
        """Raise if another step has this name; on the calling thread, mostly without asking the store.

        Raises:
            CheckpointExistsError: it has.
        """
        there = self._steps.get(name, step)
        if self._overwrite or there == step:
            return
        if get_engine().pending(self._store.path_of(name)):
            raise _exists(self._store.path_of(name), there, step)
        # That save may have failed, or its file may be gone: only now it is worth a look.
        get_engine().call(self._refuse_other_step, name, step)

    def taken(self, name: str, step: int) -> None:
        """Note that a save has a name."""
        self._steps[name] = step

    async def number(self, name: str, description: Description) -> Description:
        """Return the description of a save with its place in the order of commits, behind all others here.

        Raises:
            CheckpointExistsError: a checkpoint of another step, or another file, has its name.
        """
        if not self._prepared:
            await self._store.prepare()
            self._prepared = True
        if self._overwrite or description.step is None:
            await self.look()
        else:
            await self._refuse_other_step(name, description.step)
        self._sequence += 1
        return replace(description, sequence=self._sequence)

    async def evict(self, committed: Checkpoint) -> None:
        """Remove what the policy does not keep, now that a checkpoint is committed."""
        self.own = [c for c in self.own if c.path != committed.path] + [committed]
        for checkpoint in evict(self._keep, self.own):
            if checkpoint.path != committed.path:
                await self._store.remove(_name_of(checkpoint))
                logger.debug("%s is evicted", checkpoint.path)
                self._steps.pop(_name_of(checkpoint), None)
                self.own.remove(checkpoint)

    async def _refuse_other_step(self, name: str, step: int) -> None:
        path = self._store.path_of(name)
        there = next((c for c in await self.look() if c.path == path), None)
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
            f"{path} is a file that asyncckpt did not write, or is damaged, and would be replaced by step"
            f" {step}; move it away, describe it with `asyncckpt adopt`, or set overwrite=True"
        )
    msg = f"{path} is the checkpoint of step {there} and would be replaced by step {step}"
    return CheckpointExistsError(f"{msg}; put {{step}} into filename, or set overwrite=True")
