"""What a save of all ranks is to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.distributed.checkpoint.planner import SavePlanner

    from asyncckpt._saving.series_writer import SeriesWriter
    from asyncckpt._snapshot.deferred import Overlap
    from asyncckpt.layout.description import Description
    from asyncckpt.stores.base import Store


@dataclass(slots=True, eq=False)
class ShardedSave:
    """What one save of all ranks is to be.

    Attributes:
        step: the training step; None for a folder of its own.
        state: the live state.
        store, name, description: the folder.
        began: start of the public call, by `time.perf_counter`.
        refuse: called on rank 0; raises if the folder may not be written.
        overlap: returns what may be deferred, given the stateful objects of the state, and why nothing may.
        series: numbers and evicts; None for a single folder.
        rank_state: what is saved for each rank of its own; None for nothing.
        extras: other files of the folder, by name; those of rank 0 count.
        planner: makes DCP's planner; returns None for the default one.
    """

    step: int | None
    state: Any
    store: Store
    name: str
    description: Description
    began: float
    refuse: Callable[[], object]
    overlap: Callable[[list[Any]], tuple[Overlap | None, str]]
    series: SeriesWriter | None = None
    rank_state: Any = None
    extras: Mapping[str, bytes] | None = None
    planner: Callable[[], SavePlanner | None] = lambda: None
