"""The face for a training loop: save, list, load and restore the checkpoints of one directory."""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Union

from anyio import to_thread

from asyncckpt.apply import apply_state
from asyncckpt.catalog import Catalog, describe
from asyncckpt.engine import get_engine, wait_for_pending
from asyncckpt.errors import (
    AsyncCkptError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    SaveError,
    add_note,
)
from asyncckpt.layout.description import MAX_BYTES, Description
from asyncckpt.naming import NameTemplate
from asyncckpt.restore import load_state, locate, verify_file
from asyncckpt.retention import KeepAll, Policy, evict, first_best, rank
from asyncckpt.saver import Saver
from asyncckpt.stateful import collect
from asyncckpt.stores import open_store
from asyncckpt.targets import FileTarget

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self

    from asyncckpt.save import Save
    from asyncckpt.saver import OnError, WhenBusy
    from asyncckpt.stores.base import Store
    from asyncckpt.types import Checkpoint
    from asyncckpt.unpickle import MapLocation

Which = Union[int, str, "os.PathLike[str]"]


class Checkpointer:
    """Saves the checkpoints of one run into a directory, in the background, and finds them again.

    Args:
        directory: a local path, or the URL of one of any fsspec file system; made if it is not there.
        filename: template of the file names over `step` and the metrics, see `NameTemplate`.
        keep: which checkpoints stay after a commit: `BestK`, `LastN`, `EveryN`, `KeepAll`, several of them
            combined with `|`, or any object with their `keep` method. The newest always stays. Only files
            that carry asyncckpt's description and match `filename` are ever removed.
        max_in_flight: snapshots held in host memory at once.
        when_busy: what `save` does when there are that many: "wait" for one to be durable, "skip" the new
            one, or, from `max_in_flight=2`, "replace" the one that is still queued.
        on_error: "raise" what failed from the next call, or a callable given the `Save` and its error, on a
            background thread.
        storage_options: for the file system behind a URL, as fsspec takes them; a local path takes none.
        overwrite: whether a checkpoint of another step may be replaced by one of the same name.

    Raises:
        StoreError: the directory cannot be made, read or written to.
    """

    def __init__(  # noqa: PLR0913 - each is one decision of the user's
        self,
        directory: str | os.PathLike[str],
        *,
        filename: str = "step-{step:08d}.pt",
        keep: Policy | None = None,
        max_in_flight: int = 1,
        when_busy: WhenBusy = "wait",
        on_error: OnError = "raise",
        storage_options: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.directory = os.fspath(directory)
        self._names = NameTemplate(filename)
        self._keep: Policy = KeepAll() if keep is None else keep
        if isinstance(self._keep, type) or not isinstance(self._keep, Policy):
            raise TypeError(
                f"keep must be a policy such as LastN(3), or have its method keep(); it is {keep!r}"
            )
        self._overwrite = overwrite
        self._saver = Saver(max_in_flight, when_busy, on_error)
        self._closed = False
        self._store: Store = open_store(directory, storage_options)
        self._catalog = Catalog(self._store)
        get_engine().call(self._store.prepare)
        found = self.checkpoints()
        self._sequence = max((c.sequence for c in found), default=0)
        self._steps = {_name_of(c): c.step for c in found}

    def __repr__(self) -> str:
        return f"<Checkpointer {self.directory!r} {self._saver!r} {get_engine().arena!r}>"

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
        await to_thread.run_sync(self.__exit__, kind, error, trace)

    def save(self, step: int, state: Any, *, metrics: Mapping[str, float] | None = None) -> Save:
        """Save `state` in the background; returns as soon as it may change again.

        Args:
            step: the training step.
            state: anything torch.save takes. Stateful objects (with `state_dict` and `load_state_dict`) in
                its dicts and lists are saved as their state dicts.
            metrics: by name; for the file name, for retention, and for `best`.

        Raises:
            SaveError: the state cannot be saved (the message gives the path of the entry), or an earlier save
                failed and nobody has been told. Nothing was taken.
            CheckpointExistsError: a checkpoint of another step has the name of this one.
        """
        began = time.perf_counter()
        step = _checked_step(step, state)
        if self._closed:
            raise SaveError(f"the Checkpointer of {self.directory} is closed; make a new one")
        numbers = _checked_metrics(metrics)
        name = self._names.name(step, numbers)
        self._refuse_taken(name, step)
        description = Description(0, step, numbers, time.time())
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
        self.wait(timeout)

    def checkpoints(self) -> list[Checkpoint]:
        """Return the committed checkpoints of the directory, in order of commit."""
        return get_engine().call(self._catalog.checkpoints)

    def latest(self) -> Checkpoint | None:
        """Return the checkpoint committed last, if there is one."""
        return next(reversed(self.checkpoints()), None)

    def best(self, metric: str | None = None, mode: Literal["min", "max"] | None = None) -> Checkpoint | None:
        """Return the best checkpoint that has the metric, if there is one; NaN is the worst.

        Args:
            metric: its name; if not given, that of the `BestK` in `keep`.
            mode: "min" or "max"; if not given, that of the same `BestK`, else "min".
        """
        policy = first_best(self._keep)
        if metric is None:
            if policy is None:
                raise ValueError(
                    'best() needs a metric, such as best("val_loss"), as keep has no BestK to take it from'
                )
            metric = policy.metric
        if mode is None:
            mode = policy.mode if policy is not None and policy.metric == metric else "min"
        return next(iter(rank(self.checkpoints(), metric, mode)), None)

    def load(
        self, which: Which = "latest", *, map_location: MapLocation = "cpu", weights_only: bool = True
    ) -> Any:
        """Return the state of a checkpoint, every byte of it checked. Waits for pending saves first.

        Args:
            which: "latest", "best", a step, or a path.
            map_location: as in torch.load.
            weights_only: as in torch.load.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint.
            CorruptCheckpointError: names the damaged record.
        """
        store, name = self._locate(which)
        return load_state(get_engine(), store, name, map_location, weights_only=weights_only)

    def restore(  # noqa: PLR0913 - each is one decision of the user's
        self,
        state: Any,
        which: Which = "latest",
        *,
        missing_ok: bool = False,
        weights_only: bool = True,
        strict: bool = True,
        map_keys: Callable[[str], str] | None = None,
    ) -> Checkpoint | None:
        """Put a checkpoint into `state`, all of it or nothing.

        Where there is a `load_state_dict` it is called, tensors are changed in place, values replaced.

        Args:
            state: what is given to `save`.
            which: "latest", "best", a step, or a path.
            missing_ok: return None and leave `state` alone where there is no such checkpoint.
            weights_only: as in torch.load.
            strict: whether both must have the same entries. If not, those of only one side are left out, and
                a warning lists them.
            map_keys: applied to each key of the saved state dicts of modules and of dicts of tensors, before
                they are matched: `lambda key: key.replace("_orig_mod.", "")`.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint.
            CorruptCheckpointError: names the damaged record; nothing was changed.
            StateMismatchError: lists every entry that does not fit; nothing was changed.
            PartialRestoreError: what failed could not be put back; the message lists it.
        """
        try:
            store, name = self._locate(which)
            saved = load_state(get_engine(), store, name, "cpu", weights_only=weights_only)
        except CheckpointNotFoundError:
            if missing_ok:
                return None
            raise
        apply_state(state, saved, store.path_of(name), strict=strict, map_keys=map_keys)
        return get_engine().call(describe, store, name)

    def verify(self, which: Which = "latest") -> None:
        """Read every byte of a checkpoint and compare every checksum.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint.
            CorruptCheckpointError: names the damaged record.
        """
        store, name = self._locate(which)
        get_engine().call(verify_file, store, name)

    def _locate(self, which: Which) -> tuple[Store, str]:
        """Find the store and the name of a checkpoint that is asked for."""
        wait_for_pending()
        if which == "latest":
            found = self.latest()
        elif which == "best":
            found = self.best()
        elif isinstance(which, int) and not isinstance(which, bool):
            found = next((c for c in reversed(self.checkpoints()) if c.step == which), None)
        elif isinstance(which, (str, os.PathLike)):
            return locate(which, self._store)
        else:
            raise TypeError(f'which must be "latest", "best", a step or a path, not {which!r}')
        if found is None:
            what = f"step {which}" if isinstance(which, int) else f"{which} checkpoint"
            raise CheckpointNotFoundError(f"{self.directory} holds no {what}")
        return self._store, _name_of(found)

    def _refuse_taken(self, name: str, step: int) -> None:
        """Raise if another step has this name, by what is known without asking the store."""
        if self._overwrite or self._steps.get(name, step) == step:
            return
        if get_engine().pending(self._store.path_of(name)):
            raise _exists(self._store.path_of(name), self._steps[name], step)
        # That save may have failed, or its file may be gone: only now it is worth a look.
        get_engine().call(self._refuse_other_step, name, step)

    async def _refuse_other_step(self, name: str, step: int) -> None:
        """Raise if a file of another step has this name, whoever wrote it."""
        try:
            await self._store.stat(name)
        except FileNotFoundError:
            return
        path = self._store.path_of(name)
        there = next((c for c in await self._catalog.checkpoints() if c.path == path), None)
        if there is None or there.step != step:
            raise _exists(path, there.step if there else None, step)

    async def _describe(self, name: str, description: Description) -> Description:
        """Give a save its place in the order of commits, behind whatever others have committed here."""
        if not self._overwrite and description.step is not None:
            await self._refuse_other_step(name, description.step)
        last = max((c.sequence for c in await self._catalog.checkpoints()), default=0)
        self._sequence = max(self._sequence, last) + 1
        return replace(description, sequence=self._sequence)

    async def _evict(self, committed: Checkpoint) -> None:
        if isinstance(self._keep, KeepAll):
            return
        listed = [c for c in await self._catalog.checkpoints() if self._names.matches(_name_of(c))]
        for checkpoint in evict(self._keep, listed):
            if checkpoint.path != committed.path:
                await self._store.remove(_name_of(checkpoint))
                self._steps.pop(_name_of(checkpoint), None)


def _name_of(checkpoint: Checkpoint) -> str:
    return checkpoint.path.rpartition("/")[2]


def _exists(path: str, there: int | None, step: int) -> CheckpointExistsError:
    what = "a file that is no checkpoint of asyncckpt" if there is None else f"the checkpoint of step {there}"
    msg = f"{path} is {what} and would be replaced by step {step}"
    return CheckpointExistsError(f"{msg}; put {{step}} into filename, or set overwrite=True")


def _checked_step(step: Any, state: Any) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        hint = "; the order is save(step, state)" if isinstance(state, int) else ""
        raise TypeError(f"step must be an int, not {type(step).__name__}{hint}") from None
    if isinstance(step, bool):
        raise TypeError("step must be an int, not bool")
    return number


def _checked_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    numbers: dict[str, float] = {}
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be a mapping of names to numbers, not {metrics!r}")
    for name, value in (metrics or {}).items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metric {name!r} must be a number, not {value!r}") from error
    return numbers
