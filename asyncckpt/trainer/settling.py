"""What a ModelCheckpoint that saves in the background does about saves that fail: it takes them back."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt.engine import get_engine
from asyncckpt.errors import SaveError
from asyncckpt.trainer.ledger import Failure, Ledger, Record, Scores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint as Base

    from asyncckpt.save import Save
    from asyncckpt.trainer.checkpoint_io import BackgroundIO
else:
    Base = object


class Settling(Base):
    """Keeps a ledger of what was saved, the same on every rank, and settles it once its end is known."""

    def _forget(self) -> None:
        self._io: BackgroundIO | None = None
        self._ledger = Ledger()
        self._untold: deque[tuple[Save, int]] = deque()
        self._settled = False
        self._kind, self._before = "other", Scores()  # of what is being saved
        self._evictions: list[str] = []
        self._best = ("", "")  # which checkpoint the best one is, and its name

    def __getstate__(self) -> dict[str, Any]:
        # A process that gets it has nothing pending: that stays with this one.
        gone = {"_io", "_ledger", "_untold", "_settled", "_kind", "_before", "_evictions", "_best"}
        return {name: value for name, value in self.__dict__.items() if name not in gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @contextmanager
    def _saving(self, kind: str, before: Scores) -> Iterator[None]:
        """Tell what is saved in this context, and what stood in its place."""
        self._kind, self._before = kind, before
        try:
            yield
        finally:
            self._kind, self._before = "other", {}

    def _new_record(self, path: str) -> Record:
        kept = set(self.best_k_models) - {path, ""}
        displaced = {p: score for p, score in self._before.items() if p and p not in kept}
        before = (self._last_checkpoint_saved, self._last_global_step_saved)
        return Record(self._kind, path, displaced=displaced, before=before)

    def _evict(self, trainer: Trainer, filepath: str, because: Sequence[Record]) -> None:
        """Remove a file once what it makes room for is there, and every link that is to be moved."""
        if self._io is None:
            super()._remove_checkpoint(trainer, filepath)
            return
        with self._io.caused_by([record.outcome for record in because if record.outcome is not None]):
            super()._remove_checkpoint(trainer, filepath)
        outcome = self._io.claim_removal(filepath) if trainer.is_global_zero else None
        self._ledger.add(Record("removal", filepath, outcome))

    def _settle(self, trainer: Trainer, *, wait: bool = False) -> None:
        """Agree with the other ranks on what has failed, take it back, and raise it, once."""
        if (self._settled and not wait) or not self._ledger.records:
            return
        self._settled = True
        ends = self._ledger.ended(wait=wait) if trainer.is_global_zero else []
        agreed = trainer.strategy.broadcast([None if end is None else end.message for end in ends])
        self._close(trainer, agreed, ends)

    def _finish(self, trainer: Trainer) -> None:
        """Wait for what is pending, as far as this rank knows of it, unless it was given up."""
        ends = self._ledger.ended(wait=not get_engine().given_up)
        self._close(trainer, [None if end is None else end.message for end in ends], ends)

    def _close(
        self, trainer: Trainer, messages: Sequence[str | None], ends: Sequence[Failure | None]
    ) -> None:
        # Backwards, so that what a save replaced is back before that is taken back in its turn.
        for record in reversed(self._ledger.close([message is not None for message in messages])):
            self._take_back(trainer, record)
        if reasons := [message for message in messages if message]:
            cause = next((end.cause for end in ends if end is not None and end.cause is not None), None)
            raise SaveError("; ".join(reasons)) from cause

    def _take_back(self, trainer: Trainer, record: Record) -> None:
        """Let everything be as if this had not been saved: the file is not there, and what it was for is."""
        if self._last_checkpoint_saved == record.path and record.kind != "removal":
            self._last_checkpoint_saved, self._last_global_step_saved = record.before
        heir = self._ledger.heir(record)
        if heir is not None:
            for path in heir.inherit(record):
                self._evict(trainer, path, [heir])
        elif record.kind == "last" and self.last_model_path == record.path:
            self.last_model_path = next(iter(record.displaced), "")
        elif record.kind == "top" and self.monitor is None and self.best_model_path == record.path:
            self.best_model_path = next(iter(record.displaced), "")
        elif record.kind == "top" and self.monitor is not None:
            self.best_k_models.pop(record.path, None)
            self.best_k_models.update(record.displaced)
            self._rank()
        self._best = ("", self._best[1])

    def _rank(self) -> None:
        """Tell the best and the worst of the k best anew."""
        scores = self.best_k_models
        best, worst = (min, max) if self.mode == "min" else (max, min)
        self.best_model_path = best(scores, key=scores.__getitem__, default="")
        self.best_model_score = scores.get(self.best_model_path)
        full = len(scores) == self.save_top_k
        self.kth_best_model_path = worst(scores, key=scores.__getitem__) if full else ""
        infinity = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self.kth_value = scores.get(self.kth_best_model_path, infinity)
