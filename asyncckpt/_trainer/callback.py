"""A ModelCheckpoint that saves in the background, and knows that its files are not there yet."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fsspec.core import split_protocol
from lightning_utilities.core.rank_zero import WarningCache, rank_zero_warn

from asyncckpt._saving.engine import wait_for_pending
from asyncckpt._trainer.ledger import Record
from asyncckpt._trainer.places import Place
from asyncckpt._trainer.settling import Settling
from asyncckpt._trainer.telling import AsOf
from asyncckpt.errors import AsyncCkptError, SaveError, add_note

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from asyncckpt._trainer.checkpoint_io import BackgroundIO

_warnings = WarningCache()


class BackgroundCheckpoint(Settling):
    """Lightning's ModelCheckpoint, except that its saves go on in the background while training does.

    Checkpoints of either restore into the other.

    Args:
        args, kwargs: what Lightning's ModelCheckpoint takes.
        save_best: keep a checkpoint under the name `CHECKPOINT_NAME_BEST` that always is the best: "link" for
            a relative symbolic link, True for a file of its own, which costs no bytes where the file system
            has hard links.
        log_cost: log what each save cost to the trainer's loggers: `asyncckpt/stall` and `asyncckpt/durable`
            in seconds, `asyncckpt/nbytes`.
    """

    CHECKPOINT_NAME_BEST = "best"

    trainer_class: ClassVar[type[Trainer]]
    io_class: ClassVar[type[BackgroundIO]]

    def __init__(
        self,
        *args: Any,
        save_best: bool | Literal["link"] | None = None,
        log_cost: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if save_best not in (None, True, False, "link"):
            raise ValueError(f'save_best must be None, True, False or "link", not {save_best!r}')
        self.save_best = save_best
        self.log_cost = log_cost
        self._forget()

    # Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve dirpath, and put an AsyncCheckpointIO before the trainer's own until the run is over.

        Raises:
            TypeError: the Trainer is of the other package.
            ValueError: `save_best` or `save_last` is "link" and dirpath is remote.
        """
        if not isinstance(trainer, self.trainer_class):
            raise TypeError(
                f"{type(self).__module__}.{type(self).__name__} works with the Trainer of"
                f" {_package(self.trainer_class)}, not with that of {_package(type(trainer))}; import both"
                " from one package"
            )
        super().setup(trainer, pl_module, stage)
        if self.save_best == "link" and not _is_local(self.dirpath):
            raise ValueError(
                "`ModelCheckpoint(save_best='link')` is only supported for local file paths, got"
                f" `dirpath={self.dirpath}`."
            )
        if stage == "fit":
            self._forget()
            self._io = self._install(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save if a step or time trigger says so."""
        with self._hook(trainer):
            super().on_train_batch_end(trainer, *args, **kwargs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the epoch trigger says so; at the end of the last epoch, wait as `on_train_end` does.

        The `on_train_end` of other callbacks, which is called before ours, finds the files there.
        """
        with self._hook(trainer):
            super().on_train_epoch_end(trainer, pl_module)
        if _is_last_epoch(trainer):
            self._complete(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the epoch trigger says so, or what was waiting for a metric."""
        with self._hook(trainer):
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait until everything is on disk, on every rank."""
        with self._hook(trainer):
            super().on_train_end(trainer, pl_module)
        self._complete(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if that was asked for, and finish what is pending; nothing of it hides the exception."""
        try:
            with self._hook(trainer):
                self._settled = True  # the other ranks may be anywhere: nothing can be agreed upon with them
                super().on_exception(trainer, pl_module, exception)
        except AsyncCkptError as failure:
            add_note(exception, failure)
        if self._io is not None:
            self._io.finish(exception)
        try:
            self._finish(trainer)
        except SaveError as failure:
            add_note(exception, failure)
        finally:
            self._tell(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the trainer."""
        super().teardown(trainer, pl_module, stage)
        try:
            self._finish(trainer)
        finally:
            self._tell(trainer)
            self._io = None

    # What Lightning's own hooks call

    def file_exists(self, filepath: Any, trainer: Trainer) -> bool:
        """Return whether a file exists, or will once what is pending is carried out; equal on all ranks."""
        exists = False
        if trainer.is_global_zero:
            exists = str(filepath) not in self._evictions and self._place(filepath).exists()
        agreed: bool = trainer.strategy.reduce_boolean_decision(exists, all=False)
        return agreed

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        wait_for_pending()
        self._fs.invalidate_cache()
        found = super()._find_last_checkpoints(trainer)
        if _is_local(self.dirpath or ""):
            return found
        return {f"{self.dirpath}/{path.rpartition('/')[2]}" for path in found}

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._settle(trainer)
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        self._refresh_best(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._settle(trainer)
        with self._saving("last", {self.last_model_path: None}):
            super()._save_last_checkpoint(trainer, monitor_candidates)

    def _save_none_monitor_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        with self._saving("top", {self.best_model_path: None}):
            super()._save_none_monitor_checkpoint(trainer, monitor_candidates)

    def _update_best_and_save(
        self, current: Tensor, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        with self._saving("top", dict(self.best_k_models)):
            super()._update_best_and_save(current, trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        record = self._new_record(filepath)
        try:
            trainer.save_checkpoint(filepath, self.save_weights_only)
        except SaveError:
            self._take_back(record)
            raise
        self._ledger.add(record)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        save = None if self._io is None else self._io.claim_save(filepath)
        if self._best[0] == filepath:
            self._best = ("", self._best[1])  # what it leads to is another one now
        if save is not None:
            record.outcome = save.committed
            self._untold.append((save, AsOf(self, trainer.global_step)))
        elif trainer.is_global_zero:
            self._warn_if_passed_by(trainer)
            AsOf(self, trainer.global_step).tell(trainer)

    def _link_checkpoint(  # type: ignore[override] # in Lightning it is static
        self, trainer: Trainer, filepath: str, linkpath: str
    ) -> None:
        self._refer(trainer, self._ledger.add(self._new_record(linkpath)), filepath, link=True)

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        if _is_local(previous):
            return super()._should_remove_checkpoint(trainer, previous, current)
        inside = previous.startswith(f"{str(self.dirpath).rstrip('/')}/")
        return inside and previous not in {current, str(trainer.ckpt_path)}

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:  # noqa: ARG002 - Lightning's
        # Links to it may have to be moved first: it goes at the end of the hook.
        self._evictions.append(filepath)

    # Files that are not there yet

    @contextmanager
    def _hook(self, trainer: Trainer) -> Iterator[None]:
        """Hold that no training goes on in a hook, and agree on what has failed at most once in it."""
        self._tell(trainer)
        self._settled = False
        try:
            yield
        finally:
            evictions, self._evictions = self._evictions, []
            for path in evictions:
                self._evict(trainer, path)
        self._raise()

    def _complete(self, trainer: Trainer) -> None:
        """Wait until everything is on disk, on every rank, and raise what has failed."""
        self._settle(trainer, wait=True)
        if self._failure is not None:  # the best may be another one again
            self._refresh_best(trainer, self._monitor_candidates(trainer))
            self._settle(trainer, wait=True)
        self._tell(trainer)
        self._raise()

    def _place(self, path: Any) -> Place:
        return Place(path) if self._io is None else self._io.place(path)

    def _refer(self, trainer: Trainer, record: Record, filepath: str, *, link: bool) -> None:
        """Let the path of a record lead to a file, which may be pending, or have its content."""
        target, source = self._place(record.path), self._place(filepath)
        if trainer.is_global_zero and target.path != source.path:
            refer = target.link if link else target.copy
            outcome = self._ledger.outcome_of(filepath)
            record.outcome = refer(source, () if outcome is None else (outcome,))
        trainer.strategy.barrier()

    def _refresh_best(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if not self.save_best or not self.best_model_path:
            return
        # What was saved in this run is there, or is known to have failed in a moment.
        if not self._ledger.knows(self.best_model_path) and not self.file_exists(
            self.best_model_path, trainer
        ):
            _warnings.warn(f"{self.best_model_path} is gone, so there is no link or copy of it.")
            return
        path = self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_BEST)
        former, self._best = self._best, (self.best_model_path, path)
        if former == self._best:
            return
        record = self._ledger.add(Record("best", path))
        self._refer(trainer, record, self.best_model_path, link=self.save_best == "link")
        if former[1] not in {"", path}:
            self._evictions.append(former[1])

    def _tell(self, trainer: Trainer) -> None:
        """Tell the loggers of what has been committed since the last time."""
        while self._untold and self._untold[0][0].committed.done():
            save, then = self._untold.popleft()
            if save.committed.failed():
                continue
            then.tell(trainer)
            if self.log_cost:
                then.log_cost(trainer, save.stats)

    def _install(self, trainer: Trainer) -> BackgroundIO | None:
        """Return the AsyncCheckpointIO of a trainer; if it has none, put one before its CheckpointIO."""
        current = trainer.strategy.checkpoint_io
        io: Any = current
        while io is not None and not isinstance(io, self.io_class):
            io = getattr(io, "checkpoint_io", None)
        if io is None:
            if type(current).__name__ == "XLACheckpointIO":
                rank_zero_warn(
                    "asyncckpt saves in the foreground on XLA devices: all ranks have to take part."
                )
                return None
            io = self.io_class(current)
            io.lend(trainer.strategy, current)
        return io  # type: ignore[no-any-return]

    def _warn_if_passed_by(self, trainer: Trainer) -> None:
        saving = next(c for c in type(trainer.strategy).__mro__ if "save_checkpoint" in vars(c))
        if self._io is not None and saving.__name__ != "Strategy":
            _warnings.warn(
                f"`{saving.__name__}` writes its checkpoints itself, so asyncckpt cannot save them in the"
                " background: training stands still until they are written."
            )


def _is_last_epoch(trainer: Trainer) -> bool:
    """Return whether training ends with the epoch that ends now.

    `fit_loop.done` would tell, but it logs that it does, and counts the epoch as completed.
    """
    loop: Any = trainer.fit_loop  # its type lacks some attributes
    limits = (
        (loop.epoch_loop.global_step, loop.max_steps),
        (loop.epoch_progress.current.processed, loop.max_epochs),
    )
    if any(limit is not None and 0 <= limit <= reached for reached, limit in limits):
        return True
    return trainer.should_stop and loop._can_stop_early


def _is_local(path: Any) -> bool:
    return split_protocol(str(path))[0] in {None, "file", "local"}


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


class WithLinkBest(BackgroundCheckpoint if TYPE_CHECKING else object):  # type: ignore[misc]
    """A ModelCheckpoint whose first argument is `save_best`, for which True means a link."""

    def __init__(self, save_best: bool | None = None, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001
        super().__init__(*args, save_best="link" if save_best else None, **kwargs)
