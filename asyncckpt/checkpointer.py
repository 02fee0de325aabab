"""The face for a training loop: save the checkpoints of a series, evict old ones, and find them again."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio import CancelScope, to_thread

from asyncckpt._loading.finder import Finder
from asyncckpt._loading.stateful import collect
from asyncckpt._saving.arguments import checked_metrics, checked_step
from asyncckpt._saving.engine import get_engine
from asyncckpt._saving.ranks import claim
from asyncckpt._saving.saver import Saver
from asyncckpt._saving.targets import FileTarget
from asyncckpt.errors import (
    AsyncCkptError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    SaveError,
    add_note,
)
from asyncckpt.layout.description import MAX_BYTES, Description
from asyncckpt.retention import check_metrics, evict

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from typing_extensions import Self

    from asyncckpt._saving.save import Save
    from asyncckpt._saving.saver import OnCommit, OnError, WhenBusy
    from asyncckpt.retention import Policy
    from asyncckpt.stores import Store
    from asyncckpt.types import Checkpoint

logger = logging.getLogger("asyncckpt")


class Checkpointer(Finder):
    """Saves the checkpoints of one run into a directory, in the background, and finds them again.

    The checkpoints of one `filename` are a series. Several Checkpointers may have a series each in one
    directory: none lists, restores or removes what is of another one. A path reads any file.

    Args:
        directory: a local path, or the URL of one of any fsspec file system; made if it is not there.
        store: a store to save into instead of a directory: one of your own, or of `asyncckpt.testing`.
        filename: template of the file names over `step` and the metrics, see `NameTemplate`.
        keep: which checkpoints of the series stay after a commit: `BestK`, `LastN`, `EveryN`, `KeepAll`,
            several of them combined with `|`, or any object with their `keep` method. The newest always
            stays.
        max_in_flight: snapshots held in host memory at once.
        when_busy: what `save` does when there are that many: "wait" for one to be durable, "skip" the new
            one, or, from `max_in_flight=2`, "replace" the one that is still queued.
        on_error: "raise" what failed from the next call, or a callable given the `Save` and its error, on a
            background thread.
        on_commit: called with each `Checkpoint` once it is durable, on a background thread, before older
            ones are evicted.
        storage_options: for the file system behind a URL, as fsspec takes them; a local path takes none.
        overwrite: whether a checkpoint of another step may be replaced by one of the same name.
        create: make the directory and remove what dead writers left there. With False, which is for programs
            that only read, nothing is changed before the first save, and a directory that is not there is an
            error.

    Raises:
        StoreError: the directory cannot be made, read or written to.
        CheckpointNotFoundError: with `create=False`, there is no such directory.
        TypeError: neither or both of `directory` and `store` are given.
        ValueError: `storage_options` are given with a `store` or a local path.
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
        create: bool = True,
    ) -> None:
        super().__init__(directory, store, filename, keep, storage_options)
        self._overwrite = overwrite
        self._saver = Saver(max_in_flight, when_busy, on_error, on_commit)
        self._closed = False
        self._unclaim: Callable[[], object] | None = None
        self._prepared = create
        if create:
            get_engine().call(self._store.prepare)
        elif not get_engine().call(self._store.exists):
            raise CheckpointNotFoundError(f"there is no directory {self.directory}")
        get_engine().call(self._series.look)
        found = get_engine().call(self._series.all_checkpoints)
        self._sequence = max((c.sequence for c in found), default=0)
        self._steps = {_name_of(c): c.step for c in found}

    def __repr__(self) -> str:
        state = "closed, " if self._closed else ""
        counts = f"{self._series.count} checkpoints, {self._saver.in_flight} in flight"
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
            # A task that asyncio itself cancels is not shielded: it leaves at once, and what fails then is
            # told by the next call, or at exit.
            with CancelScope(shield=True):
                await to_thread.run_sync(self._saver.drain, abandon_on_cancel=True)
                await to_thread.run_sync(self._unclaim_if_done)
            self._saver.raise_failures()
        except AsyncCkptError as failure:
            if error is None:
                raise
            add_note(error, failure)

    def save(self, step: int, state: Any, *, metrics: Mapping[str, float] | None = None) -> Save:
        """Save `state` in the background; returns as soon as it may change again.

        Args:
            step: the training step.
            state: anything torch.save takes. Stateful objects (with `state_dict` and `load_state_dict`) in
                its dicts, lists and tuples are saved as their state dicts.
            metrics: by name; for the file name, for retention, and for `best`.

        Raises:
            SaveError: the state cannot be saved (the message gives the path of the entry), or an earlier save
                failed and nobody has been told. Nothing was taken.
            CheckpointExistsError: a checkpoint of another step has the name of this one.
            ValueError: `keep` ranks by a metric that is not among `metrics`, or `filename` needs one.
            BusyError: called from a callback or a signal handler, it would wait for itself.
        """
        began = time.perf_counter()
        step = checked_step(step, state)
        if self._closed:
            raise SaveError(f"the Checkpointer of {self.directory} is closed; make a new one")
        numbers = checked_metrics(metrics)
        check_metrics(self._keep, numbers)
        name = self._names.name(step, numbers)
        if self._unclaim is None:
            self._unclaim = claim(self.directory, self._names.template)
        self._refuse_taken(name, step)
        description = Description(0, step, numbers, time.time(), filename=self._names.template)
        if len(description.encode()) > MAX_BYTES:
            raise ValueError(f"the metrics take more than {MAX_BYTES} bytes; put them into the state instead")
        target = FileTarget(self._store, name, partial(self._describe, name, description), self._evict)
        save = self._saver.save(collect(state), target, step, began)
        if not save.skipped:
            self._steps[name] = step
        return save

    def reserve(self, state: Any) -> int:
        """Make host memory for snapshots of `state` ready, so that the first save costs what later ones do.

        An optimizer has no state before its first step: reserve after it, or the memory grows once.

        Returns:
            Bytes of one snapshot.
        """
        return self._saver.reserve(collect(state))

    def wait(self, timeout: float | None = None) -> None:
        """Wait until all pending saves are durable and evictions done.

        Raises:
            SaveError: what failed since the last time.
            BusyError: the time, in seconds, was too short; the saves go on.
        """
        self._saver.drain(timeout)
        self._saver.raise_failures()

    def close(self, timeout: float | None = None) -> None:
        """Wait as `wait` does, and take no more saves."""
        self._closed = True
        try:
            self.wait(timeout)
        finally:
            self._unclaim_if_done()

    def _unclaim_if_done(self) -> None:
        """Let another rank have the series, once nothing of it is pending here."""
        if self._unclaim is not None and not self._saver.pending:
            self._unclaim()

    def _refuse_taken(self, name: str, step: int) -> None:
        """Raise if another step has this name, by what is known without asking the store."""
        there = self._steps.get(name, step)
        if self._overwrite or there == step:
            return
        if get_engine().pending(self._store.path_of(name)):
            raise _exists(self._store.path_of(name), there, step)
        # That save may have failed, or its file may be gone: only now it is worth a look.
        get_engine().call(self._refuse_other_step, name, step)

    async def _refuse_other_step(self, name: str, step: int) -> None:
        """Raise if a file of another step has this name, whoever wrote it."""
        try:
            await self._store.stat(name)
        except FileNotFoundError:
            return
        path = self._store.path_of(name)
        there = next((c for c in await self._series.all_checkpoints() if c.path == path), None)
        if there is None or there.step != step:
            raise _exists(path, there.step if there else None, step)

    async def _describe(self, name: str, description: Description) -> Description:
        """Give a save its place in the order of commits, behind whatever others have committed here."""
        if not self._prepared:
            await self._store.prepare()
            self._prepared = True
        if not self._overwrite and description.step is not None:
            await self._refuse_other_step(name, description.step)
        last = max((c.sequence for c in await self._series.all_checkpoints()), default=0)
        self._sequence = max(self._sequence, last) + 1
        return replace(description, sequence=self._sequence)

    async def _evict(self, committed: Checkpoint) -> None:
        for checkpoint in evict(self._keep, (await self._series.look()).checkpoints):
            if checkpoint.path != committed.path:
                await self._store.remove(_name_of(checkpoint))
                logger.debug("%s is evicted", checkpoint.path)
                self._steps.pop(_name_of(checkpoint), None)
                self._series.count -= 1


def _name_of(checkpoint: Checkpoint) -> str:
    return checkpoint.path.rpartition("/")[2]


def _exists(path: str, there: int | None, step: int) -> CheckpointExistsError:
    if there is None:
        return CheckpointExistsError(
            f"{path} is a file that asyncckpt did not write, or is damaged, and would be replaced by step"
            f" {step}; move it away, describe it with `asyncckpt adopt`, or set overwrite=True"
        )
    msg = f"{path} is the checkpoint of step {there} and would be replaced by step {step}"
    return CheckpointExistsError(f"{msg}; put {{step}} into filename, or set overwrite=True")
