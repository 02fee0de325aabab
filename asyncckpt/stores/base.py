"""The contract that every store keeps: bytes in, under a name, whole or not at all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractAsyncContextManager


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A committed file as a listing sees it.

    Attributes:
        name: of the file in its directory.
        nbytes: its size.
        version: changes whenever the content under the name does (inode and mtime, an ETag): what was read
            of a file may be kept for as long as its version stays.
        modified: when it was written, in seconds since the epoch; 0.0 where the store does not tell.
    """

    name: str
    nbytes: int
    version: str
    modified: float = 0.0


class OpenFile(ABC):
    """A committed file, open for reading.

    All reads are of this file, even if another one takes its name or it is removed meanwhile. Where a store
    cannot keep it so, leaving the context of `Store.open` with an error raises FileNotFoundError instead if
    the file was replaced.

    Attributes:
        file: what a listing shows of it.
        path: its path or URL.
    """

    def __init__(self, file: StoredFile, path: str) -> None:
        self.file = file
        self.path = path

    @abstractmethod
    async def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on; raises StoreError where the file ends before."""


class Draft(ABC):
    """A file under way: invisible until `commit`, gone if that is never reached.

    Attributes:
        chunk: size in bytes of the pieces that `write` wants; a multiple of 4096.
        writers: how many `write` calls may run at once. With 1 they must come in file order.
    """

    chunk: int
    writers: int

    def blocking_writer(self) -> Callable[[int, memoryview], None] | None:
        """Return a function that does what `write` does and blocks; None if the store has none.

        Its callers bring threads of their own, `writers` of them at most, and save a task switch a piece.
        """
        return None

    @abstractmethod
    async def write(self, offset: int, data: memoryview) -> None:
        """Write `data` at `offset`; the caller keeps `data` unchanged until the commit.

        Pieces do not overlap. Each starts at a multiple of `chunk` and is `chunk` bytes long,
        except for the last one, which ends the file.
        """

    @abstractmethod
    async def commit(self) -> None:
        """Make the file durable, then visible under its name, then that visibility durable.

        Raises:
            StoreError: it is not committed. What stood under the name before still does, unless
                the message says that the store failed after the replacement.
        """

    @property
    @abstractmethod
    def sync_seconds(self) -> float:
        """What the commit spent on making the bytes durable."""


class Store(ABC):
    """One directory of files. Names are flat; a name never holds a slash.

    All methods may be called from several tasks at once. Failures are `StoreError`, or the
    built-in `FileNotFoundError` where a named file is not there.

    Attributes:
        overlaps: whether a draft may be written while the snapshot is still being copied. That is for stores
            whose writes take neither the interpreter nor the processor from the training thread.
    """

    overlaps: bool = False

    @abstractmethod
    def path_of(self, name: str) -> str:
        """Return the path or URL under which a user finds `name`."""

    @abstractmethod
    async def prepare(self) -> None:
        """Make the directory, durably, and remove the drafts of writers that are dead."""

    @abstractmethod
    def draft(self, name: str, size: int) -> AbstractAsyncContextManager[Draft]:
        """Open a draft of `size` bytes that will replace `name`; leaving drops what is not committed."""

    @abstractmethod
    async def list(self) -> Sequence[StoredFile]:
        """Return the committed files, in no order; drafts are not among them.

        A directory that does not exist is empty.
        """

    @abstractmethod
    async def stat(self, name: str) -> StoredFile:
        """Return one committed file, or raise FileNotFoundError."""

    async def exists(self) -> bool:
        """Return whether the directory exists; one of an object store does if it has a file."""
        return bool(await self.list())

    @abstractmethod
    def open(self, name: str) -> AbstractAsyncContextManager[OpenFile]:
        """Open a committed file for reading, or raise FileNotFoundError."""

    async def read(self, name: str, offset: int, into: memoryview) -> None:
        """Read a file once: fill `into` with the bytes from `offset` on."""
        async with self.open(name) as file:
            await file.read(offset, into)

    @abstractmethod
    async def remove(self, name: str) -> None:
        """Remove `name`, durably; a name that is not there is no error."""

    @abstractmethod
    async def copy(self, source: str, target: str) -> None:
        """Make `target` a second, independent name for the bytes of `source`, atomically.

        Independent means that replacing or removing one leaves the other; a hard link is that. `source` may
        also be the relative path of a file in another directory: "../other/a.pt".
        """

    @abstractmethod
    async def link(self, source: str, target: str) -> None:
        """Make `target` refer to whatever `source` names, atomically replacing what it was.

        `source` may be a relative path, as in `copy`.
        """
