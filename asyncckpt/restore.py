"""From a file in a store to a state."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.load_failures import load_failure
from asyncckpt.reader import read_image, verify
from asyncckpt.stores import open_store
from asyncckpt.unpickle import LoadedMemory, PayloadFile, load_file

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asyncckpt.engine import Engine
    from asyncckpt.reader import Image
    from asyncckpt.stores.base import Store, StoredFile
    from asyncckpt.unpickle import MapLocation

T = TypeVar("T")


def load_state(
    engine: Engine, store: Store, name: str, map_location: MapLocation, *, weights_only: bool | None
) -> Any:
    """Read a file in parallel, check it, and return its state.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CorruptCheckpointError: names the damaged record.
        UnsafeStateError: `weights_only` does not allow what is in it; names the entries.
        UnloadableStateError: its objects cannot be rebuilt here.
    """
    image = engine.call(_read, store, name)
    return state_of(image, store.path_of(name), map_location, weights_only=weights_only)


def locate(path: str | os.PathLike[str], home: Store) -> tuple[Store, str]:
    """Return the store and the name of a path; a bare name is one of `home`, and so is what `home` lists."""
    given = os.fspath(path)
    directory, _, name = given.rpartition("/")
    if "/" not in given or given == home.path_of(name):
        return home, name
    return open_store(directory or "/"), name


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
    await _checked(partial(verify, progress=progress), store, name)


async def _read(store: Store, name: str) -> Image:
    return await _checked(read_image, store, name)


async def _checked(read: Callable[[Store, StoredFile], Awaitable[T]], store: Store, name: str) -> T:
    where = store.path_of(name)
    try:
        return await read(store, await store.stat(name))
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"there is no checkpoint {where}") from error
    except CorruptCheckpointError as error:
        raise error if where in str(error) else CorruptCheckpointError(f"{where}: {error}") from error


def state_of(image: Image, where: str, map_location: MapLocation, *, weights_only: bool | None) -> Any:
    """Build the state of a file that is in memory; its storages keep that memory.

    Raises:
        CorruptCheckpointError, UnsafeStateError, UnloadableStateError: as `load_state` does; `where` is the
            path that they name.
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
            row = next(row for row, record in enumerate(directory.names) if record.endswith("/data.pkl"))
            data_pickle = bytes(view[directory.starts[row] : directory.stops[row]])
            failure = load_failure(error, where, data_pickle, [s.nbytes() for s in payloads.values()])
            if failure is None:
                raise
            raise failure from error
