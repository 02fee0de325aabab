"""From a file in memory to a state."""

from __future__ import annotations

import ctypes
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._loading.load_failures import load_failure
from asyncckpt.layout.description import Description
from asyncckpt.layout.torch_unpickle import PayloadFile, load_file
from asyncckpt.layout.torch_zip import DESCRIPTION
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from torch.storage import UntypedStorage
    from typing_extensions import Self

    from asyncckpt._loading.reader import Image
    from asyncckpt._snapshot.memory import Mapping
    from asyncckpt.layout.torch_unpickle import MapLocation

# Smaller storages are given back only with the whole file; pages of their own would cost more than they do.
_OWN_PAGES = 64 << 10


@dataclass(frozen=True, slots=True)
class Loaded:
    """A state, and the checkpoint that it was read from."""

    state: Any
    checkpoint: Checkpoint


def load_image(image: Image, map_location: MapLocation = "cpu", *, weights_only: bool | None) -> Loaded:
    """Build the state of a file that is in memory; its storages keep that memory.

    Args:
        image: the file; not to be used afterwards.
        map_location: as in torch.load.
        weights_only: as in torch.load.

    Raises:
        CorruptCheckpointError: its pickle makes no sense.
        UnsafeStateError: `weights_only` does not allow what is in it; names the entries.
        UnloadableStateError: its objects cannot be rebuilt here.
    """
    with _LoadedMemory(image.mapping) as memory:
        record = image.record(DESCRIPTION)
        checkpoint = Checkpoint(None, image.path, {}, image.nbytes)
        if record is not None:
            checkpoint = Description.decode(record).checkpoint(image.path, image.nbytes)
        return Loaded(_state(image, memory, map_location, weights_only=weights_only), checkpoint)


def _state(
    image: Image, memory: _LoadedMemory, map_location: MapLocation, *, weights_only: bool | None
) -> Any:
    directory, view = image.directory, image.mapping.view
    payloads = {start: memory.storage(start, stop) for _, start, stop in directory.storages() if stop > start}
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


class _LoadedMemory:
    """The memory of a loaded file: given back range by range as its storages die, and all with the last.

    Use it as a context while the state is built; what belongs to no storage is given back at its end.
    """

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self._holders = 1
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._release(0, 0)

    def storage(self, start: int, stop: int) -> UntypedStorage:
        """Return a storage of the bytes [start, stop)."""
        array = (ctypes.c_ubyte * (stop - start)).from_address(self._mapping.address + start)
        weakref.finalize(array, self._release, start, stop).atexit = False
        with self._lock:
            self._holders += 1
        return torch.frombuffer(array, dtype=torch.uint8).untyped_storage()

    def _release(self, start: int, stop: int) -> None:
        with self._lock:
            self._holders -= 1
            last = not self._holders
        if last:
            self._mapping.close()
        elif stop - start >= _OWN_PAGES:
            self._mapping.discard(start, stop)
