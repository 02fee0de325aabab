"""What a ModelCheckpoint that saves in the background does about saves that fail: it takes them back."""

from __future__ import annotations

import os
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._saving.engine import get_engine
from asyncckpt._trainer.ledger import Failure, Ledger, Record, Scores
from asyncckpt.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint as Base

    from asyncckpt._saving.save import Save
    from asyncckpt._trainer.checkpoint_io import BackgroundIO
    from asyncckpt._trainer.telling import AsOf
else:
    Base = object


_TRANSIENT = frozenset(
    {
        "_io",
        "_ledger",
        "_untold",
        "_failure",
        "_lost",
        "_settled",
        "_kind",
        "_before",
        "_score",
        "_evictions",
        "_best",
    }
)
_LINKS = frozenset({"last", "best"})


class Settling(Base):
    """Keeps a ledger of what was saved, the same on every rank, and settles it once its end is known."""

    def _forget(self) -> None:
        self._io: BackgroundIO | None = None
        self._ledger = Ledger()
        self._untold: deque[tuple[Save, AsOf]] = deque()
        self._failure: SaveError | None = None
        self._lost: set[str] = set()  # what could not be saved
        self._settled = False
        self._kind, self._before = "other", Scores()  # of what is being saved
        self._score: Any = None  # what was `current_score` before
        self._evictions: list[str] = []
        self._best = ("", "")  # which checkpoint the best one is, and its name

    def __getstate__(self) -> dict[str, Any]:
        # A process that gets it has nothing pending: that stays with this one.
        return {name: value for name, value in self.__dict__.items() if name not in _TRANSIENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @contextmanager
    def _saving(self, kind: str, before: Scores) -> Iterator[None]:
        """Tell what is saved in this context, and what stood in its place."""
        self._kind, self._before, self._score = kind, before, self.current_score
        try:
            yield
        finally:
            self._kind, self._before, self._score = "other", {}, self.current_score

    def _new_record(self, path: str) -> Record:
        self._lost.discard(path)
        if path in self._evictions:  # it is replaced instead
            self._evictions.remove(path)
        kept = set(self.best_k_models) - {path, ""}
        displaced = {p: score for p, score in self._before.items() if p and p not in kept}
        before = (self._last_checkpoint_saved, self._last_global_step_saved, self._score)
        return Record(self._kind, path, displaced=displaced, before=before)

    def _evict(self, trainer: Trainer, filepath: str, score: Any = None) -> None:
        """Remove a file once all is made that it makes room for, or that leads to it until then."""
        score = self._ledger.score_of(filepath) if score is None else score
        record = Record("removal", filepath, displaced={filepath: score})
        if self._io is None:
            super()._remove_checkpoint(trainer, filepath)
        else:
            with self._io.caused_by(self._ledger.pending()):
                super()._remove_checkpoint(trainer, filepath)
            record.outcome = self._io.claim_removal(filepath) if trainer.is_global_zero else None
        self._ledger.add(record)

    def _settle(self, trainer: Trainer, *, wait: bool = False) -> None:
        """Agree with the other ranks on what has failed, and take it back; it is raised behind the hook."""
        if (self._settled and not wait) or not self._ledger.records:
            return
        self._settled = True
        ends = self._ledger.ended(wait=wait) if trainer.is_global_zero else []
        agreed = trainer.strategy.broadcast([None if end is None else end.message for end in ends])
        try:
            self._close(trainer, agreed, ends)
        except SaveError as failure:
            before, self._failure = self._failure, failure
            if before is not None:
                self._failure = SaveError(f"{before}; {failure}")
                self._failure.__cause__ = before.__cause__

    def _raise(self) -> None:
        """Raise what has failed, once; what was to be saved meanwhile has been taken."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _finish(self, trainer: Trainer) -> None:
        """Wait for what is pending, as far as this rank knows of it, unless it was given up."""
        ends = self._ledger.ended(wait=not get_engine().given_up)
        self._close(trainer, [None if end is None else end.message for end in ends], ends)

    def _close(
        self, trainer: Trainer, messages: Sequence[str | None], ends: Sequence[Failure | None]
    ) -> None:
        records = list(self._ledger.records)
        failed = self._ledger.close([message is not None for message in messages])
        # Backwards, so that what a save replaced is back before that is taken back in its turn.
        for record in reversed(failed):
            self._take_back(record)
        self._lost |= {record.path for record in failed if record.kind != "removal"}
        links = {self.last_model_path, self._best[1], *(r.path for r in failed if r.kind in _LINKS)}
        undone = {id(r) for r, message in zip(records, messages, strict=False) if message == ""}
        for record in failed:
            if record.kind == "removal" and id(record) in undone:
                self._evict_again(trainer, record, links)
        if reasons := [message for message in messages if message]:
            cause = next((end.cause for end in ends if end is not None and end.cause is not None), None)
            raise SaveError("; ".join(reasons)) from cause

    def _take_back(self, record: Record) -> None:
        """Let everything be as if this had not been saved: the file is not there, and what it was for is."""
        if record.kind == "removal":
            return
        if self._last_checkpoint_saved == record.path:
            self._last_checkpoint_saved, self._last_global_step_saved, _ = record.before
        heir = self._ledger.heir(record)
        if heir is not None:
            heir.inherit(record)
        elif record.kind == "last" and self.last_model_path == record.path:
            self.last_model_path = next(iter(record.displaced), "")
        elif record.kind == "top" and self.monitor is None and self.best_model_path == record.path:
            self.best_model_path = next(iter(record.displaced), "")
        elif record.kind == "top" and self.monitor is not None:
            if self.best_k_models.pop(record.path, None) is self.current_score:
                self.current_score = record.before[2]
            self.best_k_models.update(record.displaced)
            self._rank()
        self._best = ("", self._best[1])

    def _evict_again(self, trainer: Trainer, removal: Record, links: set[str]) -> None:
        """Remove what was left, unless what has been taken back makes it one of those that are to stay."""
        path, score = removal.path, removal.displaced[removal.path]
        if path in {*self.best_k_models, self.best_model_path, self.last_model_path, *self._lost}:
            return
        if score is not None and len(self.best_k_models) < self.save_top_k:
            self.best_k_models[path] = score
            self._rank()
        elif trainer.is_global_zero and any(
            _leads_to(link, path) for link in links if not self._ledger.knows(link)
        ):
            self._ledger.add(Record("removal", path))  # it stays; the ledgers of all ranks keep step
        else:
            self._evict(trainer, path, score)

    def _rank(self) -> None:
        """Tell the best and the worst of the k best anew."""
        scores = self.best_k_models
        best, worst = (min, max) if self.mode == "min" else (max, min)
        self.best_model_path = best(scores, key=scores.__getitem__, default="")
        self.best_model_score = scores.get(self.best_model_path)
        full = bool(scores) and self.save_top_k in {-1, len(scores)}
        self.kth_best_model_path = worst(scores, key=scores.__getitem__) if full else ""
        infinity = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self.kth_value = scores.get(self.kth_best_model_path, infinity)


def _leads_to(link: str, path: str) -> bool:
    return link not in {"", path} and os.path.realpath(link) == os.path.realpath(path)
