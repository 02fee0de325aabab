"""One save on its way: taken on the calling thread, carried out in the background."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from asyncckpt._saving.engine import Operation
from asyncckpt._saving.save import Save
from asyncckpt._threads import in_thread
from asyncckpt.errors import SaveError

if TYPE_CHECKING:
    from asyncckpt._saving.saver import Saver
    from asyncckpt._saving.staging import Snapshot, Stager
    from asyncckpt._saving.targets import Target

# From this size on the writing begins while the copy goes on. Below it the copy is over too soon, and a
# woken engine would take the interpreter from it.
_OVERLAP_FROM = 32 << 20


class Job(Operation):
    """One save: admit, freeze, copy and submit on the calling thread; write, report and evict behind it.

    Args:
        saver: whose save it is.
        target: where it goes.
        step: the training step, if there is one.
        began: when the caller was called, by `time.perf_counter`.

    Attributes:
        save: what the caller holds.
        thread: who takes the snapshot; None once it is in host memory and submitted.
        snapshot: the state, as soon as it is frozen.
        submitted: whether the engine has it.
        replaced: queued saves whose place it takes.
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

    def stage(self, state: object, stager: Stager, *, wait: bool) -> None:
        """Freeze a state, and lease host memory for it.

        Raises:
            SaveError: the state cannot be saved, or there never is room for it.
            BusyError: there is no room now, and `wait` is false.
        """
        stats = self.save.stats
        self.snapshot = stager.stage(stager.freeze(state, stats), stats, wait=wait)

    def copy_and_submit(self) -> None:
        """Copy the state to host memory and have it written; large ones are written while they are copied."""
        snapshot = self.snapshot
        assert snapshot is not None  # noqa: S101 - it is staged
        if self._target.overlaps and snapshot.body.nbytes >= _OVERLAP_FROM:
            try:
                self._saver.submit(self)
                self._copy(snapshot)
            finally:
                snapshot.end_copy()
        else:
            self._copy(snapshot)
            self.save.stats.stall = time.perf_counter() - self._began
            self._saver.submit(self)
        self.thread = None
        self.save.stats.stall = time.perf_counter() - self._began

    def is_taken_by_caller(self) -> bool:
        """Return whether the calling thread is still taking it: a signal handler broke into that."""
        return self.thread == threading.get_ident()

    def awaits_caller(self) -> bool:
        """Return whether the calling thread is the one that copies the state, and has not ended that."""
        return self.is_taken_by_caller() and self.snapshot is not None and not self.snapshot.filled.ended

    async def run(self) -> None:
        """Write the snapshot, report how that ended, and evict what it makes room for."""
        saver, save, snapshot = self._saver, self.save, self.snapshot
        assert snapshot is not None  # noqa: S101 - it is staged
        try:
            try:
                checkpoint = await self._target.write(snapshot, save.stats)
            finally:
                # A save may fail while its state is still being copied: only then is the buffer free.
                await in_thread(snapshot.filled.wait_for_end)
                saver.free(self)
        except BaseException as error:  # noqa: BLE001 - reported, whatever it is
            self.effects = {}
            # Callbacks run on a worker thread, from which they may use the engine.
            await in_thread(saver.reports.failed, save, error)
        else:
            save.stats.nbytes = checkpoint.nbytes
            save.stats.durable = time.perf_counter() - self._began
            self.effects = {}
            await in_thread(saver.reports.committed, save, checkpoint)
            try:
                await self._target.evict(checkpoint)
            except BaseException as error:  # noqa: BLE001 - a policy of the user's may even raise SystemExit
                saver.reports.not_evicted(checkpoint, error)

    def left(self) -> None:
        """Count it as pending no more."""
        self._saver.finished(self)

    def _copy(self, snapshot: Snapshot) -> None:
        try:
            snapshot.copy()
        except SaveError:
            self.save.committed.heard = True  # the caller is given it here
            raise
        self.save.snapshotted.set_result(None)
