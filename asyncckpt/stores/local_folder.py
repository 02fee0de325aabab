"""One folder in the making: a temporary folder with a locked mark, then put in its place or removed."""

# ruff: noqa: PTH118 - paths stay the str that the user gave
# ruff: noqa: D102 - methods without a docstring do what `FolderDraft` says

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from anyio import CancelScope

from asyncckpt._threads import in_thread
from asyncckpt.errors import StoreError
from asyncckpt.stores.base import FOLDER_MARK, FolderDraft, checked_member
from asyncckpt.stores.errors import local_errors
from asyncckpt.stores.local_file import write_at
from asyncckpt.stores.local_forks import disown_in_children
from asyncckpt.stores.local_names import (
    ATTEMPTS,
    move_away,
    put_in_place,
    remove_quietly,
    removed_error,
    sync_directory,
    sync_opened,
)
from asyncckpt.stores.temporary import close_quietly, hold, is_temporary, temporary_name

if TYPE_CHECKING:
    from collections.abc import Collection

    from asyncckpt.stores.base import Store
    from asyncckpt.stores.fileops import FileOps


class LocalFolderDraft(FolderDraft):
    """A folder draft in a local directory, of the process that made it.

    Its mark is made first, and locked until the folder is in its place, so that a starting writer never takes
    it for an abandoned one. A forked child does not hold the lock, and cannot use the draft.
    """

    def __init__(self, ops: FileOps, directory: str, name: str) -> None:
        self.attempt = ""
        self._ops = ops
        self._directory = directory
        self._name = name
        self._target = os.path.join(directory, name)
        # Guards everything below.
        self._lock = threading.Lock()
        self._ended = ""  # how, once it has
        self._path = ""  # of the temporary folder, as long as there is one
        self._fds: list[int] = []  # that of the mark, with the lock
        disown_in_children(self)

    def open(self) -> None:
        """Make the temporary folder and its mark; blocks."""
        with self._lock, local_errors(f"making the folder {self._name}", self._target):
            self._check_open()
            self._make_locked()

    def member(self, name: str) -> str:
        return checked_member(name)

    async def commit(self, mark: bytes) -> None:
        """Write, sync, rename, sync the directory: one call on one thread, not to be cancelled."""
        with CancelScope(shield=True):
            await in_thread(self._commit, mark)

    def drop(self) -> None:
        """Remove what was not committed; idempotent; blocks."""
        with self._lock:
            self._ended = "by commit or failure"
            self._release()

    def _check_open(self) -> None:
        if self._ended:
            message = f"the draft of {self._name} has ended, {self._ended}; begin a new one"
            raise StoreError(errno.EBADF, message, self._target)

    def _make_locked(self) -> None:
        for _ in range(ATTEMPTS):
            self.attempt = temporary_name(self._name)
            path = os.path.join(self._directory, self.attempt)
            self._ops.mkdir(path)
            self._path = path
            mark = os.path.join(path, FOLDER_MARK)
            # A starting writer may see the folder before its mark, or the mark before it is locked.
            with suppress(FileNotFoundError):
                self._fds.append(self._ops.open(mark, os.O_RDWR | os.O_CREAT | os.O_EXCL))
                if hold(self._ops, self._fds[0], mark):
                    return
            self._release()
        raise removed_error(self._target)

    def _commit(self, mark: bytes) -> None:
        with self._lock:
            self._check_open()
            self._ended = "by commit or failure"
            try:
                self._publish(mark)
            finally:
                self._release()

    def _publish(self, mark: bytes) -> None:
        ops = self._ops
        with local_errors(f"writing the mark of {self._name}", self._target):
            write_at(ops, self._fds[0], memoryview(mark), 0)
            ops.fsync(self._fds[0])
            sync_directory(ops, self._path)
            # Opened first: whatever can fail before the folder is in its place should.
            directory = ops.open_directory(self._directory)
        try:
            with local_errors(f"putting {self._name} in its place", self._target):
                former = put_in_place(ops, self._path, self._target)
            self._path = ""
            doing = (
                f"syncing the directory (the new {self._name} is in place, but may be lost in a power loss)"
            )
            with local_errors(doing, self._target):
                sync_opened(ops, directory)
        finally:
            close_quietly(ops, directory)
        if former:
            remove_quietly(ops, former)

    def _release(self) -> None:
        if self._path:
            # Other processes may still make files in it, under the name they know.
            with suppress(OSError):
                self._path = move_away(self._ops, self._path)
            remove_quietly(self._ops, self._path)
        while self._fds:
            close_quietly(self._ops, self._fds.pop())
        self._path = ""

    def disown(self) -> str:
        """End in a forked child, as `Forked` says."""
        fds, attempt = self._fds, self.attempt if self._path else ""
        self._lock = threading.Lock()  # another thread of the parent may have held it
        self._ended = "here: it belongs to the process that this one was forked from"
        self._path, self._fds = "", []
        for fd in fds:
            with suppress(OSError):
                os.close(fd)
        return attempt


class JoinedFolder(FolderDraft):
    """A folder draft that another process has made, and will commit or remove.

    Args:
        attempt: that of the other process.
        store: of the draft.
        path: what the folder is to become, for messages.
    """

    def __init__(self, attempt: str, store: Store, path: str) -> None:
        self.attempt = attempt
        self.store = store
        self._path = path

    def member(self, name: str) -> str:
        return checked_member(name)

    async def commit(self, mark: bytes) -> None:  # noqa: ARG002 - it is refused
        message = "a folder is committed by the process that made the draft, not by one that joined it"
        raise StoreError(errno.EPERM, message, self._path)


def look_for_draft(ops: FileOps, directory: str, attempt: str) -> None:
    """Raise FileNotFoundError if no folder draft of this name is under way in the directory."""
    if not is_temporary(attempt):
        raise FileNotFoundError(errno.ENOENT, "not the name of a draft", attempt)
    ops.lstat(os.path.join(directory, attempt, FOLDER_MARK))


def link_files(ops: FileOps, source: str, target: str, refusals: Collection[int]) -> list[str]:
    """Give the files of a folder, but for its mark, names in another one, too.

    Returns:
        The names of those for which that was refused by one of these error numbers.

    Raises:
        StoreError: there is something else than files in the folder.
    """
    refused = []
    for entry in ops.scandir(source):
        if not entry.is_file(follow_symlinks=False):
            message = f"{entry.name} in the folder is not a regular file, so the folder is not copied"
            raise StoreError(errno.EINVAL, message, source)
        if entry.name == FOLDER_MARK or is_temporary(entry.name):
            continue
        try:
            ops.link(entry.path, os.path.join(target, entry.name))
        except OSError as error:
            if error.errno not in refusals:
                raise
            refused.append(entry.name)
    return refused
