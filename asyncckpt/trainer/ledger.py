"""What a ModelCheckpoint has saved and does not yet know the outcome of, and how to take it back."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asyncckpt.errors import SaveError

if TYPE_CHECKING:
    from asyncckpt.operations import Cause

# Path -> score, None where checkpoints have none.
Scores = dict[str, Any]


@dataclass(slots=True, eq=False)
class Record:
    """One file that was saved, linked or removed.

    Attributes:
        kind: "top" for one of the k best, "last", "best", "other", or "removal".
        path: the file.
        outcome: what tells how it ended; None on a rank that does not write, or if it ended at once.
        follows: the save that a link or copy is of: where that has failed, nothing was made.
        displaced: what stood in the place that it took: the worst of the k best, the former last.
        evicted: of those, and of theirs, the files that are removed once this one is there.
        before: `_last_checkpoint_saved` and `_last_global_step_saved` as they were.
        number: its place in the order.
    """

    kind: str
    path: str
    outcome: Cause = None
    follows: Cause = None
    displaced: Scores = field(default_factory=dict)
    evicted: list[str] = field(default_factory=list)
    before: tuple[str, int] = ("", 0)
    number: int = 0

    def inherit(self, failed: Record) -> list[str]:
        """Displace what `failed` would have, which this one has displaced; returns what to evict for that."""
        del self.displaced[failed.path]
        self.displaced.update(failed.displaced)
        self.evicted += failed.evicted
        return failed.evicted


class Ledger:
    """The records of one callback, in the order in which they are carried out; the same on every rank."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._numbers = itertools.count(1)
        self._succeeded: list[Record] = []  # of those that were closed last

    def add(self, record: Record) -> Record:
        """Note what was submitted last."""
        record.number = next(self._numbers)
        self.records.append(record)
        return record

    def outcome_of(self, path: str) -> Cause:
        """Return what tells how the last save of `path` ends, if it is not known yet."""
        return next(
            (r.outcome for r in reversed(self.records) if r.path == path and r.kind != "removal"), None
        )

    def ended(self, *, wait: bool) -> list[BaseException | None]:
        """Return what each of the first records failed with, as far as they have ended, or of all.

        One that was left undone, since what it follows has failed, has an exception without a message.
        """
        ends: list[BaseException | None] = []
        for record in self.records:
            if record.outcome is not None and not wait and not record.outcome.done():
                break
            end = None if record.outcome is None else record.outcome.exception()
            ends.append(SaveError() if record.follows is not None and record.follows.failed() else end)
        return ends

    def close(self, failed: list[bool]) -> list[Record]:
        """Strike off the first records, and return those of them that failed, in order."""
        count = len(failed)
        closed, self.records = self.records[:count], self.records[count:]
        lost = [record for record, bad in zip(closed, failed, strict=True) if bad]
        self._succeeded = [record for record in closed if record not in lost]
        for record in self.records:
            for earlier in reversed(lost):
                if record.before[0] == earlier.path:
                    record.before = earlier.before
        return lost

    def heir(self, record: Record) -> Record | None:
        """Return the later record that has displaced `record`, if one has."""
        later = (r for r in (*self._succeeded, *self.records) if r.number > record.number)
        return next((r for r in later if r.kind == record.kind and record.path in r.displaced), None)
