"""The interface of a store: bytes in, under a name, whole or not at all."""

from __future__ import annotations

import errno
import mmap
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from asyncckpt._threads import for_each
from asyncckpt.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from contextlib import AbstractAsyncContextManager

R = TypeVar("R")

# Pieces in memory at once while a file is copied. A draft may take more: those of a snapshot are there.
COPIED_AT_ONCE = 4

FOLDER_MARK = ".metadata"
"""The file that makes a folder a committed one; that of DCP's format."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A committed file as a listing shows it.

    Attributes:
        name: of the file in its directory.
        nbytes: its size.
        version: changes whenever the content under the name does (inode and mtime, an ETag): what was read
            of a file may be kept for as long as its version stays.
        modified: when it was written, in seconds since the epoch; 0.0 where that is unknown.
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
        chunk: size in bytes of the pieces in which all of it is best read; a multiple of 4096.
        readers: how many pieces at once.
    """

    chunk: int = 16 << 20
    readers: int = 8
    file: StoredFile
    path: str

    @abstractmethod
    async def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on; raises StoreError where the file ends before."""

    def blocking_reader(self) -> Callable[[int, memoryview], None] | None:
        """Return a function that does what `read` does and blocks; None if there is none.

        It is called on several threads of the caller at once, which saves a task switch a piece.
        """
        return None

    async def answer(self, requests: Generator[tuple[int, int], bytes, R]) -> R:
        """Send a generator the bytes of each (offset, length) that it yields; returns what it returns."""
        try:
            offset, length = next(requests)
            while True:
                data = bytearray(length)
                await self.read(offset, memoryview(data))
                offset, length = requests.send(bytes(data))
        except StopIteration as stop:
            result: R = stop.value
            return result


class Draft(ABC):
    """A file under way: invisible until `commit`, gone if that is never reached.

    Attributes:
        chunk: size in bytes of the pieces that `write` takes; a multiple of 4096.
        writers: how many `write` calls may run at once. With 1 they come in file order.
        sync_seconds: what the commit spent on making the bytes durable, for `SaveStats`.
    """

    chunk: int = 16 << 20
    writers: int = 1
    sync_seconds: float = 0.0

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

    def blocking_writer(self) -> Callable[[int, memoryview], None] | None:
        """Return a function that does what `write` does and blocks; None if there is none.

        It is called on threads of the caller, `writers` of them at most, which saves a task switch a piece.
        """
        return None


class FolderDraft(ABC):
    """A folder under way, which several processes write: invisible until `commit`.

    Each file in it is a draft of `store`, made durable by its own commit before that of the folder:

        async with folder_draft.store.draft(folder_draft.member("__0_0.distcp"), size) as draft: ...

    Attributes:
        attempt: what other processes give to `Store.join_folder` to write into the same draft.
        store: where the files of the folder are made.
    """

    attempt: str
    store: Store

    @abstractmethod
    def member(self, name: str) -> str:
        """Return the name that a file gets, in the draft and in the committed folder alike."""

    @abstractmethod
    async def commit(self, mark: bytes) -> None:
        """Write `FOLDER_MARK` durably, put the folder in its place atomically, then make that durable.

        A folder or a file of that name is replaced, and removed once the new folder is in its place.

        Args:
            mark: the content of `FOLDER_MARK`. It holds the names of the files as `member` gives them, in
                plain bytes: a store may look there for the files that are in use.

        Raises:
            StoreError: it is not committed. What stood under the name before still does, unless the message
                says that the store failed after the replacement. It is also raised in a process that joined
                the draft: the one that made it commits.
        """


class Store(ABC):
    """One directory of files, and of folders of files. Names are flat: a name never holds a slash.

    A folder is committed if it has a file `FOLDER_MARK`. `stat`, `open` and `list` are for files alone;
    `remove`, `copy` and `link` also take the name of a folder. A store without folders leaves out the methods
    that have "folder" in their names.

    Methods may be called from several tasks at once, and all run on one event loop. Failures are
    `asyncckpt.StoreError`, or the built-in FileNotFoundError where a named file does not exist.

    Attributes:
        overlaps: whether a draft may be written while the snapshot is still being copied. That is for stores
            whose writes take neither the interpreter nor the processor from the training thread.
    """

    overlaps: bool = False

    @abstractmethod
    def path_of(self, name: str) -> str:
        """Return the path or URL under which a user finds `name`; for an empty name that of the directory."""

    @abstractmethod
    async def prepare(self) -> None:
        """Make the directory, durably, and remove the drafts of crashed writers."""

    @abstractmethod
    def draft(self, name: str, size: int) -> AbstractAsyncContextManager[Draft]:
        """Open a draft of `size` bytes that will replace `name`; leaving drops what is not committed."""

    @abstractmethod
    async def list(self) -> Sequence[StoredFile]:
        """Return the committed files, in any order, without drafts; none if the directory does not exist."""

    @abstractmethod
    def open(self, name: str) -> AbstractAsyncContextManager[OpenFile]:
        """Open a committed file for reading, or raise FileNotFoundError."""

    @abstractmethod
    async def remove(self, name: str) -> None:
        """Remove `name`, durably; a name that does not exist is no error."""

    async def stat(self, name: str) -> StoredFile:
        """Return one committed file, or raise FileNotFoundError."""
        for file in await self.list():
            if file.name == name:
                return file
        raise FileNotFoundError(errno.ENOENT, "no committed file", self.path_of(name))

    async def exists(self) -> bool:
        """Return whether the directory exists; without directories: whether there is a file or a folder."""
        return bool(await self.list() or await self.list_folders())

    async def read(self, name: str, offset: int, into: memoryview) -> None:
        """Read a file once: fill `into` with the bytes from `offset` on."""
        async with self.open(name) as file:
            await file.read(offset, into)

    async def copy(self, source: str, target: str) -> None:
        """Make `target` a second, independent name for the bytes of `source`, atomically.

        Independent means that replacing or removing one leaves the other; a hard link is that. Local and
        remote directories also take the relative path of a file in another directory: "../other/a.pt".
        """
        async with self.open(source) as file, self.draft(target, file.file.nbytes) as draft:
            await copy_into(draft, file)
            await draft.commit()

    async def link(self, source: str, target: str) -> None:
        """Make `target` refer to whatever `source` names, atomically; a copy where there are no links."""
        await self.copy(source, target)

    async def list_folders(self) -> Sequence[StoredFile]:
        """Return the committed folders, in any order: the name of each, and the other figures of its mark."""
        return []

    def folder(self, name: str) -> Store:
        """Return the store of the files of a folder, which need not exist."""
        raise self._no_folders(name)

    def folder_draft(self, name: str) -> AbstractAsyncContextManager[FolderDraft]:
        """Open a draft that will replace `name`; leaving removes all of it that is not committed."""
        raise self._no_folders(name)

    def join_folder(
        self,
        name: str,
        attempt: str,  # noqa: ARG002 - of stores with folders
    ) -> AbstractAsyncContextManager[FolderDraft]:
        """Open a draft that another process has made; leaving removes nothing that may be committed.

        Args:
            name: that of the folder.
            attempt: `FolderDraft.attempt` of the other process.

        Raises:
            StoreError: the draft is not visible here: the processes do not share the directory.
        """
        raise self._no_folders(name)

    def _no_folders(self, name: str) -> StoreError:
        message = f"{type(self).__name__} has no folders, which sharded checkpoints need; use a path or a URL"
        return StoreError(errno.ENOTSUP, message, self.path_of(name))


def checked_name(name: str, *, longest: int | None = None) -> str:
    """Return `name`, or raise StoreError if it is not the flat name of a file of at most `longest` bytes."""
    too_long = longest is not None and len(os.fsencode(name)) > longest
    if name in {"", ".", ".."} or "/" in name or "\0" in name or too_long:
        limit = f" of at most {longest} bytes" if longest else ""
        message = f"{name!r} cannot be the name of a file; use one without slashes{limit}"
        raise StoreError(errno.EINVAL, message)
    return name


def checked_member(name: str) -> str:
    """Return `name`, or raise StoreError if a file of a folder cannot be called so."""
    if name == FOLDER_MARK:
        raise StoreError(errno.EINVAL, f"{name} is written by the commit of the folder; use another name")
    return checked_name(name)


def checked_source(source: str, *, longest: int | None = None) -> str:
    """Return `source`, or raise StoreError if it is not a name or the relative path of a file."""
    checked_name(source if source.startswith("/") else source.rpartition("/")[2], longest=longest)
    return source


async def copy_into(draft: Draft, file: OpenFile) -> None:
    """Write all of an open file into a draft of its size."""

    async def copy_piece(offset: int) -> None:
        # A new piece each time, as the draft may need it until the commit; on a page, for direct writes.
        piece = memoryview(mmap.mmap(-1, min(draft.chunk, file.file.nbytes - offset)))
        await file.read(offset, piece)
        await draft.write(offset, piece)

    await for_each(copy_piece, range(0, file.file.nbytes, draft.chunk), min(draft.writers, COPIED_AT_ONCE))
