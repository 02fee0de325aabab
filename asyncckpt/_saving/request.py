"""What is asked for in a save."""

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
class SaveRequest:
    """What is asked for in a save: of this rank, or of all together.

    Attributes:
        step: the training step; None for a folder that belongs to no series.
        state: the live state.
        store, name, description: the file or folder.
        began: start of the public call, by `time.perf_counter`.
        refuse: called on the rank that commits; raises if another checkpoint would be replaced.
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
