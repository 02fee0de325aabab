"""Checkpointer: save the checkpoints of a run in the background, evict old ones, and find them again."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio import CancelScope, to_thread

from asyncckpt._finder import Finder
from asyncckpt._loading.agreement import ALONE, Ranks
from asyncckpt._saving.arguments import checked_metrics, checked_step
from asyncckpt._saving.due import Due
from asyncckpt._saving.engine import get_engine
from asyncckpt._saving.overlapping import DEVICE_MEMORY, Overlapping
from asyncckpt._saving.ranked import Ranked
from asyncckpt._saving.request import SaveRequest
from asyncckpt._saving.saver import Saver
from asyncckpt._saving.series_writer import SeriesWriter
from asyncckpt._saving.targets import FileTarget
from asyncckpt._stateful import collect, stateful_objects
from asyncckpt.errors import (
    AsyncCkptError,
    CheckpointNotFoundError,
    SaveError,
    add_note,
)
from asyncckpt.layout.description import MAX_BYTES, Description
from asyncckpt.retention import check_metrics

if TYPE_CHECKING:
    import os
    import signal
    from collections.abc import Iterable, Mapping
    from types import TracebackType

    from torch.distributed import ProcessGroup
    from typing_extensions import Self

    from asyncckpt._saving.overlapping import GuardKind
    from asyncckpt._saving.reports import OnCommit, OnError
    from asyncckpt._saving.save import Save
    from asyncckpt._saving.saver import WhenBusy
    from asyncckpt.retention import Policy
    from asyncckpt.schedule import Schedule
    from asyncckpt.stores import Store


class Checkpointer(Finder):
    """Save the checkpoints of one run to a directory, in the background, and find them again.

    The checkpoints of one `filename` template form a series. Several Checkpointers can share a directory,
    each with a series of its own: none lists, restores or removes checkpoints of another series. A path reads
    any file.

    Args:
        directory: a local path, or a URL of any fsspec file system; created if it does not exist.
        store: a store to save to instead of a directory: a subclass of your own, or one of
            `asyncckpt.testing`.
        filename: template of the file names over `step` and the metrics:
            `step-{step:08d}-{val_loss:.3f}.pt`. A metric `val/loss` is `{val_loss}`.
        keep: which checkpoints of the series to keep after a commit: `BestK`, `LastN`, `EveryN`, `KeepAll`, a
            combination with `|`, or any object with a `keep` method. The newest is always kept.
        max_in_flight: snapshots held in host memory at once.
        when_busy: what `save` does if there are that many: "wait" until one is durable, "skip" the new one,
            or, with `max_in_flight` of at least 2, "replace" the one that is still queued.
        on_error: "raise" a failure from the next call, or a callable that is called with the `Save` and the
            error, on a background thread.
        on_commit: called with each `Checkpoint` once it is durable, on a background thread, before older
            ones are evicted.
        storage_options: options of the file system of a URL, as fsspec takes them; invalid for a local path.
        overwrite: whether a checkpoint of another step may be replaced by one of the same name.
        overlap: let `save` return after the freeze, and copy the parameters and the state of attached
            optimizers until their next step, which waits for the rest. Other tensors are copied before.
        guard: how a change is noticed that comes from anything but an attached optimizer, and would tear an
            overlapped snapshot: by the "version" counters of tensors, or also by a "checksum" of the memory.
        device_memory: bytes that overlapped saves may take on each device for clones.
        create: create the directory, and remove temporary files of crashed runs. With False, for programs
            that only read, nothing is changed before the first save, and a missing directory is an error.
        every: when a save is `due`: `Every`, `Budget`, a combination with `|`, or any object with a `due`
            method that takes an `asyncckpt.schedule.Progress`.
        on_signal: signals after which a save is `due`, such as `("SIGTERM", "SIGUSR1")`. They do not end the
            process until this is closed; see `StopOnSignal`.
        sharded: whether all ranks of the process group write each checkpoint together, as a folder in the
            format of `torch.distributed.checkpoint`; None to do so if the state holds sharded tensors. With
            True, tensors that all ranks have alike are divided among them. Otherwise one rank, rank 0 as a
            rule, writes the file, and `save` on the other ranks only waits for it in the background.
        process_group: of the ranks, as `torch.distributed` makes it; None for the default group.
        rank_timeout: seconds that ranks wait for each other before a save fails on all of them.
        grace: seconds that `close` waits for pending saves after the latest of these signals. Then it gives
            them up and raises BusyError. None waits without limit.

    Raises:
        StoreError: the directory cannot be created, read or written to.
        CheckpointNotFoundError: with `create=False`, there is no such directory.
        TypeError: neither or both of `directory` and `store` are given.
        ValueError: `storage_options` are given with a `store` or a local path.
        SignalError: a signal of `on_signal` is unknown or cannot be handled, or this is not the main thread.
    """

    def __init__(  # noqa: PLR0913 - each is one decision of the user's
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        store: Store | None = None,
        filename: str = "step-{step:08d}.pt",
        keep: Policy | None = None,
        max_in_flight: int = 1,
        when_busy: WhenBusy = "wait",
        on_error: OnError = "raise",
        on_commit: OnCommit | None = None,
        storage_options: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        overlap: bool = False,
        guard: GuardKind = "version",
        device_memory: int = DEVICE_MEMORY,
        create: bool = True,
        every: Schedule | None = None,
        on_signal: str | int | Iterable[str | int] = (),
        grace: float | None = None,
        sharded: bool | None = None,
        process_group: ProcessGroup | None = None,
        rank_timeout: float = 300.0,
    ) -> None:
        super().__init__(directory, store, filename, keep, storage_options)
        # With replicated tensors divided, a rank writes less than its optimizers own.
        self._overlapping = Overlapping(overlap, guard, device_memory, prepares=sharded is not True)
        self._saver = Saver(max_in_flight, when_busy, on_error, on_commit)
        self._due = Due(every, on_signal, grace, self._saver, process_group)
        series = f"{self.directory}/{filename}"
        self._ranked = Ranked(sharded, process_group, rank_timeout, series, self._saver, when_busy)
        self._closed = False
        self._writer = SeriesWriter(self._store, self._list, self._keep, overwrite=overwrite, prepared=create)
        self._saver.open()
        if create:
            get_engine().call(self._store.prepare)
        elif not get_engine().call(self._store.exists):
            raise CheckpointNotFoundError(f"there is no directory {self.directory}")
        get_engine().call(self._writer.look)
        self._due.open()

    def __repr__(self) -> str:
        state = "closed, " if self._closed else ""
        counts = f"{len(self._writer.own)} checkpoints, {self._saver.in_flight} in flight"
        return f"<Checkpointer {self.directory!r} {self._names.template!r}: {state}{counts}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except AsyncCkptError as failure:
            add_note(error, failure)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, trace
        self._closed = True
        try:
            # asyncio's own cancellation is not shielded: the task leaves at once, and a later failure is
            # raised by the next call or printed at exit.
            with CancelScope(shield=True):
                try:
                    await to_thread.run_sync(self._due.drain, None, abandon_on_cancel=True)
                finally:
                    self._due.close()  # not in a thread, where handlers cannot be set
                    await to_thread.run_sync(self._release)
            self._saver.raise_failures()
        except AsyncCkptError as failure:
            if error is None:
                raise
            add_note(error, failure)

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, float] | None = None,
        overlap: bool | None = None,
        rank_state: Any = None,
    ) -> Save:
        """Save `state` in the background; return once it may be changed again.

        With `overlap`, the parameters of attached optimizers and their state may be changed by their steps
        only until `Save.committed` is done, or after `fence`; if something else changes them, the save fails
        with `TornSnapshotError`.

        Args:
            step: the training step.
            state: anything torch.save takes. Stateful objects (with `state_dict` and `load_state_dict`) in
                its dicts, lists and tuples are saved as their state dicts.
            metrics: values by name; for the file name, retention and `best`.
            overlap: as in the constructor, which gives the default. Optimizers in the state are attached.
            rank_state: what a sharded checkpoint holds of each rank of its own, such as the state of random
                generators and data loaders; a dict of what `state` may hold.

        Raises:
            RankError: another rank cannot save, calls with another step, or does not call in time. No rank
                has started this save.
            SaveError: the state cannot be saved (the message gives the path of the entry), or an earlier save
                failed and its error was not raised yet. This save was not started.
            CheckpointExistsError: a checkpoint of another step already has this name.
            ValueError: a metric that `keep` or `filename` needs is missing.
            BusyError: called from a callback or a signal handler in which it would wait for itself.
        """
        began = time.perf_counter()
        step = checked_step(step, state)
        self._refuse_if_closed()
        numbers = checked_metrics(metrics)
        check_metrics(self._keep, numbers)
        name = self._names.name(step, numbers)
        description = Description(0, step, numbers, time.time(), filename=self._names.template)
        if len(description.encode()) > MAX_BYTES:
            raise ValueError(f"the metrics take more than {MAX_BYTES} bytes; put them into the state instead")
        shards = self._ranked.shards(state)
        if rank_state is not None and not shards:
            raise ValueError("rank_state goes with a sharded save, which sharded=True asks for")
        if shards:
            name = self._names.folder_name(step, numbers)
        request = SaveRequest(
            step,
            state,
            self._store,
            name,
            description,
            began,
            partial(self._writer.refuse_taken, name, step),
            partial(self._overlapping.of, overlap),
            self._writer,
            rank_state,
        )
        save = self._ranked.saves().save(request) if shards else self._save_file(request)
        if overlap is None:
            self._overlapping.note(save, began)
        if not save.skipped:
            self._writer.note_name(name, step)
            self._due.save_taken(step, began, save)
        return save

    def _save_file(self, request: SaveRequest) -> Save:
        """Save a file, unless another rank does."""
        target = FileTarget(request.store, request.name, request.description, request.series)

        def start() -> Save:
            request.refuse()
            objects: list[Any] = []
            collected = collect(request.state, objects)
            overlapped, reason = request.overlap(objects)
            save = self._saver.save(collected, target, request.step, request.began, overlapped)
            save.stats.reason = save.stats.reason or reason
            return save

        writer = self._ranked.writer()
        return start() if writer is None else writer.save(self._saver, request, target, start)

    def attach(self, *optimizers: Any) -> None:
        """Let overlapped saves defer the parameters and the state of optimizers until their next step.

        Optimizers that a state holds as objects are attached by `save`. They are not kept alive.

        Args:
            optimizers: subclasses of `torch.optim.Optimizer`, or what Lightning, Fabric and Accelerate wrap
                around one.

        Raises:
            TypeError: one is not a `torch.optim.Optimizer`, so that nothing tells when it changes parameters.
        """
        self._overlapping.attach(optimizers)

    def fence(self) -> None:
        """Wait until parameters and optimizer state may be changed by hand.

        Needed between an overlapped `save` and a change that is not a step of an attached optimizer. On a
        GPU, later operations of the current stream wait, and the host does not.
        """
        self._saver.fence()

    def _ranks_of(self, state: Any) -> Ranks:
        if not self._ranked.shards(state):
            return ALONE
        ranks = self._ranked.coordination()
        return Ranks(self._ranked.agree, ranks.rank, ranks.size)

    def _note_state(self, state: Any) -> None:
        self._overlapping.attach_found(stateful_objects(state))

    def due(self, step: int) -> bool:
        """Return whether a save is due: by `every`, after a failed save, or after a signal.

        Call it once a step. `save` begins a new interval at its call, whether the save was due or not; a save
        that raises or is skipped does not. A save that fails later is due again at the next step; after
        further failures in a row, 2, 4, 8 and so on steps later.

        The cost of a save, which `Budget` needs, is the stall of its call, and the time by which steps are
        longer until nothing is pending than the median step without a pending save. A step is the time from
        one call to the next. Waits at the fence of an overlapped save and the costs of failed saves are
        included. The mean of the last five saves counts.

        In a process group all ranks get the answers of rank 0, which measures its own saves: call it on every
        rank, with the same steps. Rank 0 publishes its answer in the store of the group when it can change,
        and at most about once a second. A signal on one rank makes a save due on all ranks, at the same step,
        about a second later.

        Args:
            step: the training step.

        Raises:
            ValueError: there is neither `every` nor `on_signal`.
            SaveError: this is closed; or in a process group, rank 0 was called with another step, or failed.
            BusyError: in a process group, rank 0 has not called it within the timeout of the group's store.
        """
        self._refuse_if_closed()
        return self._due.ask(checked_step(step, None))

    @property
    def signum(self) -> signal.Signals | None:
        """The latest signal of `on_signal` that made a save due, the same on all ranks; or None."""
        return self._due.signum

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise SaveError(f"the Checkpointer of {self.directory} is closed; make a new one")

    def reserve(self, state: Any, *, rank_state: Any = None) -> int:
        """Allocate host memory for snapshots of `state`, so that the first save is as fast as later ones.

        Call it after the first optimizer step: before that the optimizer has no state, and the memory has to
        grow at the first save.

        Returns:
            Size of one snapshot in bytes.

        Raises:
            SaveError: the state cannot be saved, or the Checkpointer is closed.
        """
        self._refuse_if_closed()
        if self._ranked.shards(state):
            return self._ranked.saves().reserve(state, rank_state)
        return self._saver.reserve(collect(state))

    def wait(self, timeout: float | None = None) -> None:
        """Wait until all pending saves are durable and their evictions are done.

        Raises:
            SaveError: for failures that were not raised before.
            BusyError: saves are still pending after `timeout` seconds; they continue.
        """
        self._saver.drain(timeout)
        self._saver.raise_failures()

    def close(self, timeout: float | None = None) -> None:
        """Wait as `wait` does, and refuse further saves."""
        self._closed = True
        try:
            self._due.drain(timeout)
            self._saver.raise_failures()
        finally:
            self._release()

    def _release(self) -> None:
        """Release the engine."""
        self._overlapping.close()
        self._due.close()
        self._saver.close()
        self._ranked.close()  # may wait for other ranks
