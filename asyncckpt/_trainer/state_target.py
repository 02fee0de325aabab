"""A destination of saves that is somebody else's writer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncckpt._loading.planned import load_plan
from asyncckpt._saving.targets import Target
from asyncckpt._threads import in_thread
from asyncckpt.types import Checkpoint, SaveStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._saving.staging import Snapshot


@dataclass(slots=True, eq=False)
class StateTarget(Target):
    """What somebody else's writer makes of the state in host memory.

    Attributes:
        path: what the user calls it.
        save: called with the state, whose tensors are only valid until it returns.
    """

    path: str
    save: Callable[[Any], object]

    async def write(self, snapshot: Snapshot, stats: SaveStats) -> Checkpoint:
        """Wait for the copy and hand the state over."""
        await in_thread(snapshot.filled.wait, snapshot.body.nbytes)
        await in_thread(snapshot.settle)
        began = time.perf_counter()
        await in_thread(lambda: self.save(load_plan(snapshot.plan(b"{}"), snapshot.lease.view)))
        stats.write = time.perf_counter() - began
        return Checkpoint(None, self.path, {}, snapshot.body.nbytes, time.time())
