"""Let torch.load build a state on storages that are in memory already."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.serialization import default_restore_location, register_package

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.storage import UntypedStorage

    MapLocation = Callable[[UntypedStorage, str], UntypedStorage] | torch.device | str | dict[str, str] | None

_active = threading.local()


class PayloadFile:
    """A checkpoint file as torch.load reads it, except that payloads of storages are not copied.

    torch.load reads the bytes of a storage and then asks where to restore it. The first only notes which
    storage has these bytes; `restore` then returns it in place of the empty one.

    Args:
        size: of the file in bytes.
        read_at: returns the bytes at (offset, length).
        payloads: offset of each storage's payload -> the storage that holds it.

    Attributes:
        is_placed_by_caller: whether the caller's map_location decides where storages go, not the file.
        misplaced: whether a device or the caller's map_location failed, which is not the file's fault.
    """

    is_placed_by_caller = False
    misplaced = False

    def __init__(
        self, size: int, read_at: Callable[[int, int], bytes], payloads: Mapping[int, UntypedStorage]
    ) -> None:
        self._size = size
        self._read_at = read_at
        self._payloads = payloads
        self._at = 0
        self._noted: UntypedStorage | None = None

    def restore(self, storage: UntypedStorage) -> UntypedStorage:
        """Return the storage with the bytes that were read last; `storage` where they were copied."""
        found, self._noted = self._noted, None
        return storage if found is None else found

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move, as a file does."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes."""
        length = self._size - self._at if size < 0 else min(size, self._size - self._at)
        data = self._read_at(self._at, length)
        self._at += length
        return data

    def readline(self) -> bytes:
        """Refuse; torch.load only checks that the method is there."""
        raise NotImplementedError("a checkpoint has no lines")

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`, unless it belongs to a storage that is in memory already."""
        target = memoryview(buffer).cast("B")
        found = self._payloads.get(self._at)
        self._noted = found if found is not None and found.nbytes() == len(target) else None
        if self._noted is None:
            data = self.read(len(target))
            target[: len(data)] = data
            return len(data)
        self._at += len(target)
        return len(target)


def load_file(
    file: PayloadFile, map_location: MapLocation = None, *, weights_only: bool | None = True
) -> Any:
    """Return what torch.load makes of `file`; with `weights_only=None`, by the default of torch."""
    where = _filling_first(file, map_location) if callable(map_location) else map_location
    file.is_placed_by_caller = where is map_location and where is not None
    with _loading(file):
        return torch.load(file, map_location=where, weights_only=weights_only)  # type: ignore[arg-type]


def is_device(location: object) -> bool:
    """Return whether torch knows the kind of device of a storage's location, such as "cuda:0"."""
    try:
        return isinstance(location, str) and bool(torch.device(location))
    except RuntimeError:
        return False


def _filling_first(file: PayloadFile, place: Callable[[UntypedStorage, str], Any]) -> MapLocation:
    """Return a map_location that calls the caller's own with the storage that has the bytes."""

    def restore(storage: UntypedStorage, location: str) -> Any:
        filled = file.restore(storage)
        with _loading(None):
            try:
                placed = place(filled, location)
            except Exception:
                file.misplaced = True
                raise
            return _placed(file, filled, location) if placed is None else placed

    return restore


def _restore(storage: Any, location: str) -> Any:
    file: PayloadFile | None = getattr(_active, "file", None)
    if file is None:
        return None
    with _loading(None):
        return _placed(file, file.restore(storage), location)


def _placed(file: PayloadFile, storage: UntypedStorage, location: str) -> Any:
    try:
        return default_restore_location(storage, location)
    except Exception:
        file.misplaced = file.is_placed_by_caller or is_device(location)
        raise


# Before torch's own deserializers, which begin at 10; it does nothing unless a file of ours is being loaded.
register_package(5, lambda _: None, _restore)


@contextmanager
def _loading(file: PayloadFile | None) -> Iterator[None]:
    """Set which file this thread loads; an object of the state may load another one meanwhile."""
    before, _active.file = getattr(_active, "file", None), file
    try:
        yield
    finally:
        _active.file = before
