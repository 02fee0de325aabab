"""Background and parallel counterparts of torch.save and torch.load."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from asyncckpt._finder import locate
from asyncckpt._loading.source import load_checkpoint, read_checkpoint
from asyncckpt._ranks.claims import claim
from asyncckpt._saving.engine import get_engine, wait_for_pending
from asyncckpt._saving.saver import Saver
from asyncckpt._saving.targets import FileTarget
from asyncckpt.layout.description import Description
from asyncckpt.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncckpt._loading.unpickle import MapLocation
    from asyncckpt._saving.save import Save

# Two in flight: a second file does not wait until the first one is written.
_saver = Saver(max_in_flight=2, keeps=False)


def save(
    state: Any, path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
) -> Save:
    """Save `state` to a file in the background, as torch.save would; return once it may be changed.

    The file gets its name when it is complete and durable, and replaces an existing one then. Missing
    directories are created. At most two snapshots are held in host memory; a third save waits for the first.

    Args:
        state: anything torch.save takes.
        path: a local path, or a URL of any fsspec file system.
        storage_options: options of the file system of a URL, as fsspec takes them.

    Raises:
        SaveError: the state cannot be saved (the message gives the path of the entry), or an earlier save
            failed and its error was not raised yet. This save was not started.
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
    # Also after a failure; a later save of this rank to the same file claims it again.
    saved.committed.add_done_callback(lambda _: unclaim())
    return saved


def load(
    path: str | os.PathLike[str],
    *,
    map_location: MapLocation = None,
    weights_only: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Load a file of asyncckpt or torch.save, as torch.load would, in parallel, with every checksum compared.

    A folder of asyncckpt or torch.distributed.checkpoint is loaded as one state of whole tensors. Pending
    saves of this process are waited for.

    Args:
        path: a local path, or a URL of any fsspec file system.
        map_location: as in torch.load.
        weights_only: as in torch.load.
        storage_options: options of the file system of a URL, as fsspec takes them.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CorruptCheckpointError: the file is damaged; the message names the record.
        UnsafeStateError: `weights_only=True` refuses some entries; the message names them.
        UnloadableStateError: its objects cannot be built here, for example because a class is missing.
    """
    wait_for_pending()
    store, name = locate(_checked(path, ignored="/"), open_store("."), storage_options)
    image = get_engine().call(read_checkpoint, store, name)
    return load_checkpoint(image, map_location, weights_only=weights_only).state


def wait(timeout: float | None = None) -> None:
    """Wait until all files given to `save` are durable.

    Raises:
        SaveError: for failures that were not raised before.
        BusyError: saves are still pending after `timeout` seconds; they continue.
    """
    _saver.drain(timeout)
    _saver.raise_failures()


def _checked(path: Any, ignored: str = "") -> str:
    """Return a path as text, without the characters at its end that are ignored."""
    try:
        text = os.fspath(path)
    except TypeError:
        raise TypeError(
            f"path must be a str or path-like, not {type(path).__name__}; the arguments are save(state, path)"
        ) from None
    named = text.rstrip(ignored) if isinstance(text, str) else ""
    if not named or named.endswith("/"):
        raise ValueError(f"{text!r} does not name a file")
    return named
