"""The part of a copy that one device takes, in pieces; here that of host memory."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from asyncckpt._snapshot.copy_threads import for_each_piece
from asyncckpt.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.storage import UntypedStorage

# (target, source, bytes); the first lets go of the interpreter meanwhile, the second does not.
memmove, move_small = ctypes.CDLL(None).memmove, ctypes.PyDLL(None).memmove
for _function in (memmove, move_small):
    _function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    _function.restype = None


class Piece(NamedTuple):
    """Bytes that are copied at once.

    Attributes:
        start: offset in the buffer; the lowest one, if they are spread.
        storage: where they are.
        offset: of the first one in the storage.
        nbytes: how many.
        cloned: whether the storage is a clone, which nobody else changes.
        spread: offset in the buffer and size of each part, if they go to several places.
    """

    start: int
    storage: UntypedStorage
    offset: int
    nbytes: int
    cloned: bool = False
    spread: Sequence[tuple[int, int]] = ()


class Lane(ABC):
    """Copies pieces of one device to host memory, in order."""

    batch: ClassVar[int] = 1  # how many pieces are launched together
    spilled = 0  # bytes that a fence has cloned on the device

    @abstractmethod
    def launch(self, pieces: Sequence[Piece]) -> Any:
        """Begin to copy pieces; returns what to wait for."""

    @abstractmethod
    def wait(self, launched: Any) -> None:
        """Return once pieces are copied."""

    @abstractmethod
    def fence(self, pieces: Sequence[Piece]) -> list[Piece | None]:
        """Take over pieces that were not launched, so that their sources may be changed.

        Returns:
            For each, None if it is copied, or what is still to be launched in its place.
        """

    def enter_thread(self) -> None:  # noqa: B027 - a host has nothing to do
        """Prepare the calling thread, which does nothing but copy."""

    def order(self) -> None:  # noqa: B027
        """Order what the calling thread does next behind everything launched."""

    def close(self) -> None:  # noqa: B027
        """Return once nothing is copied any more."""

    def fence_seconds(self) -> float:
        """Return how long fences have held the device; called when all is copied."""
        return 0.0


class HostLane(Lane):
    """Copies host memory. A fence copies what is left, by several threads.

    Args:
        address: of the buffer.
    """

    def __init__(self, address: int) -> None:
        self._address = address

    def launch(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self._copy(piece)

    def wait(self, launched: None) -> None:
        pass

    def fence(self, pieces: Sequence[Piece]) -> list[Piece | None]:
        for_each_piece(self._copy, pieces)
        return [None] * len(pieces)

    def _copy(self, piece: Piece) -> None:
        if piece.storage.nbytes() < piece.offset + piece.nbytes:
            raise SaveError("memory of the state was freed by resize_() before its copy was finished")
        memmove(self._address + piece.start, piece.storage.data_ptr() + piece.offset, piece.nbytes)


class DeviceLane(Lane):
    """Copies from an accelerator without streams of its own; the caller waits.

    Args:
        buffer: uint8.
    """

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer

    def launch(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            source = bytes_of(piece.storage)[piece.offset : piece.offset + piece.nbytes]
            self._buffer[piece.start : piece.start + piece.nbytes].copy_(source)

    def wait(self, launched: None) -> None:
        pass

    def fence(self, pieces: Sequence[Piece]) -> list[Piece | None]:
        self.launch(pieces)
        return [None] * len(pieces)


def bytes_of(storage: UntypedStorage) -> torch.Tensor:
    """Return a tensor of all bytes of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
