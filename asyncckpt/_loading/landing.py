"""Memory that a file is read into, and that the storages of its state lie in."""

from __future__ import annotations

import ctypes
import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from asyncckpt._snapshot.memory import map_private

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.storage import UntypedStorage

    from asyncckpt._snapshot.arena import Lease
    from asyncckpt._snapshot.memory import Mapping
    from asyncckpt.layout.zip_reader import Directory

    # Takes what it needs for a file with these records; called on a worker thread.
    Land = Callable[[Directory], "Landing"]

# Smaller storages are given back only with the whole file; pages of their own would cost more than they do.
_OWN_PAGES = 64 << 10


class Landing(ABC):
    """The memory for one file, from its first byte to the end of its last storage.

    Several threads fill it piece by piece.
    """

    @abstractmethod
    def buffer(self, start: int, stop: int) -> memoryview:
        """Return the host memory for the bytes [start, stop) of the file."""

    def arrived(self, start: int, piece: memoryview) -> None:  # noqa: B027 - most take nothing
        """Take a piece that was read and checked, of the file from `start` on."""

    def end(self) -> None:  # noqa: B027 - most have nothing to do
        """Give back what is needed only while the file is read; all of it has arrived."""

    @abstractmethod
    def storage(self, start: int, stop: int) -> UntypedStorage:
        """Return a storage of the payload [start, stop) once all has arrived."""

    @abstractmethod
    def read(self, start: int, stop: int) -> bytes:
        """Return bytes of the file once all has arrived; those of payloads are not needed."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back; no storage was made of it."""


class OwnLanding(Landing):
    """Memory of its own, which stays as long as storages in it do."""

    def __init__(self, directory: Directory) -> None:
        self._mapping: Mapping = map_private(directory.storages_end)

    def buffer(self, start: int, stop: int) -> memoryview:
        return self._mapping.view[start:stop]

    def storage(self, start: int, stop: int) -> UntypedStorage:
        """Return a storage that gives its pages back when it dies; the last one gives back all."""
        array = (ctypes.c_ubyte * (stop - start)).from_buffer(self._mapping.view, start)
        if stop - start >= _OWN_PAGES:
            weakref.finalize(array, self._mapping.discard, start, stop).atexit = False
        return torch.frombuffer(array, dtype=torch.uint8).untyped_storage()

    def read(self, start: int, stop: int) -> bytes:
        return bytes(self._mapping.view[start:stop])

    def close(self) -> None:
        self._mapping.close()


class LeasedLanding(Landing):
    """A buffer of the arena, warm or pinned, for a state that is copied from there at once.

    Small storages are copies, which may be kept. Of large ones none should be left at the end.
    """

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._is_full = False
        self._large: weakref.WeakSet[ctypes.Array[ctypes.c_ubyte]] = weakref.WeakSet()

    def buffer(self, start: int, stop: int) -> memoryview:
        return self._lease.view[start:stop]

    def storage(self, start: int, stop: int) -> UntypedStorage:
        kind = ctypes.c_ubyte * (stop - start)
        if stop - start < _OWN_PAGES:
            array = kind.from_buffer_copy(self._lease.view, start)
        else:
            array = kind.from_buffer(self._lease.view, start)
            array.lease = self._lease  # type: ignore[attr-defined] # not to be leased again before it dies
            self._large.add(array)
        return torch.frombuffer(array, dtype=torch.uint8).untyped_storage()

    def read(self, start: int, stop: int) -> bytes:
        return bytes(self._lease.view[start:stop])

    def close(self) -> None:
        self._lease.release()

    def end(self) -> None:
        """Note that nothing is written into the buffer any more."""
        self._is_full = True

    def give_back(self) -> None:
        """Give the buffer back to the arena, or keep it for storages that the program has kept.

        Does nothing while it is being filled, which goes on for a moment when the caller is interrupted.
        """
        if not self._is_full:
            return
        kept = sorted(self._large, key=ctypes.addressof)
        if not kept:
            self._lease.release()
            return
        mapping, end = self._lease.detach(), 0
        for array in kept:
            start = ctypes.addressof(array) - mapping.address
            mapping.discard(end, start)
            end = start + len(array)
            weakref.finalize(array, mapping.discard, start, end).atexit = False
        mapping.discard(end, mapping.nbytes)
