"""Temporary files: their names, and what becomes of those whose writer died."""

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

_PATTERN = re.compile(r"\..*\.([0-9a-f]{8})\.[0-9a-f]{16}\.asyncckpt-tmp", re.DOTALL)

# What a file keeps of the name it is for: enough for a person, and short enough for any file system.
_KEPT_BYTES = 80

_CANNOT_LOCK = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})


@cache
def host_tag() -> str:
    """Return eight hex digits for this machine, the same after a restart.

    A lock says whether a writer lives only on the machine that both run on. The host name alone may
    be the same on several machines, and so may the machine id in containers: the tag is of both.
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
    """Tell whether a name is one of a temporary file, on whatever machine it was made."""
    return _PATTERN.fullmatch(name) is not None


def hold(ops: FileOps, fd: int, path: str) -> bool:
    """Lock a temporary file that was just made; False if a cleaner had it first.

    Where the file system knows no locks it stays unlocked, and safe: no cleaner can lock it either.
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
    """Remove the temporary files that writers on this machine left when they died.

    Those of living writers are locked. Nothing else is touched, and what cannot be removed is left.
    """
    for entry in ops.scandir(directory):
        match = _PATTERN.fullmatch(entry.name)
        if match is None or match[1] != host_tag():
            continue
        try:
            if entry.is_symlink():
                # It cannot be locked. It lives for microseconds, until it is moved to its place, and
                # its maker begins again if it is taken away.
                ops.unlink(entry.path)
            elif entry.is_file(follow_symlinks=False):
                _remove_unheld(ops, entry.path)
        except FileNotFoundError:
            continue
        except OSError as error:
            logger.warning("could not remove the abandoned file %s: %s", entry.path, error)


def _remove_unheld(ops: FileOps, path: str) -> None:
    fd = ops.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        ops.flock(fd)
        # Should its writer have put the file in its place just now, then this path is gone: names
        # are never used twice.
        ops.unlink(path)
        logger.info("removed %s, which a writer left when it died", path)
    except BlockingIOError:
        pass
    finally:
        ops.close(fd)


def close_quietly(ops: FileOps, fd: int) -> None:
    """Close a descriptor through which nothing was written; a failure is logged."""
    try:
        ops.close(fd)
    except OSError as error:
        logger.warning("could not close a file: %s", error)


def unlink_quietly(ops: FileOps, path: str) -> None:
    """Remove a temporary file if it is still there; a failure is logged."""
    try:
        ops.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("could not remove the temporary file %s: %s", path, error)
