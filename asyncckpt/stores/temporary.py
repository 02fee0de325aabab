"""Temporary files: their names, their locks, and the removal of those that crashed writers left."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import socket
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncckpt.stores.fileops import FileOps

logger = logging.getLogger(__name__)

# The group is the tag of the host.
_PATTERN = re.compile(r"\..*\.([0-9a-f]{8})\.[0-9a-f]{16}\.asyncckpt-tmp", re.DOTALL)

# What a temporary name keeps of the name it is for: enough for a person, short enough for any file system.
_KEPT_BYTES = 80

# Types of file systems, by statfs(2), that cannot be mounted by several kernels at once: ext2 to ext4, XFS,
# btrfs; tmpfs, ramfs, overlayfs; ZFS, F2FS, bcachefs.
_ONE_KERNEL = {0xEF53, 0x58465342, 0x9123683E} | {0x01021994, 0x858458F6, 0x794C7630}
_ONE_KERNEL |= {0x2FC12FC1, 0xF2F52010, 0xCA451A4E}
_OLD_SECONDS = 24 * 3600

_CANNOT_LOCK = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})


@cache
def host_tag() -> str:
    """Return eight hex digits for this machine, the same after a restart.

    The host name alone may be the same on several machines, and so may the machine id in containers:
    the tag is of both. A restarted container usually has another one.
    """
    try:
        machine = Path("/etc/machine-id").read_bytes()
    except OSError:
        machine = b""
    return blake2b(socket.gethostname().encode() + b"\0" + machine, digest_size=4).hexdigest()


def temporary_name(name: str) -> str:
    """Return a name, not used before, for a file that is to become `name`."""
    kept = os.fsencode(name)[:_KEPT_BYTES].decode(errors="ignore")
    return f".{kept}.{host_tag()}.{secrets.token_hex(8)}.asyncckpt-tmp"


def is_temporary(name: str) -> bool:
    """Return whether a name is one of a temporary file, on whatever machine it was made."""
    return _PATTERN.fullmatch(name) is not None


def hold(ops: FileOps, fd: int, path: str) -> bool:
    """Lock a temporary file that was just made; False if a starting writer removes it as abandoned.

    Where the file system knows no locks it stays unlocked, and safe: nobody else can lock it either.
    """
    try:
        ops.flock(fd)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
    try:
        ops.lstat(path)
    except FileNotFoundError:
        return False
    return True


def remove_abandoned(ops: FileOps, directory: str) -> None:
    """Remove the temporary files of crashed writers.

    A writer locks its file as long as it runs. A lock that can be taken proves that the writer is gone

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
        match = _PATTERN.fullmatch(entry.name)
        if match is None:
            continue
        same_host = match[1] == host_tag()
        try:
            if entry.is_symlink():
                # It exists for microseconds, until it is moved to its place; its writer begins again if it is
                # removed meanwhile.
                if same_host or _is_old(ops, directory, ops.lstat(entry.path)):
                    ops.unlink(entry.path)
            elif entry.is_file(follow_symlinks=False):
                _remove_unlocked(ops, directory, entry.path, same_host=same_host)
        except FileNotFoundError:
            continue
        except OSError as error:
            logger.warning("could not remove the abandoned file %s: %s", entry.path, error)


def _remove_unlocked(ops: FileOps, directory: str, path: str, *, same_host: bool) -> None:
    fd = ops.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        ops.flock(fd)
        if _has_one_kernel(ops, fd):
            ops.lockf(fd)
        elif not (same_host or _is_old(ops, directory, ops.fstat(fd))):
            logger.info("left %s for 24 hours: its writer may run on another machine", path)
            return
        # Should its writer have put the file in its place just now, then this path is gone: names
        # are never used twice.
        ops.unlink(path)
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
    path = os.path.join(directory, temporary_name("clock"))  # noqa: PTH118 - paths stay the str that was given
    fd = ops.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        now = ops.fstat(fd).st_mtime
    finally:
        close_quietly(ops, fd)
        unlink_quietly(ops, path)
    return now - status.st_mtime >= _OLD_SECONDS


def close_quietly(ops: FileOps, fd: int) -> None:
    """Close a descriptor through which nothing was written; a failure is logged."""
    try:
        ops.close(fd)
    except OSError as error:
        logger.warning("could not close a file: %s", error)


def unlink_quietly(ops: FileOps, path: str) -> None:
    """Remove a temporary file if it still exists; a failure is logged."""
    try:
        ops.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("could not remove the temporary file %s: %s", path, error)
