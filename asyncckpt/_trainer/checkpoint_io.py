"""A CheckpointIO whose saves, removals and links are carried out in the background, in order."""

from __future__ import annotations

import logging
import sys
import threading
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from asyncckpt._saving import operations
from asyncckpt._saving.engine import get_engine, wait_for_pending
from asyncckpt._saving.saver import Saver
from asyncckpt._trainer.places import Place, StateTarget
from asyncckpt._trainer.stack import is_interrupted, is_preemption, is_requeued, must_be_complete
from asyncckpt.errors import AsyncCkptError, BusyError, SaveError, add_note
from asyncckpt.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO as Base
    from typing_extensions import Self

    from asyncckpt._saving.operations import Causes
    from asyncckpt._saving.save import Outcome, Save
    from asyncckpt.stores.base import Store
else:
    Base = object

logger = logging.getLogger("asyncckpt")


class BackgroundIO(Base):
    """Makes the saves of `Trainer(plugins=[…])` and `Fabric(plugins=[…])` asynchronous.

    A Trainer waits for its saves by itself. Fabric does not: use this as a context manager, or call `wait`;
    what is still pending when the program ends is finished then, unless a signal ends it.

    Args:
        checkpoint_io: whose files they are. Lightning's own `TorchCheckpointIO`, which is the default, is
            replaced by a writer that makes the same files; any other is given the state in host memory, on a
            background thread, and must be done with it when it returns.
        max_in_flight: snapshots held in host memory at once; a save that finds as many waits for the oldest.
        preemption_timeout: seconds that a job which is told to go (SIGTERM, or SLURM's requeue signal) waits
            for pending saves; what has not begun by then is given up. None waits until whoever sent the
            signal loses patience.
    """

    torch_io: ClassVar[type[CheckpointIO]]
    stock_async: ClassVar[type[Base]]

    def __init__(
        self,
        checkpoint_io: CheckpointIO | None = None,
        *,
        max_in_flight: int = 2,
        preemption_timeout: float | None = None,
    ) -> None:
        if isinstance(checkpoint_io, self.stock_async):
            checkpoint_io = checkpoint_io.checkpoint_io  # two of a kind: ours takes its place
        super().__init__(checkpoint_io)
        self._max_in_flight = max_in_flight
        self._preemption_timeout = preemption_timeout
        self._lender: tuple[Any, CheckpointIO] | None = None
        self._forget()

    def _forget(self) -> None:
        # Lightning's checkpoints hold objects of its own, and it loads them with a default of its own.
        self._saver = Saver(self._max_in_flight, warns=False)
        self._saves: dict[str, Save] = {}
        self._changes: dict[str, Outcome[None]] = {}
        self._causes: Causes = ()
        self._thread: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A process that gets it has nothing pending: that stays with this one.
        gone = {"_saver", "_lender", "_saves", "_changes", "_causes", "_thread"}
        return {name: value for name, value in self.__dict__.items() if name not in gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lender = None
        self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.finish(error)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Take a snapshot of `checkpoint` and have it written to `path`; returns when the state may change.

        What a Trainer saves outside of its running loop is complete when this returns.

        Raises:
            SaveError: the state cannot be saved, or an earlier save failed and nobody has been told. Nothing
                was taken.
            TypeError: `storage_options` is given, and the writer takes none.
        """
        began = time.perf_counter()
        if self._thread == threading.get_ident():
            # A signal handler has come in between: the save it broke into holds the locks.
            self._base().save_checkpoint(checkpoint, path, storage_options)
            return
        with self._entered():
            self._raise_changes()
            place = self.place(path)
            step = checkpoint.get("global_step")
            step = step if isinstance(step, int) else None
            if not self._writes_itself():
                save_state = partial(self._base().save_checkpoint, path=path, storage_options=storage_options)
                target: Any = StateTarget(place.path, save_state)
            elif storage_options is not None:
                raise TypeError(
                    f"`storage_options` is not supported by {type(self).__name__}; wrap a CheckpointIO of"
                    " your own that knows what to do with them"
                )
            else:
                target = place.file_target(step)
            save = self._saver.save(checkpoint, target, step, began)
            self._saves = {p: s for p, s in self._saves.items() if not s.committed.done()} | {
                place.path: save
            }
        if must_be_complete():
            self._complete(save)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = None,
        weights_only: bool | None = None,  # noqa: FBT001 - as in Lightning
    ) -> dict[str, Any]:
        """Wait for pending saves, and load a checkpoint; every byte of a file of ours is checked.

        Tensors stay in host memory unless `map_location` says otherwise.

        Raises:
            FileNotFoundError: there is no such file.
            CorruptCheckpointError: names the damaged record.
        """
        wait_for_pending()
        place = self.place(path)
        where = {} if map_location is None else {"map_location": map_location}
        if self._writes_itself() and place.is_ours():
            state: dict[str, Any] = place.load(**where, weights_only=weights_only)
            return state
        return self._base().load_checkpoint(path, **where, weights_only=weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint once what was saved before is durable."""
        with self._entered():
            place = self.place(path)
            if self._writes_itself():
                outcome = place.remove(self._causes)
            else:
                outcome = operations.call(
                    partial(self._base().remove_checkpoint, path),
                    place.path,
                    exists=False,
                    causes=self._causes,
                )
            kept = {p: c for p, c in self._changes.items() if not c.done() or c.failed()}
            self._changes = kept | {place.path: outcome}
        if must_be_complete():
            outcome.exception()
            self._raise_changes()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until all that was saved is durable, and all that was to be removed is gone.

        Raises:
            SaveError: what failed since the last time.
            BusyError: the time, in seconds, was too short; the saves go on.
        """
        end = None if timeout is None else time.monotonic() + timeout
        self._saver.drain(timeout)
        for path, change in list(self._changes.items()):
            try:
                change.exception(None if end is None else max(end - time.monotonic(), 0))
            except FutureTimeoutError:
                raise BusyError(f"{path} was still to be removed after {timeout} s; that goes on") from None
        self._raise_changes()
        self._saver.raise_failures()

    def finish(self, error: BaseException | None) -> None:
        """Wait as `wait` does; what failed does not hide `error`, which is being raised."""
        if error is None:
            self.wait()
            return
        try:
            if not get_engine().given_up:
                self.wait(self._preemption_timeout if is_preemption(error) else None)
        except BusyError:
            self._give_up()
        except AsyncCkptError as failure:
            add_note(error, failure)

    def teardown(self) -> None:
        """Finish what is pending, and give the strategy back the CheckpointIO that it had before."""
        try:
            self.finish(sys.exc_info()[1] if is_interrupted() else None)
        finally:
            if self._lender is not None:
                (strategy, original), self._lender = self._lender, None
                strategy.checkpoint_io = original
            if self.checkpoint_io is not None:
                self.checkpoint_io.teardown()

    def lend(self, strategy: Any, original: CheckpointIO) -> None:
        """Take the place of the CheckpointIO of a strategy until `teardown`."""
        strategy.checkpoint_io = self
        self._lender = (strategy, original)

    def place(self, path: str | Path) -> Place:
        """Return where `path` leads."""
        return Place(path, self._open_store)

    def claim_save(self, path: str | Path) -> Save | None:
        """Return the last save to `path` if nobody has; its failure is then for the caller to tell."""
        save = self._saves.pop(self.place(path).path, None)
        if save is not None:
            save.committed.heard = True
        return save

    def claim_removal(self, path: str | Path) -> Outcome[None] | None:
        """Return the last removal of `path` if nobody has; its failure is for the caller to tell."""
        return self._changes.pop(self.place(path).path, None)

    @contextmanager
    def caused_by(self, causes: Causes) -> Iterator[None]:
        """Leave undone what is removed in this context if one of `causes` fails."""
        self._causes = causes
        try:
            yield
        finally:
            self._causes = ()

    def _complete(self, save: Save) -> None:
        try:
            save.committed.result(self._preemption_timeout if is_requeued() else None)
        except FutureTimeoutError:
            self._give_up()

    def _give_up(self) -> None:
        paths = ", ".join(get_engine().give_up())
        told = f"the job is to go and {self._preemption_timeout} s are over: given up are {paths}"
        logger.error(told)
        sys.stderr.write(f"asyncckpt: {told}\n")  # a job's log has it, too, where no logging is set up

    def _open_store(self, directory: str) -> Store:
        return open_store(directory)

    def _writes_itself(self) -> bool:
        return self.checkpoint_io is None or type(self.checkpoint_io) is self.torch_io

    def _base(self) -> CheckpointIO:
        return self.checkpoint_io or self.torch_io()

    def _raise_changes(self) -> None:
        failed = next(((path, c) for path, c in self._changes.items() if c.failed()), None)
        if failed is not None:
            path, change = failed
            del self._changes[path]
            error = change.exception()
            raise SaveError(f"{path} could not be removed: {error}") from error

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self._thread, before = threading.get_ident(), self._thread
        try:
            yield
        finally:
            self._thread = before
