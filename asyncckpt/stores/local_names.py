"""Names in a local directory, of files and folders alike: replaced, removed, and made durable."""

# ruff: noqa: PTH118 - paths stay the str that the user gave

from __future__ import annotations

import errno
import logging
import os
import stat as modes
from typing import TYPE_CHECKING

from asyncckpt.errors import StoreError
from asyncckpt.stores.temporary import close_quietly, name_aside, temporary_name

if TYPE_CHECKING:
    from asyncckpt.stores.fileops import FileOps

logger = logging.getLogger(__name__)

ATTEMPTS = 16
"""How often a temporary name is made again that others remove, or a name replaced that others take."""

# How rename(2) refuses to put a folder over a file or a folder with files, or a file over a folder.
_OCCUPIED = frozenset({errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST})
_NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def put_in_place(ops: FileOps, source: str, target: str) -> str:
    """Rename `source` to `target`, whatever is there.

    What is there keeps the name until `source` takes it, in one step where the file system can exchange
    names. Elsewhere, a folder is moved aside first; `abandoned.remove_abandoned` puts it back after a crash.

    Returns:
        The path of what was there before, to be removed; empty if nothing is left of it.
    """
    for _ in range(ATTEMPTS):
        try:
            ops.replace(source, target)
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
        else:
            return ""
        try:
            ops.exchange(source, target)
        except FileNotFoundError:
            continue  # the target was removed meanwhile
        except OSError as error:
            if error.errno not in _NO_EXCHANGE:
                raise
        else:
            return source
        former = _moved_aside(ops, source, target)
        if former:
            return former
    raise StoreError(
        errno.EAGAIN, f"others took the name in each of {ATTEMPTS} attempts to replace it", target
    )


def _moved_aside(ops: FileOps, source: str, target: str) -> str:
    """Move `target` aside and `source` to it; returns the new path of the former, "" if others interfered."""
    directory, name = os.path.split(target)
    aside = os.path.join(directory, name_aside(name))
    try:
        ops.replace(target, aside)
    except FileNotFoundError:
        return ""
    try:
        ops.replace(source, target)
    except OSError as error:
        _put_back(ops, aside, target)
        if error.errno not in _OCCUPIED:
            raise
        return ""
    return aside


def _put_back(ops: FileOps, aside: str, target: str) -> None:
    try:
        ops.replace(aside, target)
    except FileNotFoundError:
        pass  # a starting writer has put it back
    except OSError as error:
        logger.warning("%s is now %s, and could not be put back: %s", target, aside, error)


def move_away(ops: FileOps, path: str) -> str:
    """Give a folder that is to be removed a temporary name, so that all of it is gone at once."""
    directory, name = os.path.split(path)
    away = os.path.join(directory, temporary_name(name))
    ops.replace(path, away)
    return away


def remove_any(ops: FileOps, path: str) -> None:
    """Remove a file, a link, or a folder with all that is in it; or nothing."""
    try:
        ops.unlink(path)
    except FileNotFoundError:
        pass
    except OSError:
        if not modes.S_ISDIR(ops.lstat(path).st_mode):
            raise
        ops.rmtree(path)


def remove_quietly(ops: FileOps, path: str) -> None:
    """Remove what has a temporary name; a failure is logged, and the next writer to start removes it."""
    try:
        remove_any(ops, path)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("could not remove the temporary %s: %s", path, error)


def sync_directory(ops: FileOps, path: str) -> None:
    """Make the entries of a directory durable."""
    fd = ops.open_directory(path)
    try:
        sync_opened(ops, fd)
    finally:
        close_quietly(ops, fd)


def sync_opened(ops: FileOps, directory: int) -> None:
    """Make the entries of an open directory durable, where directories have a sync."""
    try:
        ops.fsync_directory(directory)
    except OSError as error:
        # What some network and FUSE mounts answer: their directories have no sync.
        if error.errno != errno.EINVAL:
            raise


def removed_error(target: str) -> StoreError:
    """Return the error for a directory whose temporary files others lock or remove at once."""
    directory, name = os.path.split(target)
    return StoreError(
        errno.EAGAIN,
        f"every temporary file made in {directory} for {name} was locked or removed at once by another"
        " program; keep other programs out of it",
        target,
    )
