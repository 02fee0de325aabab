"""Remove the temporary files and folders that crashed writers left."""

# ruff: noqa: PTH118, PTH120 - paths stay the str that the user gave

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING

from asyncckpt.stores.base import FOLDER_MARK
from asyncckpt.stores.local_names import move_away, remove_any, sync_directory
from asyncckpt.stores.temporary import (
    close_quietly,
    host_tag,
    parse_temporary,
    temporary_name,
    unlink_quietly,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt.stores.fileops import FileOps

logger = logging.getLogger(__name__)

# Types of file systems, by statfs(2), that cannot be mounted by several kernels at once: ext2 to ext4, XFS,
# btrfs; tmpfs, ramfs, overlayfs; ZFS, F2FS, bcachefs.
_ONE_KERNEL = {0xEF53, 0x58465342, 0x9123683E} | {0x01021994, 0x858458F6, 0x794C7630}
_ONE_KERNEL |= {0x2FC12FC1, 0xF2F52010, 0xCA451A4E}
_OLD_SECONDS = 24 * 3600


def remove_abandoned(ops: FileOps, directory: str) -> None:
    """Remove the temporary files and folders of crashed writers, and put back what they had moved aside.

    A writer locks its file, or the mark of its folder, as long as it runs. A lock that can be taken proves
    that the writer is gone

    - on ext2, ext3, ext4, XFS, btrfs, tmpfs, ramfs, overlayfs, ZFS, F2FS and bcachefs: always, as all
      writers run under one kernel. The POSIX lock is tried as well, which is how a server of NFS or SMB
      holds the locks of its clients;
    - on NFS, SMB, Lustre, GPFS, Ceph, FUSE, any other file system, and on macOS: if the writer had the
      host tag of this machine. The file of another one is removed if it also was last modified 24 hours
      ago or earlier, by the clock that stamps a file made now in the directory.

    Symbolic links cannot be locked. One of this host tag is removed at once, one of another after 24 hours.

    What cannot be locked or removed stays, and is logged. Nothing else in the directory is touched.
    """
    for entry in ops.scandir(directory):
        temporary = parse_temporary(entry.name)
        if temporary is None:
            continue
        same_host = temporary.host == host_tag()
        try:
            if temporary.kind == "old":
                _put_back(ops, entry.path, os.path.join(directory, temporary.kept))
            elif entry.is_symlink():
                # It exists for microseconds, until it is moved to its place; its writer begins again if it is
                # removed meanwhile.
                if same_host or _is_old(ops, directory, ops.lstat(entry.path)):
                    ops.unlink(entry.path)
            elif entry.is_file(follow_symlinks=False):
                _remove_unlocked(ops, entry.path, entry.path, ops.unlink, same_host=same_host)
            elif entry.is_dir(follow_symlinks=False):
                _remove_folder(ops, entry.path, same_host=same_host)
        except FileNotFoundError:
            continue
        except OSError as error:
            logger.warning("could not remove the abandoned file %s: %s", entry.path, error)


def _remove_folder(ops: FileOps, path: str, *, same_host: bool) -> None:
    mark = os.path.join(path, FOLDER_MARK)
    remove = partial(_remove_tree, ops)
    try:
        _remove_unlocked(ops, mark, path, remove, same_host=same_host)
    except FileNotFoundError:
        try:
            # Its writer may be about to make the mark; it begins again if the folder is removed meanwhile.
            ops.rmdir(path)
        except FileNotFoundError:
            return
        except OSError:
            try:
                _remove_unlocked(ops, mark, path, remove, same_host=same_host)
            except FileNotFoundError:
                # A draft has its mark first: this is the rest of a folder whose removal was cut off.
                remove(path)


def _remove_tree(ops: FileOps, path: str) -> None:
    # Other ranks of a dead writer may still make files in it under the name it has.
    ops.rmtree(move_away(ops, path))


def _put_back(ops: FileOps, aside: str, target: str) -> None:
    """Give what a writer had moved aside its name again; remove it if the new one has the name."""
    try:
        ops.lstat(target)
    except FileNotFoundError:
        ops.replace(aside, target)
        sync_directory(ops, os.path.dirname(target))
        logger.info("put %s back, which a crashed writer was about to replace", target)
    else:
        remove_any(ops, aside)


def _remove_unlocked(
    ops: FileOps, locked: str, path: str, remove: Callable[[str], None], *, same_host: bool
) -> None:
    fd = ops.open(locked, os.O_RDWR | os.O_NOFOLLOW)
    try:
        ops.flock(fd)
        if _has_one_kernel(ops, fd):
            ops.lockf(fd)
        elif not (same_host or _is_old(ops, os.path.dirname(path), ops.fstat(fd))):
            logger.info("left %s for 24 hours: its writer may run on another machine", path)
            return
        # Should its writer have put the file in its place just now, then this path is gone: names
        # are never used twice.
        remove(path)
        logger.info("removed %s, which a crashed writer left", path)
    except BlockingIOError:
        pass
    finally:
        ops.close(fd)


def _has_one_kernel(ops: FileOps, fd: int) -> bool:
    try:
        return ops.fstatfs(fd) in _ONE_KERNEL
    except OSError:
        return False


def _is_old(ops: FileOps, directory: str, status: os.stat_result) -> bool:
    """Return whether a file was last modified at least 24 hours before one that is made now beside it."""
    path = os.path.join(directory, temporary_name("clock"))
    fd = ops.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        now = ops.fstat(fd).st_mtime
    finally:
        close_quietly(ops, fd)
        unlink_quietly(ops, path)
    return now - status.st_mtime >= _OLD_SECONDS
