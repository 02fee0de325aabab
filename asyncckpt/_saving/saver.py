"""Take snapshots and queue their writes, with a bounded number of them in host memory."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Literal

from asyncckpt._saving.arguments import check_options
from asyncckpt._saving.engine import at_exit, get_engine
from asyncckpt._saving.engine_threads import in_callback
from asyncckpt._saving.job import Job
from asyncckpt._saving.reports import Reports
from asyncckpt._saving.save import skipped
from asyncckpt._saving.staging import FileStager
from asyncckpt._threads import Condition, handler_error, is_locked_by_caller
from asyncckpt.errors import BusyError, SaveError
from asyncckpt.types import SaveStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._saving.reports import OnCommit, OnError
    from asyncckpt._saving.save import Save
    from asyncckpt._saving.staging import Frozen, Stager
    from asyncckpt._saving.targets import Target
    from asyncckpt._snapshot.deferred import Overlap

WhenBusy = Literal["wait", "skip", "replace"]


class Saver:
    """Take snapshots and queue their writes, at most `max_in_flight` in host memory at once.

    Args:
        max_in_flight: snapshots held in host memory at once.
        when_busy: what a save does if there are that many: "wait" until one is durable, "skip" this one, or
            "replace" one that is still queued.
        on_error: "raise" from the next call, or a callable that is called with the `Save` and the error, on a
            background thread.
        on_commit: called with each checkpoint once it is durable, on a background thread.
        warns: whether to warn of entries that `weights_only=True` will refuse to load.
        keeps: whether the engine keeps its threads and host memory until this is closed or garbage-collected.

    Attributes:
        reports: commits and failures of the saves.
    """

    def __init__(  # noqa: PLR0913 - each is one decision of the user's
        self,
        max_in_flight: int,
        when_busy: WhenBusy = "wait",
        on_error: OnError = "raise",
        on_commit: OnCommit | None = None,
        *,
        warns: bool = True,
        keeps: bool = True,
    ) -> None:
        check_options(max_in_flight, when_busy, on_error, on_commit)
        self._max_in_flight = max_in_flight
        self._when_busy: WhenBusy = when_busy
        self._callbacks = on_error, on_commit
        self._warns = warns
        self._keeps = keeps
        self._stagers = threading.local()
        self._reset()
        with self._changed:
            _savers.add(self)

    def __repr__(self) -> str:
        return f"<Saver in_flight={self.in_flight}/{self._max_in_flight} pending={len(self._jobs)}>"

    @property
    def in_flight(self) -> int:
        """Number of snapshots in host memory, those being taken included."""
        return len(self._in_flight)

    @property
    def pending(self) -> int:
        """Number of submitted saves that are not finished, evictions included."""
        return len(self._jobs)

    def open(self) -> None:
        """Keep the engine's threads and host memory until `close`; a save does the same."""
        if self._keeps:
            get_engine().use(self)

    def close(self) -> None:
        """Let the engine release threads and host memory, unless others use them; a save opens it again."""
        get_engine().leave(self)

    def save(
        self, state: object, target: Target, step: int | None, began: float, overlap: Overlap | None = None
    ) -> Save:
        """Take a snapshot of `state` and queue its write; return once the state may be changed.

        Args:
            state: anything torch.save takes.
            target: the destination.
            step: the training step, if there is one.
            began: start of the public call, by `time.perf_counter`.
            overlap: what may be copied after the return, until its fence.

        Raises:
            SaveError: the state cannot be saved, or an earlier save failed and its error was not raised yet.
                This save was not started.
            BusyError: called in a callback, or by a signal handler that interrupted a save, in which it would
                wait for itself. This save was not started.
        """
        self.refuse_handler()
        self.raise_failures("; the save that raised this was not started")
        return self.start(
            state, target, step, began, overlap, self._stager(), skips=self._when_busy == "skip"
        )

    def start(  # noqa: PLR0913, PLR0917 - one save, and how it is taken
        self,
        state: object,
        target: Target,
        step: int | None,
        began: float,
        overlap: Overlap | None,
        stager: Stager,
        *,
        skips: bool,
        frozen: Frozen | None = None,
    ) -> Save:
        """Do what `save` does, whether an earlier save failed or not.

        Args:
            state: what `stager` freezes, or has frozen.
            target: the destination.
            step: the training step, if there is one.
            began: start of the public call, by `time.perf_counter`.
            overlap: what may be copied after the return, until its fence.
            stager: takes the snapshot.
            skips: whether to skip this save if there is no place or no memory for it.
            frozen: the state, if it is frozen already.
        """
        self.open()
        job = Job(self, target, step, began)
        try:
            self._take(job, state, frozen, overlap, stager, skips=skips)
        except BaseException:
            self._abandon(job)
            raise
        return job.save

    def follow(self, target: Target, step: int | None, began: float) -> Save:
        """Queue a save of which another rank takes the snapshot."""
        self.open()
        job = Job(self, target, step, began)
        try:
            job.submit_without_state()
        except BaseException:
            self._abandon(job)
            raise
        return job.save

    def refuse_handler(self) -> None:
        """Raise BusyError in a signal handler that interrupted a save in a critical section."""
        if is_locked_by_caller():
            raise handler_error("save()")

    def is_full(self) -> bool:
        """Return whether a save would wait, be skipped, or replace another."""
        return self.in_flight >= self._max_in_flight

    def _take(  # noqa: PLR0913 - as `start`
        self,
        job: Job,
        state: object,
        frozen: Frozen | None,
        overlap: Overlap | None,
        stager: Stager,
        *,
        skips: bool,
    ) -> None:
        entered = time.perf_counter()
        if not self._admit(job, skips=skips):
            skipped(job.save, f"{self._max_in_flight} earlier saves are still being written")
            return
        job.save.stats.wait = time.perf_counter() - entered
        try:
            frozen = frozen or stager.freeze(state, job.save.stats)
            job.stage(frozen, stager, overlap, wait=not skips and not self._is_nested(job))
        except BusyError as error:
            if not skips:
                raise
            self._abandon(job)
            skipped(job.save, str(error))
            return
        job.copy_and_submit(state)

    def reserve(self, state: object) -> int:
        """Allocate host memory for the snapshots of `state`; return the size of one in bytes."""
        stager = self._stager()
        return self.reserve_frozen(stager.freeze(state, SaveStats())[0], stager)

    def reserve_frozen(self, frozen: object, stager: Stager) -> int:
        """Do what `reserve` does for a frozen state."""
        self.open()
        get_engine().start()
        return stager.reserve(frozen, self._max_in_flight)

    def fence(self) -> None:
        """Return once the states of all saves may be changed by hand."""
        for job in self._jobs_in_flight():
            job.fence()

    def drain(self, timeout: float | None = None, gives_up: Callable[[], bool] = lambda: False) -> None:
        """Wait until all submitted saves are finished, evictions included, or `gives_up` returns true.

        Raises:
            BusyError: saves are pending after `timeout` seconds, and continue; or it would wait for itself.
        """
        get_engine().refuse_to_wait("wait()", broken_into=any(job.is_taken_by_caller() for job in self._jobs))
        if not self._changed.until(lambda: not self._jobs or gives_up(), timeout):
            raise BusyError(f"{len(self._jobs)} saves are still pending after {timeout} s; they continue")

    def raise_failures(self, hint: str = "") -> None:
        """Raise the failures that were neither raised nor retrieved yet; see `Reports.raise_failures`."""
        self.reports.raise_failures(hint)

    def submit(self, job: Job) -> None:
        engine = get_engine()
        job.save.stats.queue_depth = engine.depth()
        with self._changed:
            self._jobs.append(job)
        job.submitted = True
        engine.submit(job)

    def free(self, job: Job) -> None:
        """Release the host memory of a job, and take it out of flight."""
        if job.snapshot is not None:
            job.snapshot.release()
        with self._changed:
            self._in_flight.discard(job)
        self._changed.notify_all()

    def finished(self, job: Job) -> None:
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
        self._changed.notify_all()

    def _admit(self, job: Job, *, skips: bool) -> bool:
        """Put a job in flight, waiting for or replacing others as `when_busy` says; return whether it is."""

        def attempt() -> bool:
            if len(self._in_flight) >= self._max_in_flight and self._when_busy == "replace":
                self._withdraw_queued(job.replaced)
            if len(self._in_flight) < self._max_in_flight:
                self._in_flight.add(job)
            return job in self._in_flight

        try:
            if self._changed.until(attempt, 0) or skips:
                return job in self._in_flight
            self._refuse_to_wait()
            if self._when_busy == "replace":
                self._wait_for_copies()
            return self._changed.until(attempt)
        finally:
            self._skip_replaced(job)

    def _wait_for_copies(self) -> None:
        """Wait until queued saves can be replaced: nothing may be copied into their buffers."""
        for job in list(self._jobs):
            if not job.begun and job.thread is None and job.snapshot is not None:
                job.snapshot.filled.wait_for_end()

    def _withdraw_queued(self, replaced: list[Job]) -> None:
        """Withdraw the newest queued save, if there is one, and add it to `replaced` before that."""
        for job in reversed(self._jobs):
            if not job.begun and job.is_copied():  # one that is still being copied needs its buffer
                replaced.append(job)
                if get_engine().withdraw(job):
                    self._in_flight.discard(job)
                    return
                replaced.remove(job)

    def _skip_replaced(self, job: Job) -> None:
        """Resolve the replaced saves; not under the lock, since this calls callbacks."""
        for other in job.replaced:
            if other.withdrawn and not other.save.committed.done():
                self.free(other)
                self.finished(other)
                skipped(other.save, "replaced in the queue by a newer save")

    def _refuse_to_wait(self) -> None:
        """Raise BusyError if no save in flight can finish before the caller continues."""
        get_engine().refuse_to_wait("save()")
        jobs = self._jobs_in_flight()
        if jobs and all(job.is_taken_by_caller() for job in jobs):
            raise handler_error("save()")

    def _is_nested(self, job: Job) -> bool:
        """Return whether no host memory would be released while this save waits for it."""
        with self._changed:
            others = [other for saver in _savers for other in saver._in_flight if other is not job]
        return in_callback() or any(other.is_taken_by_caller() for other in others)

    def _jobs_in_flight(self) -> list[Job]:
        with self._changed:
            return list(self._in_flight)

    def _abandon(self, job: Job) -> None:
        """Release what a save that raises has acquired; a running write fails by itself."""
        self._skip_replaced(job)
        job.thread = None
        if job.snapshot is not None:
            job.snapshot.end_copy()
        if not job.submitted or get_engine().withdraw(job):
            self.free(job)
            self.finished(job)

    def _stager(self) -> FileStager:
        """Return the stager of the calling thread; its caches are not thread-safe."""
        stager: FileStager | None = getattr(self._stagers, "own", None)
        arena = get_engine().arena
        if stager is None or stager.arena is not arena:
            stager = self._stagers.own = FileStager(arena, warns=self._warns)
        return stager

    def _reset(self) -> None:
        """Set the state without saves: initially, and in a forked child."""
        self._changed = Condition()
        self._in_flight: weakref.WeakSet[Job] = weakref.WeakSet()
        self._jobs: list[Job] = []  # submitted and not finished
        self.reports = Reports(*self._callbacks)


_savers: weakref.WeakSet[Saver] = weakref.WeakSet()


def _report_at_exit() -> None:
    """Print the failures that no later call can raise."""
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
