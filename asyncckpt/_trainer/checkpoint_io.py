"""A CheckpointIO whose saves, removals and links are carried out in the background, in order."""

from __future__ import annotations

import logging
import os
import posixpath
import sys
import threading
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from asyncckpt._loading.catalog import read_described
from asyncckpt._loading.load import load_image
from asyncckpt._loading.reader import read_file, read_image
from asyncckpt._saving import operations
from asyncckpt._saving.arguments import check_options, check_rank_timeout
from asyncckpt._saving.engine import get_engine, wait_for_pending
from asyncckpt._saving.overlapping import DEVICE_MEMORY, Overlapping
from asyncckpt._saving.saver import Saver
from asyncckpt._saving.targets import FileTarget
from asyncckpt._trainer.attachment import Attachment
from asyncckpt._trainer.locations import locate, step_of
from asyncckpt._trainer.sharded_writer import ShardedWriter
from asyncckpt._trainer.state_target import StateTarget
from asyncckpt._trainer.strategies import takes_io
from asyncckpt._trainer.submitted import Submitted
from asyncckpt.errors import AsyncCkptError, BusyError, add_note
from asyncckpt.layout.description import Description
from asyncckpt.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO as Base
    from typing_extensions import Self

    from asyncckpt._saving.operations import Causes
    from asyncckpt._saving.overlapping import GuardKind
    from asyncckpt._saving.save import Save
    from asyncckpt._saving.targets import Target
    from asyncckpt._snapshot.deferred import Overlap
    from asyncckpt.stores.base import Store

    Choose = Callable[[list[Any]], tuple[Overlap | None, str]]
else:
    Base = object

logger = logging.getLogger("asyncckpt")


class BackgroundIO(Base):
    """Makes the saves of `Trainer(plugins=[…])` and `Fabric(plugins=[…])` asynchronous.

    A Trainer waits for its saves at the end of `fit`. After that, and with Fabric, call `wait` or use this as
    a context manager; what is pending when the program ends is finished then, unless a signal ends it. Beside
    asyncckpt's `ModelCheckpoint`, saves outside of the training loop are complete when they return.

    Args:
        checkpoint_io: whose files they are. Lightning's own `TorchCheckpointIO`, which is the default, is
            replaced by a writer that makes the same files; any other is given the state in host memory, on a
            background thread, and must be done with it when it returns.
        max_in_flight: snapshots held in host memory at once; a save that finds as many waits for the oldest.
        preemption_timeout: seconds that a preempted job (SIGTERM, or SLURM's requeue signal) waits for
            pending saves; those that have not begun by then are given up. None waits without limit.
        overlap: let saves return after the freeze, and copy the parameters and the state of all optimizers of
            the process until their next step, which waits for the rest. An optimizer takes part from its
            first step on. Saves that are complete when they return are not overlapped.
        guard: how a change is noticed that comes from anything but an optimizer's step: by the "version"
            counters of tensors, or also by a "checksum" of the memory.
        device_memory: bytes that overlapped saves may take on each device for clones.
        rank_timeout: seconds that a rank waits for the others in a save of a sharded strategy.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """

    torch_io: ClassVar[type[CheckpointIO]]
    stock_async: ClassVar[type[Base]]

    in_hook: bool  # whether a ModelCheckpoint saves, whose HookFence comes before what may change parameters
    waits: bool  # whether saves and removals are complete when they return, as nobody waits for them later
    submitted: Submitted  # what no callback has taken
    _saver: Saver | None
    _overlapping: Overlapping
    causes: Causes  # removals, copies and links are left undone if one of these fails
    _attachment: Attachment | None  # to a strategy that was not given it as a plugin, or cannot take one
    _sharded: ShardedWriter | None
    _handled: BaseException | None  # the exception that was being handled when the first save was made
    _thread: int | None  # which is making a save

    def __init__(  # noqa: PLR0913 - each is one decision of the user's
        self,
        checkpoint_io: CheckpointIO | None = None,
        *,
        max_in_flight: int = 2,
        preemption_timeout: float | None = None,
        overlap: bool = False,
        guard: GuardKind = "version",
        device_memory: int = DEVICE_MEMORY,
        rank_timeout: float = 300.0,
    ) -> None:
        if isinstance(checkpoint_io, self.stock_async):
            checkpoint_io = checkpoint_io.checkpoint_io  # two of a kind: ours takes its place
        super().__init__(checkpoint_io)
        check_options(max_in_flight, "wait", "raise", None)
        check_rank_timeout(rank_timeout)
        self._max_in_flight = max_in_flight
        self._preemption_timeout = preemption_timeout
        self._overlaps = overlap
        self._guard: GuardKind = guard
        self._device_memory = device_memory
        self._rank_timeout = rank_timeout
        vars(self).update(self._idle())

    def _idle(self) -> dict[str, Any]:
        unset = ("_saver", "_sharded", "_attachment", "_handled", "_thread")
        idle = {**dict.fromkeys(unset), "waits": False, "in_hook": False, "causes": ()}
        return {**idle, "submitted": Submitted(), "_overlapping": self._new_overlapping()}

    def _new_overlapping(self) -> Overlapping:
        return Overlapping(self._overlaps, self._guard, self._device_memory, everyone=True)

    def __getstate__(self) -> dict[str, Any]:
        # A process that gets a copy has nothing pending: that stays with this one.
        idle = self._idle()
        return {name: value for name, value in vars(self).items() if name not in idle}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        vars(self).update(self._idle())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self.finish(error)
        finally:
            self._detach()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Take a snapshot of `checkpoint` and queue its write; return once the state may be changed.

        With `overlap`, parameters and optimizer state may then be changed by the steps of optimizers only,
        or after `fence`.

        Raises:
            SaveError: the state cannot be saved, or an earlier save failed and its error was not raised yet.
                This save was not started.
            TypeError: `storage_options` is given, and the writer takes none.
        """
        began = time.perf_counter()
        if self._is_broken_into():
            self._base().save_checkpoint(checkpoint, path, storage_options)
            return

        def start(saver: Saver, choose: Choose) -> Save:
            self.submitted.raise_failed_changes()
            overlap, reason = choose([])
            step = step_of(checkpoint)
            save = saver.save(checkpoint, self._target(path, step, storage_options), step, began, overlap)
            save.stats.reason = save.stats.reason or reason
            return save

        self._save(path, checkpoint, began, start)

    def fence(self) -> None:
        """Wait until parameters and optimizer state may be changed by hand; on a GPU, the host does not wait.

        Needed with `overlap` between a save and a change that is not a step of an optimizer.
        """
        if self._saver is not None:
            self._saver.fence()

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
        where = {} if map_location is None else {"map_location": map_location}
        if not self.writes_itself or not self._is_ours(path):
            return self._base().load_checkpoint(path, **where, weights_only=weights_only)
        directory, name = locate(path)
        image = get_engine().call(read_image, self._open_store(directory), name)
        state: dict[str, Any] = load_image(image, **where, weights_only=weights_only).state
        return state

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint once what was saved before is durable."""
        with self._entered():
            directory, name = locate(path)
            if self.writes_itself:
                removal = operations.remove(self._open_store(directory), name, causes=self.causes)
            else:
                remove = partial(self._base().remove_checkpoint, path)
                full = posixpath.join(directory, name)
                removal = operations.call(remove, full, exists=False, causes=self.causes)
            self.submitted.note(str(path), removal)
        if self.waits:
            removal.exception()
            self.submitted.raise_failed_changes()

    def _is_ours(self, path: str | Path) -> bool:
        """Return whether a file that asyncckpt wrote is at `path`; what a web server has is not looked at."""
        if str(path).startswith(("http:", "https:")):
            return False
        directory, name = locate(path)
        try:
            return get_engine().call(read_file, read_described, self._open_store(directory), name) is not None
        except (OSError, AsyncCkptError):
            return False

    def wait(self, timeout: float | None = None) -> None:
        """Wait until all saves are durable and all removals done.

        Raises:
            SaveError: for failures that were not raised before.
            BusyError: saves or removals are still pending after `timeout` seconds; they continue.
        """
        end = None if timeout is None else time.monotonic() + timeout
        if self._saver is not None:
            self._saver.drain(timeout)
        self.submitted.wait_for_changes(None if end is None else max(end - time.monotonic(), 0))
        self.submitted.raise_failed_changes()
        if self._saver is not None:
            self._saver.raise_failures()

    def finish(self, error: BaseException | None) -> None:
        """Wait as `wait` does, and give back what saves need; what failed does not hide `error`."""
        # What a Trainer raises in its loop after a SIGTERM.
        timeout = self._preemption_timeout if type(error).__name__ == "SIGTERMException" else None
        try:
            if error is None or not get_engine().given_up:
                self.wait(timeout)
        except AsyncCkptError as failure:
            if error is None:
                raise
            if isinstance(failure, BusyError):
                self._give_up()
            else:
                add_note(error, failure)
        finally:
            self._overlapping.close()
            sharded, self._sharded = self._sharded, None
            saver, self._saver = self._saver, None
            try:
                if sharded is not None and error is None:
                    sharded.end()
            finally:
                if sharded is not None:
                    sharded.close()
                if saver is not None:
                    saver.close()

    def teardown(self) -> None:
        """Finish what is pending, and give the strategy back the CheckpointIO that it had before."""
        # A Trainer that cleans up behind an exception is still handling it.
        handled = sys.exc_info()[1]
        try:
            self.finish(None if handled is self._handled else handled)
        finally:
            self._detach()
            if self.checkpoint_io is not None:
                self.checkpoint_io.teardown()

    def attach(self, owner: Any) -> None:
        """Make the saves of a Trainer or a Fabric asynchronous until `teardown` or the end of `with`.

        Needed with sharded strategies, unless asyncckpt's `ModelCheckpoint` is there. Call it on every rank.
        """
        strategy = owner.strategy
        if self._attachment is not None and self._attachment.strategy is strategy:
            return
        self._detach()
        replaces = takes_io(strategy) and background_io(strategy.checkpoint_io) is None
        self._attachment = Attachment(strategy, self, replaces=replaces)

    def _detach(self) -> None:
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            attachment.end()

    def overlap(self) -> None:
        """Overlap saves from now on."""
        if not self._overlaps:
            self._overlaps = True
            self._overlapping = self._new_overlapping()

    @property
    def overlaps(self) -> bool:
        """Whether saves are overlapped, unless they are complete when they return."""
        return self._overlaps

    @property
    def writes_itself(self) -> bool:
        """Whether asyncckpt's writer makes the files."""
        return self.checkpoint_io is None or type(self.checkpoint_io) is self.torch_io

    def _save(
        self,
        path: str | Path,
        checkpoint: dict[str, Any],
        began: float,
        start: Callable[[Saver, Choose], Save],
    ) -> None:
        """Start a save by `start`, and wait for it if it is to be complete."""
        # Lightning requeues the SLURM job right after the save to a file of this name.
        is_requeued = os.path.basename(path).startswith("hpc_ckpt_")  # noqa: PTH119 - it may be a URL
        is_complete = self.waits or is_requeued
        with self._entered():
            if self._saver is None:
                # Lightning's checkpoints hold objects of its own, and it loads them with its own default.
                self._saver, self._handled = Saver(self._max_in_flight, warns=False), sys.exc_info()[1]
            why_not = self._why_not_overlapped(checkpoint, is_complete=is_complete)
            save = start(self._saver, partial(self._overlapping.of, False if why_not else None))
            save.stats.reason = save.stats.reason or why_not
            if not why_not:
                self._overlapping.note(save, began)
            self.submitted.note(str(path), save.committed, save.stats)
        if is_complete:
            try:
                save.committed.result(self._preemption_timeout if is_requeued else None)
            except FutureTimeoutError:
                self._give_up()

    def _is_broken_into(self) -> bool:
        """Return whether a signal handler calls this that interrupted a save, which holds the locks."""
        return self._thread == threading.get_ident()

    def _sharded_writer(self, saver: Saver) -> ShardedWriter:
        """Return what saves the shards of all ranks; made at the first save, on each rank."""
        if self._sharded is None:
            self._sharded = ShardedWriter(saver, self._rank_timeout)
        return self._sharded

    def _why_not_overlapped(self, checkpoint: dict[str, Any], *, is_complete: bool) -> str:
        if self.overlaps and is_complete:
            return "the save was to be complete when it returned"
        if self.overlaps and "averaging_state" in checkpoint and not self.in_hook:
            # It writes through `.data`, which no version counter shows.
            return "Lightning's WeightAveraging changes parameters; ModelCheckpoint of asyncckpt would fence"
        return ""

    def _base(self) -> CheckpointIO:
        return self.checkpoint_io or self.torch_io()

    def _open_store(self, directory: str) -> Store:
        return open_store(directory)

    def _target(self, path: str | Path, step: int | None, storage_options: Any) -> Target:
        directory, name = locate(path)
        if not self.writes_itself:
            save = partial(self._base().save_checkpoint, path=path, storage_options=storage_options)
            return StateTarget(posixpath.join(directory, name), save)
        if storage_options is not None:
            raise TypeError(
                f"`storage_options` is not supported by {type(self).__name__}; wrap a CheckpointIO of"
                " your own that knows what to do with them"
            )
        return FileTarget(self._open_store(directory), name, Description(0, step, {}, time.time()))

    def _give_up(self) -> None:
        paths = ", ".join(get_engine().give_up())
        message = f"the job is to go and {self._preemption_timeout} s are over: given up are {paths}"
        logger.error(message)
        sys.stderr.write(f"asyncckpt: {message}\n")  # a job's log has it, too, where no logging is set up

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self._thread, before = threading.get_ident(), self._thread
        try:
            yield
        finally:
            self._thread = before


def background_io(io: Any) -> BackgroundIO | None:
    """Return the BackgroundIO that a CheckpointIO is or wraps, if there is one."""
    while not isinstance(io, BackgroundIO) and hasattr(type(io), "checkpoint_io"):
        io = io.checkpoint_io
    return io if isinstance(io, BackgroundIO) else None
