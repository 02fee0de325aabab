"""One face's way into the engine: snapshots in, bounded in number; checkpoints out; no failure unheard."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from asyncckpt.engine import Operation, current_engine, get_engine, refuse_to_wait_in_callback
from asyncckpt.errors import AsyncCkptError, BusyError, SaveError
from asyncckpt.failures import Failures, eviction_failure, failure_of
from asyncckpt.save import Save, skipped
from asyncckpt.staging import Stager
from asyncckpt.targets import copy_or_write
from asyncckpt.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from asyncckpt.engine import Engine
    from asyncckpt.staging import Frozen, Snapshot
    from asyncckpt.targets import Target
    from asyncckpt.types import Checkpoint

    OnError = Literal["raise"] | Callable[[Save, AsyncCkptError], object]
WhenBusy = Literal["wait", "skip", "replace"]

logger = logging.getLogger("asyncckpt")

# From this size on the writing begins while the copy goes on. Below it the copy is over too soon, and a
# woken engine would take the interpreter from it.
_OVERLAP_FROM = 32 << 20


@dataclass(slots=True, eq=False)
class _Job:
    """A save on its way."""

    save: Save
    target: Target
    began: float
    write: Callable[[], Awaitable[Checkpoint]]
    snapshot: Snapshot
    operation: Operation = field(init=False)


@dataclass(slots=True, eq=False)
class _Instant:
    """What was saved last in an instant, and a hold on the copy that was made in it."""

    job: _Job
    stager: Stager
    snapshot: Snapshot


class Saver:
    """Takes snapshots and has them written, at most `max_in_flight` in host memory at once.

    Args:
        max_in_flight: snapshots held in host memory at once.
        when_busy: what a save does when there are that many: "wait" for one to be durable, "skip" this one,
            or "replace" one that is still queued.
        on_error: "raise" from whichever call comes next, or a callable that is given the `Save` and its
            error, on the engine's thread.
        warns: whether states are warned of that `weights_only=True` will refuse to load.
    """

    def __init__(
        self,
        max_in_flight: int,
        when_busy: WhenBusy = "wait",
        on_error: OnError = "raise",
        *,
        warns: bool = True,
    ) -> None:
        _validate(max_in_flight, when_busy, on_error)
        self._max_in_flight = max_in_flight
        self._when_busy: WhenBusy = when_busy
        self._on_error = on_error
        self._warns = warns
        self._stager: Stager | None = None
        self._instant: _Instant | None = None
        self._reset()
        _savers.add(self)

    def __repr__(self) -> str:
        return f"<Saver in_flight={self._in_flight}/{self._max_in_flight} pending={self._pending}>"

    def save(self, state: object, target: Target, step: int | None, began: float) -> Save:
        """Take a snapshot of `state` and queue its file; returns when the state may change.

        Args:
            state: anything torch.save takes.
            target: where it goes.
            step: the training step, if there is one.
            began: when the caller was called, by `time.perf_counter`.

        Raises:
            SaveError: an earlier save failed and nobody was told, or the state cannot be saved. Nothing was
                taken.
        """
        with self._taking:
            return self._save(state, target, step, began)

    def _save(self, state: object, target: Target, step: int | None, began: float) -> Save:
        self.raise_failures("; the save that is told of it was not taken")
        save = Save(step, target.path)
        engine = get_engine()
        entered, frozen = time.perf_counter(), None
        if self._instant is not None:
            frozen = self._instant.stager.freeze(state)
            if self._save_again(engine, self._instant, frozen, save, target, began):
                return save
        self._end_instant()  # what it holds may be what there has to be room for
        compared = time.perf_counter()
        if not self._admit(engine):
            return skipped(save, f"{self._max_in_flight} saves are still being written")
        admitted = time.perf_counter()
        try:
            stager = self._stager_of(engine)
            snapshot = stager.stage(state, wait=self._when_busy != "skip", frozen=frozen)
        except BusyError as error:
            self._leave()
            return skipped(save, str(error))
        except BaseException:
            self._leave()
            raise
        stats = save.stats
        stats.freeze = compared - entered + snapshot.freeze_seconds
        stats.wait = admitted - compared + snapshot.wait_seconds
        job = self._job(save, target, began, partial(target.write, stager, snapshot, stats), snapshot)
        if self._in_instant:
            self._instant = _Instant(job, stager, snapshot.share(snapshot.frozen))
        try:
            self._copy_and_submit(engine, job)
        except BaseException:
            self._end_instant()
            raise
        stats.stall = time.perf_counter() - began
        return save

    def _copy_and_submit(self, engine: Engine, job: _Job) -> None:
        if job.target.overlaps and job.snapshot.body.nbytes >= _OVERLAP_FROM:
            try:
                self._submit(engine, job)
                self._copy(job)
            finally:
                job.snapshot.end_copy()
            return
        try:
            self._copy(job)
        except BaseException:
            self._give_back(job.snapshot)
            raise
        job.save.stats.stall = time.perf_counter() - job.began
        self._submit(engine, job)

    def _save_again(  # noqa: PLR0913, PLR0917 - what a save consists of
        self, engine: Engine, last: _Instant, frozen: Frozen, save: Save, target: Target, began: float
    ) -> bool:
        """Save what has been copied in this instant already; returns false if it has changed."""
        snapshot = last.stager.stage_again(frozen, last.snapshot)
        if snapshot is None:
            return False
        write = partial(target.write, last.stager, snapshot, save.stats)
        if snapshot.frozen == last.job.snapshot.frozen and save.path != last.job.save.path:
            copy = target.copying(last.job.target)
            write = write if copy is None else partial(copy_or_write, last.job.save, copy, write)
        save.snapshotted.set_result(None)
        save.stats.freeze = save.stats.stall = time.perf_counter() - began
        last.job = self._job(save, target, began, write, snapshot)
        self._submit(engine, last.job)
        return True

    @contextmanager
    def instant(self) -> Iterator[None]:
        """Compare what is saved in this context with what was saved in it before; copy only what differs.

        Where all is equal, the store copies the file; where only the tensors are, they are written from the
        snapshot that is there.
        """
        self._in_instant = True
        try:
            yield
        finally:
            self._in_instant = False
            self._end_instant()

    def _end_instant(self) -> None:
        instant, self._instant = self._instant, None
        if instant is not None:
            self._give_back(instant.snapshot)

    def reserve(self, state: object) -> int:
        """Make host memory for the snapshots of `state` ready; returns the bytes of one."""
        return self._stager_of(get_engine()).reserve(state, self._max_in_flight)

    def drain(self, timeout: float | None = None) -> None:
        """Wait until everything submitted is carried out, evictions included.

        Raises:
            BusyError: it was not within `timeout` seconds; it goes on.
        """
        refuse_to_wait_in_callback()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._pending, timeout):
                raise BusyError(f"{self._pending} saves were still pending after {timeout} s; they go on")

    def raise_failures(self, hint: str = "") -> None:
        """Raise what failed since the last time and nobody was told, once.

        Raises:
            SaveError: with the first failure as its cause; the message tells of all.
        """
        self._failures.raise_unheard(hint)

    def _job(
        self,
        save: Save,
        target: Target,
        began: float,
        write: Callable[[], Awaitable[Checkpoint]],
        snapshot: Snapshot,
    ) -> _Job:
        job = _Job(save, target, began, write, snapshot)
        job.operation = Operation(partial(self._carry_out, job), {save.path: True})
        return job

    def _copy(self, job: _Job) -> None:
        try:
            job.snapshot.copy()
        except SaveError:
            job.save.committed.heard = True  # the caller is told here
            raise
        job.save.stats.copy = job.snapshot.copy_seconds
        job.save.snapshotted.set_result(None)

    def _submit(self, engine: Engine, job: _Job) -> None:
        job.save.stats.queue_depth = engine.depth()
        with self._changed:
            self._pending += 1
            self._queued.append(job)
            self._open.append(job.save)
        engine.submit(job.operation)

    def _admit(self, engine: Engine) -> bool:
        """Take one of the places in flight; returns whether there was one, or was made."""
        with self._changed:
            while self._in_flight >= self._max_in_flight:
                if self._when_busy == "skip":
                    return False
                if (
                    self._when_busy == "replace"
                    and self._queued
                    and engine.withdraw(self._queued[-1].operation)
                ):
                    self._withdrawn(self._queued.pop())
                else:
                    refuse_to_wait_in_callback()
                    self._changed.wait()
            self._in_flight += 1
        return True

    def _withdrawn(self, job: _Job) -> None:
        if job.snapshot.lease.release():
            self._in_flight -= 1
        self._pending -= 1
        self._open.remove(job.save)
        skipped(job.save, "a newer save took its place while it was queued")

    def _give_back(self, snapshot: Snapshot) -> None:
        if snapshot.lease.release():
            self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    async def _carry_out(self, job: _Job) -> None:
        save, target, snapshot = job.save, job.target, job.snapshot
        with self._changed:
            if job in self._queued:
                self._queued.remove(job)
        try:
            try:
                checkpoint = await job.write()
            finally:
                # A save may fail while its state is still being copied: only then is the buffer free.
                await in_thread(snapshot.copy_ended.wait)
                self._give_back(snapshot)
        except Exception as error:  # noqa: BLE001 - told to the caller, whatever it is
            get_engine().settle(job.operation)
            # Callbacks run on a worker thread, from which they may use the engine.
            await in_thread(_guarded, self._fail, save, error)
        else:
            save.stats.nbytes = checkpoint.nbytes
            save.stats.durable = time.perf_counter() - job.began
            get_engine().settle(job.operation)
            await in_thread(_guarded, save.committed.set_result, checkpoint)
            await self._after(target, checkpoint)
        finally:
            with self._changed:
                self._pending -= 1
                self._open.remove(save)
                self._changed.notify_all()

    async def _after(self, target: Target, checkpoint: Checkpoint) -> None:
        if target.after is None:
            return
        try:
            await target.after(checkpoint)
        except Exception as error:
            logger.exception("%s is saved, but what follows a commit failed", checkpoint.path)
            self._failures.add(eviction_failure(checkpoint, error))

    def _fail(self, save: Save, error: Exception) -> None:
        failure = failure_of(save, error)
        logger.error("%s", failure, exc_info=error)
        if callable(self._on_error):
            save.committed.heard = True
            save.committed.set_exception(failure)
            self._on_error(save, failure)
            return
        self._failures.add(failure, save.committed)
        save.committed.set_exception(failure)

    def _stager_of(self, engine: Engine) -> Stager:
        if self._stager is None or self._stager.arena is not engine.arena:
            self._stager = Stager(engine.arena, self._warns)
        return self._stager

    def _reset(self) -> None:
        """Begin with nothing in flight: at first, and in a forked child."""
        self._in_instant = False
        self._instant = None
        self._taking = threading.Lock()  # snapshots are taken one after another, whatever the thread
        self._changed = threading.Condition()
        self._in_flight = 0
        self._pending = 0
        self._queued: deque[_Job] = deque()
        self._open: list[Save] = []
        self._failures = Failures()


def _guarded(tell: Callable[..., object], *args: object) -> None:
    """Tell a caller how a save ended; what callbacks raise, SystemExit included, must not end the engine."""
    try:
        tell(*args)
    except BaseException:
        logger.exception("a callback of a save failed")


def _validate(max_in_flight: int, when_busy: str, on_error: object) -> None:
    if isinstance(max_in_flight, bool) or not isinstance(max_in_flight, int):
        raise TypeError(f"max_in_flight must be an int, not {max_in_flight!r}")
    if max_in_flight < 1:
        raise ValueError(f"max_in_flight must be at least 1, not {max_in_flight}")
    if when_busy not in {"wait", "skip", "replace"}:
        raise ValueError(f'when_busy must be "wait", "skip" or "replace", not {when_busy!r}')
    if when_busy == "replace" and max_in_flight < 2:  # noqa: PLR2004 - one being written, one to replace
        raise ValueError(
            'when_busy="replace" needs max_in_flight=2 or more: one is written, one can be replaced'
        )
    if on_error != "raise" and not callable(on_error):
        raise TypeError(f'on_error must be "raise" or a callable, not {on_error!r}')


_savers: weakref.WeakSet[Saver] = weakref.WeakSet()


def _report_at_exit() -> None:
    """Finish what is pending, and tell of failures that nobody can be told of any more."""
    engine = current_engine()
    if engine is not None and not engine.given_up:
        engine.drain()
    for saver in list(_savers):
        try:
            saver.raise_failures()
        except SaveError as error:
            sys.stderr.write(f"asyncckpt: {error}\n")


def _reset_in_child() -> None:
    for saver in list(_savers):
        saves = saver._open
        saver._reset()
        for save in saves:
            save.committed.abandon(
                SaveError(f"{save.path} is being saved by the process that this one was forked from")
            )
            save.snapshotted.abandon(None)


threading._register_atexit(_report_at_exit)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_reset_in_child)
