"""The interface of file formats, and the plan that a format makes of one file. No I/O and no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from asyncckpt.types import Offsets

S = TypeVar("S")
B = TypeVar("B", bound="Body")

# A checksum in a file: four little-endian bytes.
CHECKSUM_BYTES = 4


@dataclass(frozen=True, eq=False)
class Body:
    """Where the ranges of a snapshot lie in the file, which is also where they lie in its host buffer.

    Attributes:
        starts, stops: of each of the n ranges, in file order; int64, shape (n,).
        nbytes: size of the body. Only literal bytes follow it in the file.
    """

    starts: Offsets
    stops: Offsets
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class FilePlan:
    """Which bytes a file consists of, and where each one comes from.

    A file is a body, of ranges and of literal bytes between them, followed by a literal tail. Any piece of
    the body can be written from the buffer in which it lies, once a copy has filled that from the front and
    the literals are put around the ranges. Nothing here is bound to a thread or a process.

    Attributes:
        body: where the ranges are.
        literals: (offset, bytes) of what is literal in the body, in file order.
        tail: all bytes after the body.
        slots: where the CRC-32 of a range goes, in file order; int64, shape (m,). Each lies in a literal or
            the tail, behind its range.
        slot_ranges: which range that is; int64, shape (m,).
    """

    body: Body
    literals: tuple[tuple[int, bytes], ...]
    tail: bytes
    slots: Offsets
    slot_ranges: Offsets

    @property
    def size(self) -> int:
        """Size of the finished file in bytes."""
        return self.body.nbytes + len(self.tail)


class Format(ABC, Generic[S, B]):
    """A file format. S is what it has to know of a state beside the bytes of its ranges.

    An object serves the states of one thread, one after another, and may keep what they share.
    """

    @abstractmethod
    def lay_out(self, frozen: S) -> B:
        """Decide where each range goes, on the training thread, which waits."""

    @abstractmethod
    def plan(self, frozen: S, body: B, description: bytes) -> FilePlan:
        """Complete a body to a file, in the background; its ranges may not be copied yet.

        Args:
            frozen: the state.
            body: where its ranges lie.
            description: what asyncckpt says of the file, for formats that have a place for it.
        """
