"""Take snapshots of what one rank writes of a state of many ranks."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._saving.staging import Stager
from asyncckpt._snapshot.freeze import Freezer
from asyncckpt._snapshot.shards import shards_of
from asyncckpt.errors import SaveError
from asyncckpt.layout.item_file import Blob, ItemFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncckpt._sharding.planning import Kept
    from asyncckpt._snapshot.arena import Arena
    from asyncckpt._snapshot.ranges import Ranges
    from asyncckpt._snapshot.shards import Shards
    from asyncckpt.types import SaveStats


@dataclass(frozen=True, slots=True)
class FrozenItems:
    """What a rank writes, but for the bytes of its tensors.

    Attributes:
        pickles, sizes: of each tensor.
        blobs: what is no tensor.
        on_cuda: whether a tensor is on a CUDA device.
    """

    pickles: Sequence[bytes]
    sizes: Sequence[int]
    blobs: Sequence[Blob]
    on_cuda: bool


class ShardStager(Stager):
    """Take successive snapshots of one rank's part.

    Args:
        arena: the host memory for the copies.
    """

    def __init__(self, arena: Arena) -> None:
        super().__init__(arena, ItemFile())
        self._last: Shards | None = None

    def freeze(self, state: tuple[Kept, dict[str, Any]], stats: SaveStats) -> tuple[FrozenItems, Ranges]:
        """Pickle what is no tensor; return that, and the ranges to copy.

        Args:
            state: which items this rank writes, and the flat state that they are of.
            stats: `freeze` is set.

        Raises:
            SaveError: an item cannot be saved; the message names it.
        """
        began = time.perf_counter()
        kept, flat = state
        names = [index.fqn for index in kept.indices]
        shards, ranges = shards_of(kept.tensors(flat), names[: kept.tensor_count], self._last)
        self._last = shards
        objects = zip(names[kept.tensor_count :], kept.objects(flat), strict=True)
        blobs = [_blob(name, value) for name, value in objects]
        on_cuda = any(device.type == "cuda" for device in {source.device for source in ranges.sources})
        stats.freeze += time.perf_counter() - began
        return FrozenItems(shards.pickles, shards.sizes, blobs, on_cuda), ranges

    def pins(self, frozen: FrozenItems) -> bool:
        return frozen.on_cuda


def _blob(name: str, value: Any) -> Blob:
    """Pickle an object as torch.save would; one that holds tensors becomes a whole file of torch.save."""
    try:
        frozen, _ = Freezer().freeze(value)
    except SaveError as error:
        raise type(error)(f"{name}: {error}") from error
    if not frozen.sizes:
        return Blob(frozen.data_pickle())
    file = io.BytesIO()
    torch.save(value, file)
    return Blob(file.getvalue(), is_zip=True)
