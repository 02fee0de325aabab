"""A save on its way, and what it holds until it is written or given up."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncckpt._saving.engine import Operation
    from asyncckpt._saving.save import Save
    from asyncckpt._saving.staging import Snapshot
    from asyncckpt._saving.targets import Target


class Place:
    """One of the places in flight: taken before a state is frozen, free when its buffer is, or when dropped.

    Attributes:
        thread: who takes the snapshot; None once it is in host memory and queued.
    """

    def __init__(self) -> None:
        self.thread: int | None = threading.get_ident()


@dataclass(slots=True, eq=False)
class Job:
    """A save on its way.

    Attributes:
        place: of the places in flight, as soon as it has one.
        snapshot: the state, as soon as it is frozen.
        operation: what writes it, as soon as it is submitted.
        thread: who saves.
        replaced: queued saves whose place it takes.
    """

    save: Save
    target: Target
    began: float
    place: Place | None = None
    snapshot: Snapshot | None = None
    operation: Operation | None = None
    thread: int = field(default_factory=threading.get_ident)
    replaced: list[Job] = field(default_factory=list)

    def is_taken_by_caller(self) -> bool:
        """Return whether the calling thread is still taking it: a signal handler broke into that."""
        return self.place is not None and self.place.thread == threading.get_ident()

    def is_copied_by_caller(self) -> bool:
        """Return whether the calling thread is the one that copies the state, and has not ended that."""
        copying = self.snapshot is not None and not self.snapshot.filled.ended
        return copying and threading.get_ident() == self.thread
