"""From a file in a store to a state."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from asyncckpt._caller_warning import warn_caller
from asyncckpt._loading.load_failures import load_failure
from asyncckpt._loading.reader import read_image, verify
from asyncckpt._loading.series import damage
from asyncckpt._loading.unpickle import LoadedMemory, PayloadFile, load_file
from asyncckpt._saving.engine import get_engine
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StoreError
from asyncckpt.layout.description import Description, checkpoint_of
from asyncckpt.layout.torch_zip import DESCRIPTION
from asyncckpt.stores import open_store
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from asyncckpt._loading.reader import Image
    from asyncckpt._loading.series import Choice, Series, View, Wanted
    from asyncckpt._loading.unpickle import MapLocation
    from asyncckpt.stores.base import OpenFile, Store

T = TypeVar("T")

# So often a file or a directory is looked at anew that others change meanwhile.
_ATTEMPTS = 100


@dataclass(frozen=True, slots=True)
class Loaded:
    """A state, and the checkpoint that it was read from."""

    state: Any
    checkpoint: Checkpoint


def load_state(
    store: Store, name: str, map_location: MapLocation = "cpu", *, weights_only: bool | None
) -> Loaded:
    """Read a file in parallel, check it, and build its state.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CorruptCheckpointError: names the damaged record.
        UnsafeStateError: `weights_only` does not allow what is in it; names the entries.
        UnloadableStateError: its objects cannot be rebuilt here.
    """
    image = get_engine().call(read_file, read_image, store, name)
    record = image.record(DESCRIPTION)
    description = None if record is None else Description.decode(record)
    nbytes = image.nbytes
    state = state_of(image, map_location, weights_only=weights_only)
    if description is None:
        return Loaded(state, Checkpoint(None, image.path, {}, nbytes))
    return Loaded(state, checkpoint_of(image.path, description, nbytes))


def load_wanted(
    series: Series, wanted: Wanted, map_location: MapLocation, *, weights_only: bool | None, fallback: bool
) -> Loaded:
    """Load the checkpoint of a series that answers to `wanted`.

    Args:
        series: where to look.
        wanted: which one.
        map_location: as in torch.load.
        weights_only: as in torch.load.
        fallback: take the next one where one is damaged or cannot be read, and warn.

    Raises:
        CheckpointNotFoundError: there is none.
        CorruptCheckpointError: it is damaged, or all are.
        StoreError: it cannot be read.
    """
    for _ in range(_ATTEMPTS):
        view = get_engine().call(series.look)
        loaded = _load_first(view, wanted, series.store, map_location, weights_only, fallback)
        if loaded is not None:
            return loaded
    raise StoreError(
        errno.EAGAIN,
        f"checkpoints of {view.directory} were replaced or removed in each of {_ATTEMPTS} attempts",
        view.directory,
    )


def _load_first(  # noqa: PLR0913, PLR0917 - what `load_wanted` is given
    view: View,
    wanted: Wanted,
    store: Store,
    map_location: MapLocation,
    weights_only: bool | None,  # noqa: FBT001
    fallback: bool,  # noqa: FBT001
) -> Loaded | None:
    """Load the first that is whole; None if the directory has to be listed again."""
    choice = view.choose(wanted)
    errors: list[Exception] = [damage(view.directory, entry) for entry in choice.damaged]
    for index, entry in enumerate(choice.entries):
        if errors and not fallback:
            raise _damaged(errors[0], choice, index)
        try:
            loaded = load_state(store, entry.file.name, map_location, weights_only=weights_only)
        except (CorruptCheckpointError, StoreError) as error:
            errors.append(error)
        except CheckpointNotFoundError:  # evicted since it was listed
            return None
        else:
            if wanted != "latest" and loaded.checkpoint != entry.checkpoint:  # replaced since then
                return None
            if errors:
                problems = "; ".join(map(str, errors))
                warn_caller(
                    f"{loaded.checkpoint.path} is used, since what comes before it is damaged: {problems}"
                )
            return loaded
    raise _damaged(errors[0], choice, len(choice.entries))


def _damaged(error: Exception, choice: Choice, used: int) -> Exception:
    left = choice.entries[used:]
    if not left or not isinstance(error, CorruptCheckpointError):
        return error
    hint = f"fallback=True takes the next one that is whole, maybe {left[0].file.name}"
    raised = CorruptCheckpointError(f"{error}; {hint}")
    raised.__cause__ = error
    return raised


def locate(
    path: str | os.PathLike[str], home: Store, options: Mapping[str, Any] | None = None
) -> tuple[Store, str]:
    """Return the store and the name of a path; a bare name is one of `home`, and so is what `home` lists."""
    given = os.fspath(path)
    directory, _, name = given.rpartition("/")
    if "/" not in given or given == home.path_of(name):
        return home, name
    return open_store(directory or "/", options), name


async def verify_file(store: Store, name: str, progress: Callable[[int], None] | None = None) -> None:
    """Read every byte of a file and compare every checksum.

    Args:
        store: where it is.
        name: which file.
        progress: called with how many more bytes were checked, on the event loop's thread.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CorruptCheckpointError: names the damaged record.
    """
    await read_file(partial(verify, progress=progress), store, name)


async def read_file(read: Callable[[OpenFile], Awaitable[T]], store: Store, name: str) -> T:
    """Open a file for `read`; errors name it.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CorruptCheckpointError: what `read` raises, with the path of the file.
    """
    where = store.path_of(name)
    try:
        return await _read_whole(read, store, name)
    except CheckpointNotFoundError:
        raise
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"there is no checkpoint {where}") from error
    except CorruptCheckpointError as error:
        raise error if where in str(error) else CorruptCheckpointError(f"{where}: {error}") from error


async def _read_whole(read: Callable[[OpenFile], Awaitable[T]], store: Store, name: str) -> T:
    """Open a file for `read`, again if it turns out to have been replaced meanwhile."""
    for _ in range(_ATTEMPTS):
        try:
            async with store.open(name) as file:
                return await read(file)
        except CheckpointNotFoundError:  # `read` has told already
            raise
        except FileNotFoundError:
            await store.stat(name)  # raises if it is gone rather than replaced
    raise StoreError(
        errno.EAGAIN,
        f"{store.path_of(name)} was replaced in each of {_ATTEMPTS} attempts to read it",
        store.path_of(name),
    )


def state_of(image: Image, map_location: MapLocation, *, weights_only: bool | None) -> Any:
    """Build the state of a file that is in memory; its storages keep that memory.

    Raises:
        CorruptCheckpointError: its pickle makes no sense.
        UnsafeStateError: `weights_only` does not allow what is in it; names the entries.
        UnloadableStateError: its objects cannot be rebuilt here.
    """
    directory, view = image.directory, image.mapping.view
    with LoadedMemory(image.mapping) as memory:
        payloads = {
            start: memory.storage(start, stop) for _, start, stop in directory.storages() if stop > start
        }
        file = PayloadFile(image.nbytes, lambda at, length: bytes(view[at : at + length]), payloads)
        try:
            return load_file(file, map_location, weights_only=weights_only)
        except Exception as error:
            if file.misplaced:
                raise
            data_pickle = image.record(f"{directory.folder}/data.pkl") or b""
            sizes = [storage.nbytes() for storage in payloads.values()]
            failure = load_failure(error, image.path, data_pickle, sizes)
            if failure is None:
                raise
            raise failure from error
