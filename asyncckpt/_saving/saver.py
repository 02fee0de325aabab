"""Take snapshots, queue their writes, report each failure once."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal

from asyncckpt._saving.arguments import check_options
from asyncckpt._saving.engine import Operation, at_exit, get_engine
from asyncckpt._saving.engine_threads import in_callback
from asyncckpt._saving.failures import Failures, eviction_failure, failure_of
from asyncckpt._saving.job import Instant, Job, Place
from asyncckpt._saving.save import Save, skipped
from asyncckpt._saving.staging import Stager
from asyncckpt._saving.targets import copy_or_write
from asyncckpt._threads import Condition, handler_error, in_thread, is_locked_by_caller
from asyncckpt.errors import AsyncCkptError, BusyError, SaveError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from asyncckpt._saving.engine import Engine
    from asyncckpt._saving.staging import Frozen, Snapshot
    from asyncckpt._saving.targets import Target
    from asyncckpt.types import Checkpoint

    OnError = Literal["raise"] | Callable[[Save, AsyncCkptError], object]
    OnCommit = Callable[[Checkpoint], object]
    _Write = Callable[[], Awaitable[Checkpoint]]
WhenBusy = Literal["wait", "skip", "replace"]

logger = logging.getLogger("asyncckpt")

# From this size on the writing begins while the copy goes on. Below it the copy is over too soon, and a
# woken engine would take the interpreter from it.
_OVERLAP_FROM = 32 << 20


class Saver:
    """Takes snapshots and has them written, at most `max_in_flight` in host memory at once.

    Args:
        max_in_flight: snapshots held in host memory at once.
        when_busy: what a save does when there are that many: "wait" for one to be durable, "skip" this one,
            or "replace" one that is still queued.
        on_error: "raise" from whichever call comes next, or a callable that is given the `Save` and its
            error, on a background thread.
        on_commit: called with each checkpoint once it is durable, on a background thread.
        warns: whether states are warned of that `weights_only=True` will refuse to load.
    """

    def __init__(
        self,
        max_in_flight: int,
        when_busy: WhenBusy = "wait",
        on_error: OnError = "raise",
        on_commit: OnCommit | None = None,
        *,
        warns: bool = True,
    ) -> None:
        check_options(max_in_flight, when_busy, on_error, on_commit)
        self._max_in_flight = max_in_flight
        self._when_busy: WhenBusy = when_busy
        self._on_error = on_error
        self._on_commit = on_commit
        self._warns = warns
        self._stagers = threading.local()
        self._instant: Instant | None = None
        self._reset()
        with self._changed:
            _savers.add(self)

    def __repr__(self) -> str:
        return f"<Saver in_flight={self.in_flight}/{self._max_in_flight} pending={len(self._jobs)}>"

    @property
    def in_flight(self) -> int:
        """How many snapshots are held in host memory, or being taken."""
        return len(self._places)

    @property
    def pending(self) -> int:
        """How many saves are submitted and not carried out, evictions included."""
        return len(self._jobs)

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
            BusyError: it would have to wait for itself: it was called in a callback, or by a signal handler
                that broke into a save. Nothing was taken.
        """
        if is_locked_by_caller():
            raise handler_error("save()")
        self.raise_failures("; the save that is told of it was not taken")
        engine = get_engine()
        job = Job(Save(step, target.path), target, began)
        try:
            self._take(engine, job, state)
        except BaseException:
            self._abandon(engine, job)
            raise
        job.save.stats.stall = time.perf_counter() - began
        return job.save

    def _take(self, engine: Engine, job: Job, state: object) -> None:
        save, stats, frozen = job.save, job.save.stats, None
        entered = time.perf_counter()
        if self._instant is not None:
            frozen = self._instant.stager.freeze(state)
            if self._save_again(engine, self._instant, frozen, job):
                return
        self._end_instant()  # what it holds may be what there has to be room for
        compared = time.perf_counter()
        if not self._admit(engine, job):
            skipped(save, f"{self._max_in_flight} saves are still being written")
            return
        admitted = time.perf_counter()
        stager = self._stager_of(engine)
        if frozen is None:
            frozen = stager.freeze(state)
        try:
            job.snapshot = stager.stage(frozen, wait=self._when_busy != "skip" and not self._is_nested(job))
        except BusyError as error:
            if self._when_busy != "skip":
                raise
            self._abandon(engine, job)
            skipped(save, str(error))
            return
        stats.freeze = compared - entered + time.perf_counter() - admitted - job.snapshot.wait_seconds
        stats.wait = admitted - compared + job.snapshot.wait_seconds
        if self._in_instant:
            self._instant = Instant(job, stager, job.snapshot.share(job.snapshot.frozen))
        try:
            self._copy_and_submit(
                engine, job, job.snapshot, partial(job.target.write, stager, job.snapshot, stats)
            )
        except BaseException:
            self._end_instant()
            raise

    def _copy_and_submit(self, engine: Engine, job: Job, snapshot: Snapshot, write: _Write) -> None:
        if job.target.overlaps and snapshot.body.nbytes >= _OVERLAP_FROM:
            try:
                self._submit(engine, job, write)
                self._copy(job, snapshot)
            finally:
                snapshot.end_copy()
        else:
            self._copy(job, snapshot)
            job.save.stats.stall = time.perf_counter() - job.began
            self._submit(engine, job, write)
        if job.place is not None:
            job.place.thread = None

    def _save_again(self, engine: Engine, last: Instant, frozen: Frozen, job: Job) -> bool:
        """Save what has been copied in this instant already; returns false if it has changed."""
        snapshot = last.stager.stage_again(frozen, last.snapshot)
        if snapshot is None:
            return False
        save, before = job.save, last.job
        job.snapshot, job.place = snapshot, before.place
        write: _Write = partial(job.target.write, last.stager, snapshot, save.stats)
        same = before.snapshot is not None and snapshot.frozen == before.snapshot.frozen
        if same and save.path != before.save.path:
            copy = job.target.copying(before.target)
            write = write if copy is None else partial(copy_or_write, before.save, copy, write)
        save.snapshotted.set_result(None)
        save.stats.freeze = save.stats.stall = time.perf_counter() - job.began
        last.job = job
        self._submit(engine, job, write)
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
            self._give_back(instant.job.place, instant.snapshot)

    def reserve(self, state: object) -> int:
        """Make host memory for the snapshots of `state` ready; returns the bytes of one."""
        return self._stager_of(get_engine()).reserve(state, self._max_in_flight)

    def drain(self, timeout: float | None = None) -> None:
        """Wait until everything submitted is carried out, evictions included.

        Raises:
            BusyError: it was not within `timeout` seconds, and goes on; or the caller would wait for itself.
        """
        get_engine().refuse_to_wait("wait()", broken_into=any(job.is_taken_by_caller() for job in self._jobs))
        if not self._changed.until(lambda: not self._jobs, timeout):
            raise BusyError(f"{len(self._jobs)} saves were still pending after {timeout} s; they go on")

    def raise_failures(self, hint: str = "") -> None:
        """Raise what failed since the last time and nobody was told, once.

        Raises:
            SaveError: with the first failure as its cause; the message tells of all.
        """
        self._failures.raise_unheard(hint)

    def close(self) -> None:
        """Take no more part: the engine may give back what it holds."""
        with self._changed:
            _savers.discard(self)

    def _copy(self, job: Job, snapshot: Snapshot) -> None:
        try:
            snapshot.copy()
        except SaveError:
            job.save.committed.heard = True  # the caller is told here
            raise
        job.save.stats.copy = snapshot.copy_seconds
        job.save.snapshotted.set_result(None)

    def _submit(self, engine: Engine, job: Job, write: _Write) -> None:
        job.operation = Operation(
            partial(self._carry_out, job, write), {job.save.path: True}, job.is_copied_by_caller
        )
        job.save.stats.queue_depth = engine.depth()
        with self._changed:
            self._jobs.append(job)
        engine.submit(job.operation)

    def _admit(self, engine: Engine, job: Job) -> bool:
        """Take one of the places in flight; returns whether there was one, or was made."""

        def attempt() -> bool:
            if len(self._places) >= self._max_in_flight and self._when_busy == "replace":
                self._withdraw_queued(engine, job.replaced)
            if len(self._places) < self._max_in_flight:
                job.place = Place()
                self._places.add(job.place)
                return True
            return False

        try:
            if self._changed.until(attempt, 0) or self._when_busy == "skip":
                return job.place is not None
            self._refuse_to_wait()
            return self._changed.until(attempt)
        finally:
            self._tell_replaced(job)

    def _tell_replaced(self, job: Job) -> None:
        """Tell of the saves whose place was taken; not under the lock, as callbacks are called."""
        for other in job.replaced:
            if other.operation is not None and other.operation.withdrawn and not other.save.committed.done():
                self._forget(other)  # once more, if an interrupt came in between
                skipped(other.save, "a newer save took its place while it was queued")

    def _refuse_to_wait(self) -> None:
        """Raise where no place will be free before the caller goes on."""
        get_engine().refuse_to_wait("save()")
        with self._changed:
            places = list(self._places)
        if places and all(place.thread == threading.get_ident() for place in places):
            raise handler_error("save()")

    def _is_nested(self, job: Job) -> bool:
        """Return whether nobody would make room in host memory while this save waits for it."""
        with self._changed:
            places = [place for saver in _savers for place in saver._places if place is not job.place]
        return in_callback() or any(place.thread == threading.get_ident() for place in places)

    def _withdraw_queued(self, engine: Engine, replaced: list[Job]) -> None:
        """Give up the newest save that is still queued, noted in `replaced` beforehand, if there is one."""
        for job in reversed(self._jobs):
            if job.operation is not None and not job.operation.begun:
                replaced.append(job)
                if engine.withdraw(job.operation):
                    self._forget(job)
                    return
                replaced.remove(job)

    def _abandon(self, engine: Engine, job: Job) -> None:
        """Undo what a save that raises has taken; one that is being written fails by itself."""
        self._tell_replaced(job)
        if job.place is not None:
            job.place.thread = None
        if job.snapshot is not None:
            job.snapshot.end_copy()
        if job.operation is None or engine.withdraw(job.operation):
            self._forget(job)

    def _forget(self, job: Job) -> None:
        self._give_back(job.place, job.snapshot)
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
        self._changed.notify_all()

    def _give_back(self, place: Place | None, snapshot: Snapshot | None) -> None:
        """Free a place in flight, and its buffer unless somebody shares that."""
        if place is None or (snapshot is not None and not snapshot.lease.release()):
            return
        with self._changed:
            self._places.discard(place)
        self._changed.notify_all()

    async def _carry_out(self, job: Job, write: _Write) -> None:
        save, target = job.save, job.target
        try:
            try:
                checkpoint = await write()
            finally:
                # A save may fail while its state is still being copied: only then is the buffer free.
                if job.snapshot is not None:
                    await in_thread(job.snapshot.filled.wait_for_end)
                self._give_back(job.place, job.snapshot)
        except BaseException as error:  # noqa: BLE001 - told to the caller, whatever it is
            self._settle(job)
            # Callbacks run on a worker thread, from which they may use the engine.
            await in_thread(_guarded, self._fail, save, error)
        else:
            save.stats.nbytes = checkpoint.nbytes
            save.stats.durable = time.perf_counter() - job.began
            self._settle(job)
            await in_thread(self._tell, save, checkpoint)
            await self._after(target, checkpoint)
        finally:
            with self._changed:
                self._jobs.remove(job)
            self._changed.notify_all()

    def _settle(self, job: Job) -> None:
        if job.operation is not None:
            get_engine().settle(job.operation)

    def _tell(self, save: Save, checkpoint: Checkpoint) -> None:
        stats = save.stats
        logger.info(
            "%s is durable: %d bytes, training stood still for %.3f s, durable after %.3f s",
            checkpoint.path, stats.nbytes, stats.stall, stats.durable,
        )  # fmt: skip
        _guarded(save.committed.set_result, checkpoint)
        if self._on_commit is not None:
            _guarded(self._on_commit, checkpoint)

    async def _after(self, target: Target, checkpoint: Checkpoint) -> None:
        if target.after is None:
            return
        try:
            await target.after(checkpoint)
        except BaseException as error:  # a policy of the user's may even raise SystemExit
            logger.exception("%s is saved, but what follows a commit failed", checkpoint.path)
            self._failures.add(eviction_failure(checkpoint, error))

    def _fail(self, save: Save, error: BaseException) -> None:
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
        """Return the stager of the calling thread: what it keeps is not shared with others."""
        stager: Stager | None = getattr(self._stagers, "own", None)
        if stager is None or stager.arena is not engine.arena:
            stager = self._stagers.own = Stager(engine.arena, self._warns)
        return stager

    def _reset(self) -> None:
        """Begin with nothing in flight: at first, and in a forked child."""
        self._in_instant = False
        self._instant = None
        self._changed = Condition()
        self._places: weakref.WeakSet[Place] = weakref.WeakSet()
        self._jobs: list[Job] = []  # submitted, and not carried out
        self._failures = Failures()


def _guarded(tell: Callable[..., object], *args: object) -> None:
    """Tell a caller how a save ended; what callbacks raise, SystemExit included, must not end the engine."""
    try:
        tell(*args)
    except BaseException:
        logger.exception("a callback of a save failed")


_savers: weakref.WeakSet[Saver] = weakref.WeakSet()


def _report_at_exit() -> None:
    """Tell of failures that nobody can be told of any more."""
    with Condition():
        savers = list(_savers)
    for saver in savers:
        try:
            saver.raise_failures()
        except SaveError as error:
            sys.stderr.write(f"asyncckpt: {error}\n")


def _reset_in_child() -> None:
    for saver in list(_savers):
        jobs = saver._jobs
        saver._reset()
        for job in jobs:
            job.save.committed.abandon(
                SaveError(f"{job.save.path} is being saved by the process that this one was forked from")
            )
            job.save.snapshotted.abandon(None)


at_exit(_report_at_exit)
os.register_at_fork(after_in_child=_reset_in_child)
