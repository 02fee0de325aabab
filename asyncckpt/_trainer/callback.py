"""A ModelCheckpoint that saves in the background, and lists what is committed or pending."""

from __future__ import annotations

import copy
import posixpath
from contextlib import contextmanager
from datetime import timedelta  # noqa: TC003 - the signature has types
from pathlib import Path  # noqa: TC003 - the signature has types
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints
from weakref import proxy

from lightning_utilities.core.rank_zero import WarningCache, rank_zero_warn

from asyncckpt._saving import operations
from asyncckpt._saving.engine import get_engine, wait_for_pending
from asyncckpt._trainer.checkpoint_io import BackgroundIO, background_io
from asyncckpt._trainer.listing import SavedFile, Session, derive, is_last_epoch, listing_of
from asyncckpt._trainer.locations import is_local, locate
from asyncckpt._trainer.own_code import is_saved_by_users, may_change_parameters, refuse_other_package
from asyncckpt._trainer.references import refer
from asyncckpt._trainer.strategies import warn_if_passed_by
from asyncckpt.errors import AsyncCkptError, SaveError, add_note

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint as Base
    from torch import Tensor

    from asyncckpt._trainer.hook_fence import HookFence
else:
    Base = object

_warnings = WarningCache()


class BackgroundCheckpoint(Base):
    """Lightning's ModelCheckpoint, except that its saves go on in the background while training does.

    Checkpoints of either restore into the other. The arguments are those of Lightning's, and:

    Args:
        save_best: keep a checkpoint under the name `CHECKPOINT_NAME_BEST` that always is the best: "link" for
            a relative symbolic link, True for a file of its own, which costs no bytes where the file system
            has hard links.
        log_cost: log what each save cost to the trainer's loggers: `asyncckpt/stall` and `asyncckpt/durable`
            in seconds, `asyncckpt/nbytes`; of an overlapped save also `asyncckpt/fence`.
        overlap: let the saves of the trainer be copied during the next batch, until the optimizer's step; see
            `AsyncCheckpointIO`, whose options hold if the trainer has one.
    """

    CHECKPOINT_NAME_BEST = "best"

    trainer_class: ClassVar[type[Trainer]]
    io_class: ClassVar[type[BackgroundIO]]
    fence_class: ClassVar[type[HookFence]]

    def __init__(  # noqa: PLR0913, PLR0917 - Lightning's arguments, so that completion shows them
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,  # noqa: FBT001, FBT002 - as in Lightning
        save_last: bool | Literal["link"] | None = None,  # noqa: FBT001 - as in Lightning
        save_top_k: int = 1,
        save_on_exception: bool = False,  # noqa: FBT001, FBT002 - as in Lightning
        save_weights_only: bool = False,  # noqa: FBT001, FBT002 - as in Lightning
        mode: str = "min",
        auto_insert_metric_name: bool = True,  # noqa: FBT001, FBT002 - as in Lightning
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,  # noqa: FBT001 - as in Lightning
        enable_version_counter: bool = True,  # noqa: FBT001, FBT002 - as in Lightning
        *,
        save_best: bool | Literal["link"] | None = None,
        log_cost: bool = False,
        overlap: bool = False,
    ) -> None:
        super().__init__(
            dirpath, filename, monitor, verbose, save_last, save_top_k, save_on_exception, save_weights_only,
            mode, auto_insert_metric_name, every_n_train_steps, train_time_interval, every_n_epochs,
            save_on_train_epoch_end, enable_version_counter,
        )  # fmt: skip
        if save_best not in (None, True, False, "link"):
            raise ValueError(f'save_best must be None, True, False or "link", not {save_best!r}')
        self.save_best = save_best
        self.log_cost = log_cost
        self.overlap = overlap
        self._session = self._new_session()

    # What a wrong argument's TypeError names.
    __init__.__qualname__ = "ModelCheckpoint.__init__"

    def __getstate__(self) -> dict[str, Any]:
        # A process that gets it has nothing pending: that stays with this one.
        return vars(self) | {"_session": self._new_session()}

    def _new_session(self) -> Session:
        io = self.io_class()
        if self.overlap:
            io.overlap()
        return Session(io)

    # Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve dirpath, and put an AsyncCheckpointIO before the trainer's own until the fit is over.

        Raises:
            TypeError: the Trainer is of the other package.
            ValueError: `save_best` or `save_last` is "link" and dirpath is remote.
        """
        refuse_other_package(self, trainer)
        super().setup(trainer, pl_module, stage)
        if self.save_best == "link" and not is_local(self.dirpath or ""):
            raise ValueError(
                "`ModelCheckpoint(save_best='link')` is only supported for local file paths, got"
                f" `dirpath={self.dirpath}`."
            )
        current: Any = trainer.strategy.checkpoint_io
        io = background_io(current) or self.io_class(current)
        if type(current).__name__ == "XLACheckpointIO":
            rank_zero_warn("asyncckpt saves in the foreground on XLA devices: all ranks have to take part.")
        elif stage == "fit":
            io.attach(trainer)
        if self.overlap:
            io.overlap()
        if io.overlaps and stage == "fit":
            self.fence_class.put_first(trainer, io)
        io.waits = True  # until the first hook of the loop
        self._session = Session(io)

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
        if is_last_epoch(trainer):
            self._complete(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the epoch trigger says so, or what was waiting for a metric."""
        with self._hook(trainer):
            super().on_validation_end(trainer, pl_module)
        if may_change_parameters(pl_module, "on_validation_end"):  # its turn comes after ours
            self.fence()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait until everything is on disk, on every rank."""
        with self._hook(trainer):
            super().on_train_end(trainer, pl_module)
        self._complete(trainer)
        self._session.io.waits = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if that was asked for, and finish what is pending; nothing of it hides the exception."""
        try:
            with self._hook(trainer):
                self._agree(trainer, alone=True)  # the other ranks may be anywhere
                super().on_exception(trainer, pl_module, exception)
        except AsyncCkptError as failure:
            add_note(exception, failure)
        self.fence_class.remove(trainer)  # there may be no teardown
        self._session.io.finish(exception)
        self._session.io.waits = True
        try:
            self._complete(trainer, alone=True)
        except SaveError as failure:
            add_note(exception, failure)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the trainer."""
        super().teardown(trainer, pl_module, stage)
        self.fence_class.remove(trainer)
        try:
            self._complete(trainer, alone=True)
        finally:
            self._session = self._new_session()

    def fence(self) -> None:
        """Wait until parameters and optimizer state may be changed by hand, as `AsyncCheckpointIO.fence`."""
        self._session.io.fence()

    # What Lightning's own hooks call

    def file_exists(self, filepath: Any, trainer: Trainer) -> bool:
        """Return whether a file exists, or will once what is pending is carried out; equal on all ranks."""
        is_obsolete = str(filepath) in self._session.obsolete
        pending = False if is_obsolete else get_engine().pending(posixpath.join(*locate(filepath)))
        self._fs.invalidate_cache()
        if pending is None or not trainer.is_global_zero:
            return super().file_exists(filepath, trainer)
        return bool(trainer.strategy.reduce_boolean_decision(pending, all=False))

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        wait_for_pending()
        self._fs.invalidate_cache()
        found = super()._find_last_checkpoints(trainer)
        names = {f"{self.dirpath}/{path.rpartition('/')[2]}" for path in found}
        return found if is_local(self.dirpath or "") else names  # Lightning normalizes URLs as paths

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._agree(trainer)
        self._session.kind = "top"
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        self._session.kind = "other"
        self._refresh_best(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._agree(trainer)
        session, count = self._session, len(self._session.saves)
        session.kind = "last"
        session.io.causes = session.pending(self._last_checkpoint_saved)[-1:]
        super()._save_last_checkpoint(trainer, monitor_candidates)
        session.kind, session.io.causes = "other", ()
        if self.save_last and len(session.saves) == count:
            session.note(SavedFile("last", self.last_model_path))  # it is a link

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        session, score = self._session, self.best_k_models.get(filepath)
        if session.kind == "other" and not session.saves:  # a subclass saves outside of our hooks
            session.before = listing_of(self)
        listed = {"top": self.best_k_models or {self.best_model_path}, "last": {self.last_model_path}}
        kind = session.kind if filepath in listed.get(session.kind, ()) else "other"
        saved = SavedFile(kind, filepath, trainer.global_step, score, self.last_model_path)
        try:
            if session.newest is not None and self._is_equal(trainer, saved, session.newest):
                self._copy_checkpoint(trainer, session.newest.path, filepath)
            else:
                trainer.save_checkpoint(filepath, self.save_weights_only)
        except SaveError:
            saved.failed = True
            session.saves.append(saved)
            self._list_anew()
            raise
        if getattr(trainer.lightning_module, "saved_models", None):
            self.fence()  # with manual optimization they are in the module only while they are saved
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        stats = session.note(saved)
        session.newest = saved
        if session.best[0] == filepath:
            session.best = ("", session.best[1])  # what it leads to is another one now
        if trainer.is_global_zero and saved.outcome is not None:
            now = copy.copy(self)
            now.best_k_models = dict(self.best_k_models)
            session.unreported.append((saved.outcome, stats, trainer.global_step, now))
        elif trainer.is_global_zero:
            warn_if_passed_by(trainer.strategy)
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero and locate(filepath) != locate(linkpath):
            refer(operations.link, filepath, linkpath, background_io(trainer.strategy.checkpoint_io))
        trainer.strategy.barrier()

    def _copy_checkpoint(self, trainer: Trainer, filepath: str, target: str) -> None:
        if trainer.is_global_zero:
            refer(operations.copy, filepath, target, self._session.io)
        trainer.strategy.barrier()

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        if is_local(previous):
            return super()._should_remove_checkpoint(trainer, previous, current)
        inside = previous.startswith(f"{str(self.dirpath).rstrip('/')}/")
        return inside and previous not in {current, str(trainer.ckpt_path)}

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:  # noqa: ARG002 - Lightning's
        # Links to it may have to be moved first: it goes at the end of the hook.
        self._session.obsolete.append(filepath)

    # Files that are not there yet

    @contextmanager
    def _hook(self, trainer: Trainer) -> Iterator[None]:
        session = self._session
        self._notify_loggers(trainer)
        session.agreed, session.kind, session.newest = False, "other", None
        session.io.waits = trainer.state.fn != "fit"
        session.io.in_hook = True
        try:
            yield
        finally:
            session.io.in_hook = False
            self._remove_obsolete(trainer)
        self._session.raise_failures()

    def _complete(self, trainer: Trainer, *, alone: bool = False) -> None:
        """Wait until everything is on disk, on every rank unless this one is alone; raise what has failed."""
        self._agree(trainer, wait=True, alone=alone)
        if self._session.failures and not alone:  # the best may be another one again
            self._refresh_best(trainer, self._monitor_candidates(trainer))
        self._remove_obsolete(trainer)
        self._agree(trainer, wait=True, alone=alone)
        self._notify_loggers(trainer)
        self._session.raise_failures()

    def _agree(self, trainer: Trainer, *, wait: bool = False, alone: bool = False) -> None:
        """Agree with the other ranks on how saves ended, once in a hook, and list what has not failed."""
        session = self._session
        if not session.saves:
            session.before = listing_of(self)
        if session.agreed and not wait:
            return
        session.agreed = True
        ended = session.ended(wait=wait and not get_engine().given_up)
        if background_io(trainer.strategy.checkpoint_io) is not None and not alone:
            ended = trainer.strategy.broadcast(ended)
        has_lost, settled = session.settle(*ended)
        session.before = derive(session.before, settled, self.mode, self.save_top_k)
        if has_lost:
            self._list_anew()
        # What these made room for has failed.
        listed = {*self.best_k_models, self.best_model_path, self.last_model_path}
        session.obsolete = [path for path in session.obsolete if path not in listed]

    def _list_anew(self) -> None:
        """List what was saved and has not failed."""
        session = self._session
        vars(self).update(derive(session.before, session.saves, self.mode, self.save_top_k))
        session.best = ("", session.best[1])

    def _is_equal(self, trainer: Any, saved: SavedFile, newest: SavedFile) -> bool:
        """Return whether a last checkpoint would have the bytes of what was saved just before it.

        It would not, if a user's code takes part: a subclass, a patched trainer, an `on_save_checkpoint`.
        """
        io = trainer.strategy.checkpoint_io
        return (
            (saved.kind == "last" and saved.path != newest.path)
            and (io is self._session.io and io.writes_itself)
            and (saved.step, saved.last_model_path) == (newest.step, newest.last_model_path)
            and not is_saved_by_users(trainer, self)
        )

    def _refresh_best(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Let the link to the best lead to what is the best now."""
        session, best = self._session, self.best_model_path
        if not self.save_best or not best:
            return
        if all(saved.path != best for saved in session.saves) and not self.file_exists(best, trainer):
            _warnings.warn(f"{best} is gone, so there is no link or copy of it.")
            return
        path = self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_BEST)
        former, session.best = session.best, (best, path)
        if former == session.best:
            return
        make = self._link_checkpoint if self.save_best == "link" else self._copy_checkpoint
        session.io.causes = session.pending(best)[-1:]
        make(trainer, best, path)
        session.io.causes = ()
        session.note(SavedFile("best", path))
        session.obsolete += {former[1]} - {"", path}

    def _remove_obsolete(self, trainer: Trainer) -> None:
        """Remove files once all that is pending is committed, which includes what they make room for."""
        session = self._session
        linked = [path for path in session.obsolete if session.is_linked(self.last_model_path, path)]
        obsolete, session.obsolete = session.obsolete, linked
        for path in (path for path in obsolete if path not in linked):
            session.io.causes = session.pending()
            super()._remove_checkpoint(trainer, path)
            removal, _ = session.io.submitted.take(path)
            if removal is not None:
                session.removals[path] = removal
        session.io.causes = ()

    def _notify_loggers(self, trainer: Trainer) -> None:
        """Notify the loggers of the checkpoints committed since the last time."""
        unreported = self._session.unreported
        while unreported and unreported[0][0].done():
            outcome, stats, step, callback = unreported.popleft()
            for logger in [] if outcome.failed() else trainer.loggers:
                logger.after_save_checkpoint(callback)
                if self.log_cost and stats is not None:
                    cost = {"stall": stats.stall, "durable": stats.durable, "nbytes": stats.nbytes}
                    cost |= {"fence": stats.fence} if stats.overlapped else {}
                    logger.log_metrics({f"asyncckpt/{name}": n for name, n in cost.items()}, step)


# Types instead of their names, for command line parsers that read the signature.
BackgroundCheckpoint.__init__.__annotations__ = get_type_hints(BackgroundCheckpoint.__init__)


class WithLinkBest(BackgroundCheckpoint if TYPE_CHECKING else object):  # type: ignore[misc]
    """A ModelCheckpoint whose first argument is `save_best`, for which True means a link."""

    def __init__(self, save_best: bool | None = None, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001
        super().__init__(*args, save_best="link" if save_best else None, **kwargs)
