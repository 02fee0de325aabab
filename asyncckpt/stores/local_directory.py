"""What is in a local directory: its committed files and folders; the directory itself and its parents."""

# ruff: noqa: PTH118, PTH120 - paths stay the str that the user gave

from __future__ import annotations

import errno
import os
import stat as modes
from typing import TYPE_CHECKING

from asyncckpt.errors import StoreError
from asyncckpt.stores.base import FOLDER_MARK, StoredFile
from asyncckpt.stores.local_file import committed_file
from asyncckpt.stores.local_names import sync_directory
from asyncckpt.stores.temporary import is_temporary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncckpt.stores.fileops import FileOps

_LISTINGS = 100


def is_directory(ops: FileOps, path: str) -> bool:
    """Return whether there is a directory at `path`; raises NotADirectoryError if there is something else."""
    try:
        status = ops.stat(path)
    except FileNotFoundError:
        return False
    if not modes.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    return True


def make_directory(ops: FileOps, path: str) -> None:
    """Make a directory and its parents, durably."""
    if is_directory(ops, path):
        return
    parent = os.path.dirname(path)
    make_directory(ops, parent)
    try:
        ops.mkdir(path)
    except FileExistsError:
        # Made meanwhile by another process, which may die before it syncs the parent.
        if not is_directory(ops, path):
            raise
    sync_directory(ops, parent)


def list_files(ops: FileOps, directory: str) -> Sequence[StoredFile]:
    """Return the regular files that are not temporary; links are not followed."""

    def look(entry: os.DirEntry[str]) -> StoredFile | None:
        status = ops.lstat(entry.path)
        return committed_file(entry.name, entry.path, status) if modes.S_ISREG(status.st_mode) else None

    return _list(ops, directory, look)


def list_folders(ops: FileOps, directory: str) -> Sequence[StoredFile]:
    """Return the folders with a mark that are not temporary; links are not followed."""

    def look(entry: os.DirEntry[str]) -> StoredFile | None:
        if not entry.is_dir(follow_symlinks=False):
            return None
        mark = os.path.join(entry.path, FOLDER_MARK)
        try:
            return committed_file(entry.name, mark, ops.lstat(mark))
        except FileNotFoundError:
            ops.lstat(entry.path)
            return None

    return _list(ops, directory, look)


def _list(
    ops: FileOps, directory: str, look: Callable[[os.DirEntry[str]], StoredFile | None]
) -> Sequence[StoredFile]:
    for _ in range(_LISTINGS):
        found = _list_once(ops, directory, look)
        if found is not None:
            return found
    raise StoreError(
        errno.EAGAIN,
        f"files of {directory} were removed during each of {_LISTINGS} attempts to list it",
        directory,
    )


def _list_once(
    ops: FileOps, directory: str, look: Callable[[os.DirEntry[str]], StoredFile | None]
) -> Sequence[StoredFile] | None:
    """List the directory; None if a name vanished: its successor may have come too late to be seen."""
    try:
        entries = ops.scandir(directory)
    except FileNotFoundError:
        return []
    try:
        found = [look(entry) for entry in entries if not is_temporary(entry.name)]
    except FileNotFoundError:
        return None
    return [file for file in found if file is not None]
