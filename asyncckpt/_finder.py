"""The reading half of a Checkpointer: list, load, restore and verify the checkpoints of a series."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, Union

from asyncckpt._loading.agreement import ALONE, Ranks
from asyncckpt._loading.catalog import Catalog, Series
from asyncckpt._loading.folder import FolderReplacedError, replaced_error
from asyncckpt._loading.reader import ATTEMPTS
from asyncckpt._loading.source import load_checkpoint, read_checkpoint, verify_checkpoint
from asyncckpt._loading.target import RestoreTarget
from asyncckpt._naming import NameTemplate
from asyncckpt._saving.engine import get_engine, wait_for_pending
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StoreError, warn_caller
from asyncckpt.retention import KeepAll, Policy, first_best, rank
from asyncckpt.stores import Store, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from asyncckpt._loading.catalog import Entry, Wanted
    from asyncckpt._loading.load import Loaded
    from asyncckpt._loading.unpickle import MapLocation
    from asyncckpt.types import Checkpoint

    class Found(Protocol):
        """What was loaded of a checkpoint."""

        @property
        def checkpoint(self) -> Checkpoint:
            """Which one it is."""

    F = TypeVar("F", bound=Found)

Which = Union[int, str, "os.PathLike[str]"]


class Finder:
    """Find the checkpoints of one series in one directory; the arguments are those of `Checkpointer`."""

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        store: Store | None,
        filename: str,
        keep: Policy | None,
        storage_options: Mapping[str, Any] | None,
    ) -> None:
        self._store = _opened(directory, store, storage_options)
        self.directory = os.fspath(directory or _without_slash(self._store.path_of("")))
        self._names = NameTemplate(filename)
        self._keep: Policy = KeepAll() if keep is None else keep
        if isinstance(self._keep, type) or not isinstance(self._keep, Policy):
            raise TypeError(
                f"keep must be a policy such as LastN(3), or an object with a method keep(); it is {keep!r}"
            )
        # Not a bound method, so that its holders do not keep this object alive.
        self._list = partial(_series, Catalog(self._store, self._names), self.directory, self._names)

    def checkpoints(self) -> list[Checkpoint]:
        """Return the committed checkpoints of the series, in order of commit."""
        return self._look().checkpoints

    def latest(self) -> Checkpoint | None:
        """Return the checkpoint committed last, if there is one."""
        return next(reversed(self.checkpoints()), None)

    def best(self, metric: str | None = None, mode: Literal["min", "max"] | None = None) -> Checkpoint | None:
        """Return the best checkpoint that has the metric, if there is one; NaN is the worst.

        Args:
            metric: name of the metric; by default that of the `BestK` in `keep`.
            mode: "min" or "max"; by default that of the same `BestK`, else "min".
        """
        return next(iter(rank(self.checkpoints(), *self._ranking(metric, mode))), None)

    def load(
        self,
        which: Which = "latest",
        *,
        map_location: MapLocation = "cpu",
        weights_only: bool = True,
        fallback: bool = False,
    ) -> Any:
        """Return the state of a checkpoint, with every checksum compared. Waits for pending saves first.

        Args:
            which: "latest", "best", a step, or a path.
            map_location: as in torch.load.
            weights_only: as in torch.load.
            fallback: if the latest or best checkpoint is damaged, warn and take the next whole one.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint.
            CorruptCheckpointError: the file is damaged; the message names the record.
            UnsafeStateError: `weights_only=True` refuses some entries; the message names them.
            UnloadableStateError: its objects cannot be built here, for example because a class is missing.
        """

        def load(store: Store, name: str) -> Loaded:
            image = get_engine().call(read_checkpoint, store, name)
            return load_checkpoint(image, map_location, weights_only=weights_only)

        return self._first(which, load, fallback=fallback).state

    def restore(  # noqa: PLR0913 - each is one decision of the user's
        self,
        state: Any,
        which: Which = "latest",
        *,
        missing_ok: bool = False,
        fallback: bool = False,
        weights_only: bool = True,
        strict: bool = True,
        map_keys: Callable[[str], str] | None = None,
        rank_state: Any = None,
    ) -> Checkpoint | None:
        """Restore a checkpoint into `state`, completely or not at all.

        Stateful objects get `load_state_dict`, tensors are changed in place, other values are replaced. A
        checkpoint of many ranks can be restored on another number of them, and on one: each gets its part.

        Args:
            state: a state as given to `save`.
            which: "latest", "best", a step, or a path.
            missing_ok: return None if there is no such checkpoint; a warning names other checkpoints in the
                directory.
            fallback: if the latest or best checkpoint is damaged, warn and take the next whole one.
            weights_only: as in torch.load.
            strict: require the same entries on both sides. With False, entries of one side only are skipped,
                and a warning lists them.
            map_keys: maps each key of saved module state dicts and dicts of tensors before they are matched:
                `lambda key: key.replace("_orig_mod.", "")`.
            rank_state: a state of this rank alone, as given to `save`. With another number of ranks than at
                the save it is left as it is, with a warning.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint.
            CorruptCheckpointError: the file is damaged; the message names the record.
            UnsafeStateError: `weights_only=True` refuses some entries; the message names them.
            UnloadableStateError: its objects cannot be built here, for example because a class is missing.
            StateMismatchError: the message lists every entry that does not fit; nothing was changed.
            PartialRestoreError: undoing a failed restore failed; the message lists the inconsistent entries.
        """
        self._note_state(state)
        call = get_engine().call
        ranks = self._ranks_of(state)
        target = RestoreTarget(state, call, rank_state, ranks, weights_only, strict, map_keys)
        try:
            found = self._first(which, target.prepare, fallback=fallback, ranks=ranks)
        except CheckpointNotFoundError as error:
            if not missing_ok:
                raise
            if self._look().others:
                warn_caller(f"nothing is restored: {error}")
            return None
        found.finish()
        return found.checkpoint

    def _ranks_of(self, state: Any) -> Ranks:  # noqa: ARG002 - of Checkpointers of many ranks
        """Return the ranks that restore a state together."""
        return ALONE

    def _note_state(self, state: Any) -> None:
        """Take notice of a live state that is restored, and will be saved."""

    def verify(self, which: Which = "latest") -> None:
        """Read every byte of a checkpoint and compare every checksum.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint.
            CorruptCheckpointError: the file is damaged; the message names the record.
        """
        wait_for_pending()
        wanted = self._wanted(which)
        if wanted is None:
            store, name = locate(os.fspath(which), self._store)  # type: ignore[arg-type] # it is a path
        else:
            store, name = self._store, self._look().find(wanted)[0].file.name
        get_engine().call(verify_checkpoint, store, name)

    def _look(self) -> Series:
        return get_engine().call(self._list)

    def _first(
        self,
        which: Which,
        load: Callable[[Store, str], F],
        *,
        fallback: bool,
        ranks: Ranks = ALONE,
    ) -> F:
        """Return what `load` returns for the first whole checkpoint that answers to `which`."""
        wait_for_pending()
        wanted = self._wanted(which)
        if fallback and (wanted is None or isinstance(wanted, int)):
            raise ValueError(f'fallback=True goes with "latest" and "best", not with {which!r}')
        if wanted is None:
            store, name = locate(os.fspath(which), self._store)  # type: ignore[arg-type] # it is a path
            return first_whole(load, store, name)
        for _ in range(ATTEMPTS):
            found = ranks.find(lambda: self._look().find(wanted), lambda found: _name_of(found[0]))
            loaded = self._load_first(found, load, ranks, fallback=fallback, latest=wanted == "latest")
            if loaded is not None:
                return loaded
        msg = f"checkpoints of {self.directory} were replaced or removed in each of {ATTEMPTS} attempts"
        raise StoreError(errno.EAGAIN, msg, self.directory)

    def _load_first(
        self,
        found: Sequence[Entry],
        load: Callable[[Store, str], F],
        ranks: Ranks,
        *,
        fallback: bool,
        latest: bool,
    ) -> F | None:
        """Load the first whole checkpoint; return None if the directory has to be listed again."""
        errors: list[CorruptCheckpointError | StoreError] = []
        for entry in found if fallback else found[:1]:
            if errors:  # another rank may have listed others
                ranks.agree(f"restore {_name_of(entry)} instead of a damaged one", (), None)
            if entry.error is not None:
                errors.append(entry.error)
                continue
            try:
                loaded = load(self._store, entry.file.name)
            except (CorruptCheckpointError, StoreError) as error:
                errors.append(error)
                continue
            except CheckpointNotFoundError:  # evicted since it was listed
                return None
            if not latest and loaded.checkpoint != entry.checkpoint:  # replaced since then
                return None
            if errors:
                problems = "; ".join(map(str, errors))
                warn_caller(
                    f"{loaded.checkpoint.path} is used, because those before it are damaged: {problems}"
                )
            while errors:  # their tracebacks hold this frame, which holds the state
                errors.pop().__traceback__ = None
            return loaded
        if fallback:
            ranks.agree("restore nothing: all checkpoints are damaged", (), None)
        left = [entry.file.name for entry in found[len(errors) :] if entry.error is None]
        raise _with_hint(errors[0], left) from errors[0].__cause__

    def _wanted(self, which: Which) -> Wanted | None:
        """Return the wanted checkpoints of the series; None for a path."""
        if which == "latest":
            return "latest"
        if which == "best":
            return self._ranking(None, None)
        if isinstance(which, int) and not isinstance(which, bool):
            return which
        if isinstance(which, (str, os.PathLike)):
            return None
        raise TypeError(f'which must be "latest", "best", a step or a path, not {which!r}')

    def _ranking(
        self, metric: str | None, mode: Literal["min", "max"] | None
    ) -> tuple[str, Literal["min", "max"]]:
        """Return metric and mode for "best"; defaults are those of the `BestK` in `keep`."""
        policy = first_best(self._keep)
        if metric is None:
            if policy is None:
                raise ValueError(
                    'best() needs a metric, such as best("val_loss"), as keep has no BestK to take it from'
                )
            metric = policy.metric
        if mode is None:
            mode = policy.mode if policy is not None and policy.metric == metric else "min"
        return metric, mode


def _with_hint(error: CorruptCheckpointError | StoreError, left: Sequence[str]) -> Exception:
    """Return the error for a damaged checkpoint, with the name of another one if any is left."""
    if not left or not isinstance(error, CorruptCheckpointError):
        return error
    return CorruptCheckpointError(f"{error}; fallback=True takes the next whole one, maybe {left[0]}")


def _name_of(entry: Entry) -> str:
    return f"{entry.file.name} ({entry.checkpoint.sequence if entry.checkpoint else 'damaged'})"


async def _series(catalog: Catalog, directory: str, names: NameTemplate) -> Series:
    return Series(directory, names, await catalog.entries())


def locate(
    path: str | os.PathLike[str], home: Store, options: Mapping[str, Any] | None = None
) -> tuple[Store, str]:
    """Return store and file name of a path; bare names and paths in the directory of `home` are in `home`."""
    given = os.fspath(path).rstrip("/")  # as completion by a shell puts them behind folders
    directory, _, name = given.rpartition("/")
    if "/" not in given or given == home.path_of(name):
        return home, name
    return open_store(directory or "/", options), name


def first_whole(load: Callable[[Store, str], F], store: Store, name: str) -> F:
    """Return what `load` returns for a checkpoint, once it was not replaced meanwhile."""
    for _ in range(ATTEMPTS):
        with suppress(FolderReplacedError):
            return load(store, name)
    raise replaced_error(store.path_of(name))


def _opened(
    directory: str | os.PathLike[str] | None, store: Store | None, options: Mapping[str, Any] | None
) -> Store:
    if (directory is None) == (store is None):
        given = "neither" if store is None else "both"
        raise TypeError(f"give a directory or a store: {given} of them were given")
    if directory is not None:
        return open_store(directory, options)
    if not isinstance(store, Store):
        raise TypeError(f"store must be an asyncckpt.stores.Store, not {store!r}; a path is a directory")
    if options:
        raise ValueError(
            f"storage_options go with a URL, not with a store; create the store with {sorted(options)}"
        )
    return store


def _without_slash(path: str) -> str:
    return path if path.endswith("://") else path.rstrip("/") or "/"
