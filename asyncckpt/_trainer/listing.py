"""What a ModelCheckpoint lists as best and last, derived from the saves that have not failed."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt.errors import SaveError, SaveSkipped

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from asyncckpt._saving.save import Outcome
    from asyncckpt._trainer.checkpoint_io import BackgroundIO
    from asyncckpt.types import SaveStats

# The attributes of Lightning's callback that follow from what it has saved, beside `best_k_models`.
_LISTED = (
    "best_model_path", "best_model_score", "current_score", "kth_best_model_path", "kth_value",
    "last_model_path", "_last_checkpoint_saved", "_last_global_step_saved",
)  # fmt: skip


@dataclass(slots=True, eq=False)
class SavedFile:
    """A file that was saved, copied or linked, in the background or not.

    Attributes:
        kind: "top" for one of the k best (or the newest, where nothing is monitored), "last", "best" for
            the link to the best, "other" for what a subclass saves beside them.
        path: the file.
        step: the global step whose state it holds; None for a link.
        score: of one of the k best.
        last_model_path: what the callback's state in the file says.
        outcome: how it ended; None where another rank writes, or if it ended at once.
        failed: whether it is not there.
    """

    kind: str
    path: str
    step: int | None = None
    score: Any = None
    last_model_path: str = ""
    outcome: Outcome[Any] | None = None
    failed: bool = False


def listing_of(callback: ModelCheckpoint) -> dict[str, Any]:
    """Return the attributes of a callback that follow from what it has saved."""
    listed = {name: getattr(callback, name) for name in _LISTED}
    return listed | {"best_k_models": dict(callback.best_k_models)}


def derive(before: dict[str, Any], saves: Iterable[SavedFile], mode: str, save_top_k: int) -> dict[str, Any]:
    """Return what a callback lists after `saves`, as if those that failed had never been tried.

    Files that make room for a save are removed only if all that was pending then is committed, so whatever
    is listed here is there, or pending.

    Args:
        before: what it listed before them.
        saves: in the order in which they were made.
        mode: as of the callback.
        save_top_k: as of the callback.
    """
    listed = before | {"best_k_models": dict(before["best_k_models"])}
    scores = listed["best_k_models"]
    best, worst = (min, max) if mode == "min" else (max, min)
    for save in saves:
        if save.failed:
            continue
        if save.step is not None:
            listed |= {"_last_checkpoint_saved": save.path, "_last_global_step_saved": save.step}
        if save.kind == "last":
            listed["last_model_path"] = save.path
        elif save.kind == "top" and save.score is None:
            listed["best_model_path"] = save.path
        elif save.kind == "top":
            if len(scores) == save_top_k:
                del scores[worst(scores, key=scores.__getitem__)]
            scores[save.path] = listed["current_score"] = save.score
    if scores:
        listed["best_model_path"] = path = best(scores, key=scores.__getitem__)
        listed["best_model_score"] = scores[path]
        is_full = save_top_k in {-1, len(scores)}
        listed["kth_best_model_path"] = path = worst(scores, key=scores.__getitem__) if is_full else ""
        listed["kth_value"] = scores.get(path, torch.tensor(torch.inf if mode == "min" else -torch.inf))
    return listed


@dataclass(slots=True)
class Session:
    """What a callback keeps during one fit.

    Attributes:
        io: carries out what it saves.
        before: what it listed before `saves`.
        saves: those that not all ranks know the end of; the same on each.
        kind: of what is being saved.
        newest: what was saved last in this hook.
        best: the file that the link to the best leads to, and the path of that link.
        obsolete: what is to be removed at the end of this hook, or of a later one if something failed.
        removals: removals under way, on the rank that writes.
        unreported: saves that loggers do not know of, with their cost, step, and the callback as of each.
        agreed: whether the ranks have agreed in this hook on what has failed.
        failures, cause: what is to be raised at the end of this hook.
    """

    io: BackgroundIO = field(compare=False)
    before: dict[str, Any] = field(default_factory=dict)
    saves: list[SavedFile] = field(default_factory=list)
    kind: str = "other"
    newest: SavedFile | None = None
    best: tuple[str, str] = ("", "")
    obsolete: list[str] = field(default_factory=list)
    removals: dict[str, Outcome[None]] = field(default_factory=dict)
    unreported: deque[tuple[Outcome[Any], SaveStats | None, int, ModelCheckpoint]] = field(
        default_factory=deque
    )
    agreed: bool = False
    failures: list[str] = field(default_factory=list)
    cause: BaseException | None = None

    def pending(self, path: str | None = None) -> list[Outcome[Any]]:
        """Return the outcomes of `saves`, or of those to `path`."""
        return [s.outcome for s in self.saves if s.outcome is not None and path in {None, s.path}]

    def note(self, saved: SavedFile) -> SaveStats | None:
        """Keep what was saved or linked until all ranks know its end; returns what it cost, on this rank."""
        saved.outcome, stats = self.io.submitted.take(saved.path)
        self.saves.append(saved)
        if saved.path in self.obsolete:  # it is replaced instead
            self.obsolete.remove(saved.path)
        return stats

    def is_linked(self, last: str, path: str) -> bool:
        """Return whether the link to the last or the best leads to a file, and nothing pending moves it."""
        links = [link for link in {last, self.best[1]} - {"", path} if not self.pending(link)]
        return os.path.realpath(path) in map(os.path.realpath, links)

    def raise_failures(self) -> None:
        """Raise what has failed, once."""
        failures, cause = self.failures, self.cause
        self.failures, self.cause = [], None
        if failures:
            raise SaveError("; ".join(failures)) from cause

    def ended(self, *, wait: bool) -> tuple[list[str | None], list[str]]:
        """Return how each of the first saves ended, as far as is known, and which removals failed.

        None is success; an empty text is what was left undone because of another failure.
        """
        ends: list[str | None] = []
        for save in self.saves:
            if save.outcome is not None and not wait and not save.outcome.done():
                break
            ends.append(None if save.outcome is None else self._failure(save.path, save.outcome, "made"))
        failures = []
        for path in [path for path, removal in self.removals.items() if wait or removal.done()]:
            failure = self._failure(path, self.removals.pop(path), "removed")
            if failure:
                failures.append(failure)
            elif failure is not None:
                self.obsolete.append(path)
        return ends, failures

    def settle(self, ends: list[str | None], failures: list[str]) -> tuple[bool, list[SavedFile]]:
        """Note how the first saves ended; returns whether one of them failed, and these saves."""
        settled, self.saves = self.saves[: len(ends)], self.saves[len(ends) :]
        for saved, end in zip(settled, ends, strict=True):
            saved.failed |= end is not None
        self.failures += [*filter(None, ends), *failures]
        return any(saved.failed for saved in settled), settled

    def _failure(self, path: str, outcome: Outcome[Any], what: str) -> str | None:
        error = outcome.exception()
        if isinstance(error, SaveSkipped):
            return ""
        if error is None or (isinstance(error, FileNotFoundError) and what == "removed"):
            return None
        is_ours = isinstance(error, SaveError)
        self.cause = self.cause or (error.__cause__ if is_ours else None) or error
        return str(error) if is_ours else f"{path} could not be {what}: {str(error) or repr(error)}"


def is_last_epoch(trainer: Trainer) -> bool:
    """Return whether training ends with the epoch that ends now.

    `fit_loop.done` says so, too, but logs it, and counts the epoch as completed.
    """
    loop: Any = trainer.fit_loop  # its type lacks some attributes
    limits = (
        (loop.epoch_loop.global_step, loop.max_steps),
        (loop.epoch_progress.current.processed, loop.max_epochs),
    )
    if any(limit is not None and 0 <= limit <= reached for reached, limit in limits):
        return True
    return trainer.should_stop and loop._can_stop_early
