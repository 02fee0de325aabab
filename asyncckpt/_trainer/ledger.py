"""What a ModelCheckpoint has saved and does not yet know the outcome of, and how to take it back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from asyncckpt.errors import SaveError, SaveSkipped

if TYPE_CHECKING:
    from asyncckpt._saving.save import Outcome

# Path -> score, None where checkpoints have none.
Scores = dict[str, Any]


@dataclass(slots=True, eq=False)
class Record:
    """One file that was saved, linked or removed.

    Attributes:
        kind: "top" for one of the k best, "last", "best", "other", or "removal".
        path: the file.
        outcome: what tells how it ended; None on a rank that does not write, or if it ended at once.
        displaced: what stood in the place that it took: the worst of the k best, the former last. Of a
            removal: what it removes.
        before: `_last_checkpoint_saved`, `_last_global_step_saved` and `current_score` as they were.
        number: its place in the order.
    """

    kind: str
    path: str
    outcome: Outcome[Any] | None = None
    displaced: Scores = field(default_factory=dict)
    before: tuple[str, int, Any] = ("", 0, None)
    number: int = 0

    def inherit(self, failed: Record) -> None:
        """Displace what `failed` would have, which this one has displaced."""
        del self.displaced[failed.path]
        self.displaced.update(failed.displaced)


class Failure(NamedTuple):
    """How a record failed.

    Attributes:
        message: empty if it was left undone because of the failure of another.
        cause: what made it fail, on the rank where it did.
    """

    message: str
    cause: BaseException | None


class Ledger:
    """The records of one callback, in the order in which they are carried out; the same on every rank."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._count = 0
        self._succeeded: list[Record] = []  # of those that were closed last

    def add(self, record: Record) -> Record:
        """Note what was submitted last."""
        self._count += 1
        record.number = self._count
        self.records.append(record)
        return record

    def knows(self, path: str) -> bool:
        """Return whether it is still open how a save of `path` ends."""
        return any(r.path == path and r.kind != "removal" for r in self.records)

    def pending(self) -> list[Outcome[Any]]:
        """Return what tells how all that is not known to be made will end."""
        return [r.outcome for r in self.records if r.outcome is not None and r.kind != "removal"]

    def score_of(self, path: str) -> Any:
        """Return the score of what was displaced, None if it has none."""
        return next((r.displaced[path] for r in reversed(self.records) if path in r.displaced), None)

    def outcome_of(self, path: str) -> Outcome[Any] | None:
        """Return what tells how the last save of `path` ends, if it is not known yet."""
        return next(
            (r.outcome for r in reversed(self.records) if r.path == path and r.kind != "removal"), None
        )

    def ended(self, *, wait: bool) -> list[Failure | None]:
        """Return what each of the first records failed with, as far as they have ended, or of all."""
        ends: list[Failure | None] = []
        for record in self.records:
            if record.outcome is not None and not wait and not record.outcome.done():
                break
            error = None if record.outcome is None else record.outcome.exception()
            ends.append(None if error is None else _failure(record, error))
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


def _failure(record: Record, error: BaseException) -> Failure:
    if isinstance(error, SaveSkipped):
        return Failure("", None)
    if isinstance(error, SaveError):
        return Failure(str(error), error.__cause__ or error)
    what = "removed" if record.kind == "removal" else "made"
    return Failure(f"{record.path} could not be {what}: {str(error) or repr(error)}", error)
