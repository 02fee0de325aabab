"""One file in the making: a locked temporary file, written in pieces, then put in its place or dropped."""

# ruff: noqa: PTH118 - paths stay the str that the user gave

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from anyio import CancelScope

from asyncckpt._threads import in_thread
from asyncckpt.errors import StoreError
from asyncckpt.stores.base import Draft
from asyncckpt.stores.errors import local_errors
from asyncckpt.stores.local_file import (
    BULK_THREADS,
    DIRECT_FROM,
    PAGE,
    REFUSED,
    bulk_limiter,
    direct_range,
    open_direct,
    write_at,
)
from asyncckpt.stores.local_forks import disown_in_children
from asyncckpt.stores.local_names import ATTEMPTS, removed_error, sync_opened
from asyncckpt.stores.temporary import close_quietly, hold, temporary_name, unlink_quietly

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt.stores.fileops import FileOps

_NO_FALLOCATE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})


class LocalDraft(Draft):
    """A draft in a local directory: pieces go to worker threads, and nothing is copied.

    The lock on the temporary file is held by a descriptor of its own from before the first byte until
    after the file is in its place, so that a starting writer never takes it for an abandoned one.

    A forked child holds no descriptor of it, and cannot use it: the file is the parent's alone.
    """

    # While some pieces are written, others get their checksums or wait for the interpreter.
    writers = 2 * BULK_THREADS

    def __init__(self, ops: FileOps, directory: str, name: str, size: int) -> None:
        self._ops = ops
        self._directory = directory
        self._name = name
        self._size = size
        self._target = os.path.join(directory, name)
        self._doing = f"writing {name} ({size:,} bytes)"
        # Guards everything below. It is free while pieces are written; whoever opens, commits or
        # drops holds it to the end.
        self._idle = threading.Condition()
        self._ended = ""  # how, once it has
        self._writes_running = 0
        self._written = 0
        self._temporary = ""  # the name of the temporary file, as long as a descriptor of it may be open
        self._path = ""  # of the temporary file, as long as there is one
        # That of the lock, then those for writing. A number is recorded only while it is open: forked
        # children close it.
        self._fds: list[int] = []
        self._direct_fd: int | None = None
        disown_in_children(self)

    def open(self) -> None:
        """Make, lock and reserve the temporary file; blocks."""
        with self._idle, local_errors(self._doing, self._target):
            self._check_open()
            self._make_locked()
            self._fds.append(self._ops.open(self._path, os.O_WRONLY))
            self._reserve()
            if self._size >= DIRECT_FROM:
                self._direct_fd = open_direct(self._ops, self._path, os.O_WRONLY)
                if self._direct_fd is not None:
                    self._fds.append(self._direct_fd)

    async def write(self, offset: int, data: memoryview) -> None:
        """Write `data` at `offset`, past the page cache where address and length are whole pages."""
        await in_thread(self._write, offset, data.cast("B"), limiter=bulk_limiter())

    def blocking_writer(self) -> Callable[[int, memoryview], None]:
        """Return what writes a piece on the thread that calls it."""
        return self._write

    async def commit(self) -> None:
        """Sync, close, replace, sync the directory: one call on one thread, not to be cancelled."""
        with CancelScope(shield=True):
            await in_thread(self._commit)

    def drop(self) -> None:
        """Close and remove what was not committed, once no write runs any more; idempotent; blocks."""
        with self._idle:
            self._end()
            self._release()

    def _write(self, offset: int, data: memoryview) -> None:
        with self._idle:
            self._check_open()
            self._writes_running += 1
        taken = 0
        try:
            with local_errors(self._doing, self._target):
                self._write_piece(offset, data)
            taken = len(data)
        finally:
            with self._idle:
                self._writes_running -= 1
                self._written += taken
                self._idle.notify_all()

    def _commit(self) -> None:
        with self._idle:
            self._check_open()
            self._end()
            try:
                self._publish()
            finally:
                self._release()

    def _end(self) -> None:
        self._ended = "by commit or failure"
        self._idle.wait_for(lambda: self._writes_running == 0)

    def _check_open(self) -> None:
        if self._ended:
            raise StoreError(
                errno.EBADF,
                f"the draft of {self._name} has ended, {self._ended}; begin a new one",
                self._target,
            )

    def _make_locked(self) -> None:
        for _ in range(ATTEMPTS):
            self._temporary = temporary_name(self._name)
            path = os.path.join(self._directory, self._temporary)
            self._fds.append(self._ops.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL))
            self._path = path
            if hold(self._ops, self._fds[0], path):
                return
            # A starting writer saw the file before it was locked.
            self._release()
        raise removed_error(self._target)

    def _reserve(self) -> None:
        if self._size == 0:
            return
        try:
            self._ops.fallocate(self._fds[1], self._size)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
            self._ops.ftruncate(self._fds[1], self._size)

    def _write_piece(self, offset: int, data: memoryview) -> None:
        start = stop = 0
        if self._direct_fd is not None:
            start, stop = direct_range(data, offset)
            try:
                stop = start + write_at(self._ops, self._direct_fd, data[start:stop], offset + start, PAGE)
            except OSError as error:
                # A file system may open with O_DIRECT and still not write so.
                if error.errno not in REFUSED:
                    raise
                self._direct_fd, stop = None, start
        write_at(self._ops, self._fds[1], data[:start], offset)
        write_at(self._ops, self._fds[1], data[stop:], offset + stop)

    def _publish(self) -> None:
        ops = self._ops
        with local_errors(self._doing, self._target):
            if self._written != self._size:
                raise StoreError(
                    errno.EINVAL,
                    f"the pieces written come to {self._written} bytes, not to the {self._size} of "
                    f"{self._name}; write each of them once before the commit",
                    self._target,
                )
            started = time.perf_counter()
            ops.fsync(self._fds[1])
            self.sync_seconds = time.perf_counter() - started
            while len(self._fds) > 1:
                ops.close(self._fds.pop())
            # Opened first: whatever can fail before the file is in its place should.
            directory = ops.open_directory(self._directory)
        try:
            with local_errors(f"putting {self._name} in its place", self._target):
                ops.replace(self._path, self._target)
            self._path = ""
            doing = (
                f"syncing the directory (the new {self._name} is in place, but may not outlive a power loss)"
            )
            with local_errors(doing, self._target):
                sync_opened(ops, directory)
        finally:
            close_quietly(ops, directory)

    def _release(self) -> None:
        while len(self._fds) > 1:
            close_quietly(self._ops, self._fds.pop())
        if self._path:
            unlink_quietly(self._ops, self._path)
        while self._fds:
            close_quietly(self._ops, self._fds.pop())
        self._temporary = self._path = ""

    def disown(self) -> str:
        """End in a forked child: close what it inherited, and leave the file to the parent.

        Returns:
            The name of the temporary file, of which more descriptors may be open.
        """
        fds, temporary = self._fds, self._temporary
        self._idle = threading.Condition()  # another thread of the parent may have held it
        self._writes_running = 0
        self._ended = "here: it belongs to the process that this one was forked from"
        self._temporary = self._path = ""
        self._fds, self._direct_fd = [], None
        for fd in fds:
            with suppress(OSError):
                os.close(fd)
        return temporary
