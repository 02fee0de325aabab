"""From a file in memory to a state."""

from __future__ import annotations

import ctypes
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from asyncckpt._loading.load_failures import load_failure
from asyncckpt._loading.unpickle import PayloadFile, load_file
from asyncckpt.layout.description import Description, checkpoint_of
from asyncckpt.layout.zip_format import DESCRIPTION
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from torch.storage import UntypedStorage

    from asyncckpt._loading.reader import Image
    from asyncckpt._loading.unpickle import MapLocation

# Smaller storages are given back only with the whole file; pages of their own would cost more than they do.
_OWN_PAGES = 64 << 10


class Loaded(NamedTuple):
    """A state, and the checkpoint that it was read from."""

    state: Any
    checkpoint: Checkpoint


def load_image(image: Image, map_location: MapLocation = "cpu", *, weights_only: bool | None) -> Loaded:
    """Build the state of a file, as torch.load would; its storages keep the memory of the image.

    Raises:
        CorruptCheckpointError: its pickle makes no sense.
        UnsafeStateError: `weights_only` does not allow what is in it; names the entries.
        UnloadableStateError: its objects cannot be rebuilt here.
    """
    record = image.record(DESCRIPTION)
    checkpoint = Checkpoint(None, image.path, {}, image.nbytes)
    if record is not None:
        checkpoint = checkpoint_of(image.path, Description.decode(record), image.nbytes)
    ranges = [(start, stop) for _, start, stop in image.directory.storages() if stop > start]
    payloads = {start: storage_of(image, start, stop) for start, stop in ranges}
    view = image.mapping.view[image.begin : image.begin + image.nbytes]
    file = PayloadFile(image.nbytes, lambda at, length: bytes(view[at : at + length]), payloads)
    try:
        return Loaded(load_file(file, map_location, weights_only=weights_only), checkpoint)
    except Exception as error:
        if file.misplaced:
            raise
        data_pickle = image.record(f"{image.directory.folder}/data.pkl") or b""
        failure = load_failure(error, image.path, data_pickle, [stop - start for start, stop in ranges])
        if failure is None:
            raise
        raise failure from error


def storage_of(image: Image, start: int, stop: int) -> UntypedStorage:
    """Return a storage of the bytes [start, stop) of a file that gives its pages back when it dies.

    All of the memory is given back when nothing refers to it any more.
    """
    begin, end = image.begin + start, image.begin + stop
    array = (ctypes.c_ubyte * (end - begin)).from_buffer(image.mapping.view, begin)
    if end - begin >= _OWN_PAGES:
        weakref.finalize(array, image.mapping.discard, begin, end).atexit = False
    return torch.frombuffer(array, dtype=torch.uint8).untyped_storage()
