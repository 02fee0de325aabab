"""One file in the making: a locked temporary file, written in pieces, then put in its place or dropped."""

# ruff: noqa: PTH118 - paths stay the str that the user gave

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakSet

from anyio import CancelScope

from asyncckpt._threads import in_thread
from asyncckpt.errors import StoreError
from asyncckpt.stores.base import Draft
from asyncckpt.stores.local_errors import size_text, translated
from asyncckpt.stores.local_fork import close_by_name
from asyncckpt.stores.local_io import (
    BULK_THREADS,
    DIRECT_FROM,
    bulk_limiter,
    direct_range,
    open_direct,
    write_buffered,
    write_direct,
)
from asyncckpt.stores.local_temporary import close_quietly, hold, temporary_name, unlink_quietly

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt.stores.fileops import FileOps

_ATTEMPTS = 16
_NO_FALLOCATE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})


class DraftFile:
    """The synchronous half of a draft; its methods run in worker threads, `write` in several at once.

    The lock on the temporary file is held by a descriptor of its own from before the first byte until
    after the file is in its place, so that a starting writer never takes it for an abandoned one.

    A forked child holds no descriptor of it, and cannot use it: the file is the parent's alone.

    Attributes:
        sync_seconds: what the fsync of the file took.
    """

    def __init__(self, ops: FileOps, directory: str, name: str, size: int) -> None:
        self.sync_seconds = 0.0
        self._ops = ops
        self._directory = directory
        self._name = name
        self._size = size
        self._target = os.path.join(directory, name)
        self._doing = f"writing {name} ({size_text(size)})"
        # Guards everything below. It is free while pieces are written; whoever opens, commits or
        # drops holds it to the end.
        self._idle = threading.Condition()
        self._ended = ""  # how, once it has
        self._writes_running = 0
        self._written = 0
        self._temporary = ""  # the name of the temporary file, as long as a descriptor of it may be open
        self._path = ""  # of the temporary file, as long as there is one
        # A number is recorded only while it is open: forked children close it.
        self._lock_fd: int | None = None
        self._writing_fds: list[int] = []
        self._direct_fd: int | None = None
        _drafts.add(self)

    def open(self) -> None:
        """Make, lock and reserve the temporary file."""
        with self._idle, translated(self._doing, self._target):
            self._check_open()
            self._make_locked()
            self._writing_fds.append(self._ops.open(self._path, os.O_WRONLY))
            self._reserve()
            if self._size >= DIRECT_FROM:
                self._direct_fd = open_direct(self._ops, self._path, os.O_WRONLY)
                if self._direct_fd is not None:
                    self._writing_fds.append(self._direct_fd)

    def write(self, offset: int, data: memoryview) -> None:
        """Write one piece, whole pages past the page cache where that works."""
        with self._idle:
            self._check_open()
            self._writes_running += 1
        taken = 0
        try:
            with translated(self._doing, self._target):
                self._write_piece(offset, data)
            taken = len(data)
        finally:
            with self._idle:
                self._writes_running -= 1
                self._written += taken
                self._idle.notify_all()

    def clone(self, source: int) -> bool:
        """Share all blocks of an open file of the same size; False where the file system cannot."""
        with self._idle:
            self._check_open()
            try:
                self._ops.ficlone(source, self._writing_fds[0])
            except OSError:
                return False
            self._written = self._size
            return True

    def commit(self) -> None:
        """Sync and close the file, put it in its place, and sync the directory."""
        with self._idle:
            self._check_open()
            self._ended = "by commit or failure"
            self._idle.wait_for(self._no_writes)
            try:
                self._publish()
            finally:
                self._release()

    def drop(self) -> None:
        """Close and remove what was not committed, once no write runs any more; idempotent."""
        with self._idle:
            self._ended = "by commit or failure"
            self._idle.wait_for(self._no_writes)
            self._release()

    def _no_writes(self) -> bool:
        return self._writes_running == 0

    def _check_open(self) -> None:
        if self._ended:
            raise StoreError(
                errno.EBADF,
                f"the draft of {self._name} has ended, {self._ended}; begin a new one",
                self._target,
            )

    def _make_locked(self) -> None:
        for _ in range(_ATTEMPTS):
            self._temporary = temporary_name(self._name)
            path = os.path.join(self._directory, self._temporary)
            self._lock_fd = self._ops.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            self._path = path
            if hold(self._ops, self._lock_fd, path):
                return
            # A cleaner saw the file before it was locked.
            self._release()
        raise StoreError(
            errno.EAGAIN,
            f"every temporary file made in {self._directory} was locked or removed at once by another "
            f"program while {self._doing}; keep other programs out of it",
            self._target,
        )

    def _reserve(self) -> None:
        if self._size == 0:
            return
        try:
            self._ops.fallocate(self._writing_fds[0], self._size)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
            self._ops.ftruncate(self._writing_fds[0], self._size)

    def _write_piece(self, offset: int, data: memoryview) -> None:
        start = stop = 0
        direct_fd = self._direct_fd
        if direct_fd is not None:
            start, stop = direct_range(data, offset)
            if start < stop:
                taken, refused = write_direct(self._ops, direct_fd, data[start:stop], offset + start)
                stop = start + taken
                if refused:
                    self._direct_fd = None
        write_buffered(self._ops, self._writing_fds[0], data[:start], offset)
        write_buffered(self._ops, self._writing_fds[0], data[stop:], offset + stop)

    def _publish(self) -> None:
        ops = self._ops
        with translated(self._doing, self._target):
            if self._written != self._size:
                raise StoreError(
                    errno.EINVAL,
                    f"the pieces written come to {self._written} bytes, not to the {self._size} of "
                    f"{self._name}; write each of them once before the commit",
                    self._target,
                )
            started = time.perf_counter()
            ops.fsync(self._writing_fds[0])
            self.sync_seconds = time.perf_counter() - started
            while self._writing_fds:
                ops.close(self._writing_fds.pop())
            # Opened first: whatever can fail before the file is in its place should.
            directory = ops.open_directory(self._directory)
        try:
            with translated(f"putting {self._name} in its place", self._target):
                ops.replace(self._path, self._target)
            self._path = ""
            doing = (
                f"syncing the directory (the new {self._name} is in place, but may not outlive a power loss)"
            )
            with translated(doing, self._target):
                sync_opened(ops, directory)
        finally:
            close_quietly(ops, directory)

    def _release(self) -> None:
        while self._writing_fds:
            close_quietly(self._ops, self._writing_fds.pop())
        if self._path:
            unlink_quietly(self._ops, self._path)
            self._path = ""
        if self._lock_fd is not None:
            fd, self._lock_fd = self._lock_fd, None
            close_quietly(self._ops, fd)
        self._temporary = ""

    def disown(self) -> str:
        """End in a forked child: close what it inherited, and leave the file to the parent.

        Returns:
            The name of the temporary file, of which more descriptors may be open.
        """
        fds = [*self._writing_fds, *([] if self._lock_fd is None else [self._lock_fd])]
        temporary = self._temporary
        self._idle = threading.Condition()  # another thread of the parent may have held it
        self._writes_running = 0
        self._ended = "here: it belongs to the process that this one was forked from"
        self._temporary = self._path = ""
        self._writing_fds, self._lock_fd, self._direct_fd = [], None, None
        for fd in fds:
            with suppress(OSError):
                os.close(fd)
        return temporary


class LocalDraft(Draft):
    """A draft in a local directory: pieces go to worker threads, and nothing is copied."""

    chunk = 16 << 20
    writers = BULK_THREADS

    def __init__(self, file: DraftFile) -> None:
        self._file = file

    def blocking_writer(self) -> Callable[[int, memoryview], None]:
        """Return what writes a piece on the thread that calls it."""
        return self._file.write

    async def write(self, offset: int, data: memoryview) -> None:
        """Write `data` at `offset`, past the page cache where address and length are whole pages."""
        await in_thread(self._file.write, offset, data.cast("B"), limiter=bulk_limiter())

    async def commit(self) -> None:
        """Sync, close, replace, sync the directory: one call on one thread, not to be cancelled."""
        with CancelScope(shield=True):
            await in_thread(self._file.commit)
        self.sync_seconds = self._file.sync_seconds


def sync_directory(ops: FileOps, path: str) -> None:
    """Make the entries of a directory durable."""
    fd = ops.open_directory(path)
    try:
        sync_opened(ops, fd)
    finally:
        close_quietly(ops, fd)


def sync_opened(ops: FileOps, directory: int) -> None:
    """Make the entries of an open directory durable, on file systems that can be asked to."""
    try:
        ops.fsync_directory(directory)
    except OSError as error:
        # What some network and FUSE mounts answer: their directories have no sync.
        if error.errno != errno.EINVAL:
            raise


def _disown_in_child() -> None:
    temporaries = {draft.disown() for draft in list(_drafts)} - {""}
    if temporaries:
        close_by_name(temporaries)


_drafts: WeakSet[DraftFile] = WeakSet()
os.register_at_fork(after_in_child=_disown_in_child)
