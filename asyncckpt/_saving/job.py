"""One save: the snapshot is taken on the calling thread, and written in the background."""

from __future__ import annotations

import threading
import time
from concurrent.futures import InvalidStateError
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from asyncckpt._saving.engine import Operation
from asyncckpt._saving.save import Save, resolve_skipped
from asyncckpt._threads import in_thread
from asyncckpt.errors import SaveError, SaveSkipped

if TYPE_CHECKING:
    from asyncckpt._saving.saver import Saver
    from asyncckpt._saving.staging import Frozen, Snapshot, Stager
    from asyncckpt._saving.targets import Target
    from asyncckpt._snapshot.deferred import Overlap

# From this size on writing begins during the copy. Smaller copies end too soon, and a woken engine would take
# the interpreter from them.
_OVERLAP_FROM = 32 << 20


class Job(Operation):
    """One save: admit, freeze, copy and submit on the calling thread; write, report and evict on the engine.

    Args:
        saver: the saver that counts it.
        target: the destination.
        step: the training step, if there is one.
        began: start of the public call, by `time.perf_counter`.

    Attributes:
        save: the handle that the caller gets.
        thread: id of the thread that takes the snapshot; None once it is in host memory and submitted.
        snapshot: the state, once it is frozen; None for a target that takes none.
        submitted: whether it was submitted to the engine.
        replaced: queued saves that it replaces.
    """

    def __init__(self, saver: Saver, target: Target, step: int | None, began: float) -> None:
        super().__init__({target.path: True})
        self.save = Save(step, target.path)
        self.thread: int | None = threading.get_ident()
        self.snapshot: Snapshot | None = None
        self.submitted = False
        self.replaced: list[Job] = []
        self._saver = saver
        self._target = target
        self._began = began

    def stage(self, frozen: Frozen, stager: Stager, overlap: Overlap | None, *, wait: bool) -> None:
        """Lease host memory for a frozen state.

        Raises:
            SaveError: the state exceeds the memory limit.
            BusyError: the memory is in use, and `wait` is false.
        """
        self.snapshot = stager.stage(frozen, self.save.stats, overlap, wait=wait)

    def copy_and_submit(self, state: object) -> None:
        """Copy the state to host memory and submit it; a large one is submitted before the copy.

        What may be deferred is copied later.
        """
        snapshot = self.snapshot
        assert snapshot is not None  # noqa: S101 - it is staged
        if snapshot.overlap is not None:
            self._copy(snapshot)
            if snapshot.deferred is not None:
                self.save.stats.overlapped = True
                snapshot.deferred.state = state
                snapshot.deferred.released = partial(_release, self.save)  # not of this job: that is a cycle
                snapshot.deferred.start()
            self._target.confirm()
            self._saver.submit(self)
        elif self._target.overlaps and snapshot.body.nbytes >= _OVERLAP_FROM:
            try:
                self._target.confirm()
                self._saver.submit(self)
                self._copy(snapshot)
            finally:
                snapshot.end_copy()
        else:
            self._copy(snapshot)
            self._target.confirm()
            self.save.stats.stall = time.perf_counter() - self._began
            self._saver.submit(self)
        self.thread = None
        self.save.stats.stall = time.perf_counter() - self._began

    def submit_without_state(self) -> None:
        """Submit a save whose target takes no snapshot."""
        self.thread = None
        _release(self.save)
        self._saver.submit(self)
        self.save.stats.stall = time.perf_counter() - self._began

    def fence(self) -> None:
        """Return once the state may be changed."""
        if self.snapshot is not None and self.snapshot.deferred is not None:
            self.snapshot.deferred.fence()

    def is_copied(self) -> bool:
        """Return whether nothing is copied into its buffer any more."""
        return self.thread is None and (self.snapshot is None or self.snapshot.filled.ended)

    def is_taken_by_caller(self) -> bool:
        """Return whether the calling thread, then in a signal handler, has not finished taking it."""
        deferred = None if self.snapshot is None else self.snapshot.deferred
        return self.thread == threading.get_ident() or (
            deferred is not None and deferred.copy.is_fenced_by_caller()
        )

    def awaits_caller(self) -> bool:
        """Return whether the calling thread copies the state and has not finished."""
        return self.is_taken_by_caller() and self.snapshot is not None and not self.snapshot.filled.ended

    async def run(self) -> None:
        """Write the snapshot, report the result, and evict older checkpoints."""
        saver, save, snapshot = self._saver, self.save, self.snapshot
        try:
            try:
                checkpoint = await self._target.write(snapshot, save.stats)  # type: ignore[arg-type] # or None
            finally:
                if snapshot is not None:
                    # A write may fail during the copy; the buffer is free only after the copy.
                    await in_thread(snapshot.filled.wait_for_end)
                saver.free(self)
        except SaveSkipped as error:  # on the rank that writes it
            self.effects = {}
            await in_thread(resolve_skipped, save, error)
        except BaseException as error:  # noqa: BLE001 - reported, whatever it is
            self.effects = {}
            # On a worker thread, where callbacks may use the engine.
            await in_thread(saver.reports.failed, save, error)
        else:
            save.stats.nbytes = checkpoint.nbytes
            save.stats.durable = time.perf_counter() - self._began
            self.effects = {}
            await in_thread(saver.reports.committed, save, checkpoint)
            try:
                await self._target.evict(checkpoint)
            except BaseException as error:  # noqa: BLE001 - a user's policy may even raise SystemExit
                saver.reports.not_evicted(checkpoint, error)

    def finished(self) -> None:
        self._saver.finished(self)

    def _copy(self, snapshot: Snapshot) -> None:
        try:
            snapshot.copy()
        except SaveError:
            self.save.committed.retrieved = True  # it is raised to the caller here
            raise
        if snapshot.deferred is None:
            _release(self.save)


def _release(save: Save) -> None:
    """Tell that the state may be changed; a fence and the background may do so at once."""
    with suppress(InvalidStateError):
        save.snapshotted.set_result(None)
