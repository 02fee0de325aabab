"""torch.save and torch.load, in the background and in parallel."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from asyncckpt._finder import locate
from asyncckpt._loading.load import load_image
from asyncckpt._loading.reader import read_image
from asyncckpt._saving.engine import get_engine, wait_for_pending
from asyncckpt._saving.ranks import claim
from asyncckpt._saving.saver import Saver
from asyncckpt._saving.targets import FileTarget
from asyncckpt.layout.description import Description
from asyncckpt.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncckpt._loading.unpickle import MapLocation
    from asyncckpt._saving.save import Save

# One being written and one being taken: two files saved one after the other do not wait for each other.
_saver = Saver(max_in_flight=2, keeps=False)


def save(
    state: Any, path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
) -> Save:
    """Save `state` to a file in the background, as torch.save would; returns when the state may change.

    The file appears under its name when it is complete and durable, and then replaces what was there. Missing
    directories are made. At most two snapshots are held in host memory; a third save waits for the first.

    Args:
        state: anything torch.save takes.
        path: a local path, or the URL of a file of any fsspec file system.
        storage_options: for the file system behind a URL, as fsspec takes them.

    Raises:
        SaveError: the state cannot be saved, or an earlier save failed and nobody has been told. Nothing was
            taken.
    """
    began = time.perf_counter()
    store, name = locate(_checked(path), open_store("."), storage_options)
    unclaim = claim(store.path_of(""), name)
    description = Description(0, None, {}, time.time())

    try:
        saved = _saver.save(state, FileTarget(store, name, description), None, began)
    except BaseException:
        unclaim()
        raise
    # Whether it fails or not; a later save of this rank to the same file claims it anew.
    saved.committed.add_done_callback(lambda _: unclaim())
    return saved


def load(
    path: str | os.PathLike[str],
    *,
    map_location: MapLocation = None,
    weights_only: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Load a file of asyncckpt or torch.save, as torch.load would, in parallel and with every byte checked.

    Waits for pending saves of this process first.

    Args:
        path: a local path, or the URL of a file of any fsspec file system.
        map_location: as in torch.load.
        weights_only: as in torch.load.
        storage_options: for the file system behind a URL, as fsspec takes them.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CorruptCheckpointError: names the damaged record.
        UnsafeStateError: `weights_only` does not allow what is in it; names the entries.
        UnloadableStateError: its objects cannot be rebuilt here.
    """
    wait_for_pending()
    store, name = locate(_checked(path), open_store("."), storage_options)
    image = get_engine().call(read_image, store, name)
    return load_image(image, map_location, weights_only=weights_only).state


def wait(timeout: float | None = None) -> None:
    """Wait until all files given to `save` are durable.

    Raises:
        SaveError: what failed since the last time.
        BusyError: the time, in seconds, was too short; the saves go on.
    """
    _saver.drain(timeout)
    _saver.raise_failures()


def _checked(path: Any) -> str:
    try:
        text = os.fspath(path)
    except TypeError:
        raise TypeError(
            f"path must be a str or a path, not {type(path).__name__}; the order is save(state, path)"
        ) from None
    if not isinstance(text, str) or not text or text.endswith("/"):
        raise ValueError(f"{text!r} does not name a file")
    return text
