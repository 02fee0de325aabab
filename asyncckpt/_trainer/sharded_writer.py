"""Save directories to which every rank adds its part, and the first rank `meta.pt`, in one commit."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._saving.ranked import Ranked
from asyncckpt._saving.request import SaveRequest
from asyncckpt._snapshot.freeze import Freezer
from asyncckpt.layout.description import Description

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._saving.save import Save
    from asyncckpt._saving.saver import Saver
    from asyncckpt._snapshot.deferred import Overlap
    from asyncckpt.stores.base import Store

# What Lightning calls the file of what is neither weights nor optimizer state.
_META = "meta.pt"


class ShardedWriter:
    """Saves the shards of all ranks. All ranks make theirs, and call it in the same order.

    Args:
        saver: takes the snapshots of this rank.
        timeout: seconds that a rank waits for the others.
    """

    def __init__(self, saver: Saver, timeout: float) -> None:
        self._ranked = Ranked(True, None, timeout, "a sharded strategy of Lightning", saver, "wait")  # noqa: FBT003

    def save(  # noqa: PLR0913, PLR0917 - what is saved, and where
        self,
        shards: dict[str, Any],
        rest: dict[str, Any],
        store: Store,
        name: str,
        step: int | None,
        began: float,
        overlap: Callable[[list[Any]], tuple[Overlap | None, str]],
        refuse: Callable[[], object],
    ) -> Save:
        """Take the snapshot of this rank; return once the state may be changed.

        Args:
            shards: what DCP saves.
            rest: for `meta.pt`; that of rank 0 counts.
            store: where the directory is.
            name: of the directory.
            step: the training step, if there is one.
            began: start of the public call, by `time.perf_counter`.
            overlap: as of `SaveRequest`.
            refuse: called on rank 0; what it raises ends the save on all ranks.

        Raises:
            SaveError: a rank cannot save, or an earlier save failed and its error was not raised yet. No rank
                has started this save.
        """
        extras: dict[str, bytes] = {}

        def prepare() -> None:
            refuse()
            extras[_META] = _pickled(rest)

        description = Description(0, step, {}, time.time())
        wanted = SaveRequest(step, shards, store, name, description, began, prepare, overlap, extras=extras)
        return self._ranked.saves().save(wanted)

    def end(self) -> None:
        """Wait until all ranks have heard of all saves: one of them has the store that tells the others.

        Raises:
            RankError: another rank does not come in time.
        """
        self._ranked.agree("the end of the saves", (), None)

    def close(self) -> None:
        """Leave nothing in the store of the process group."""
        self._ranked.close()


def _pickled(rest: dict[str, Any]) -> bytes:
    Freezer().freeze(rest)  # which names what cannot be pickled, or is a shard
    file = io.BytesIO()
    torch.save(rest, file)
    return file.getvalue()
