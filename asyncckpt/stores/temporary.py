"""Temporary files and folders: their names and their locks."""

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
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from asyncckpt.stores.fileops import FileOps

logger = logging.getLogger(__name__)

# The groups are what is kept of the name, the tag of the host, the digits and the kind.
_PATTERN = re.compile(r"\.(.*)\.([0-9a-f]{8})\.([0-9a-f]{16})\.asyncckpt-(tmp|old|folder)", re.DOTALL)

# What a temporary name keeps of the name it is for: enough for a person, short enough for any file system.
_KEPT_BYTES = 80

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
    """Return a name, not used before, for a file or folder that is to become `name`."""
    return _new_name(os.fsencode(name)[:_KEPT_BYTES].decode(errors="ignore"), "tmp")


def name_aside(name: str) -> str:
    """Return a name, not used before, for what is moved from `name` while that is replaced."""
    return _new_name(name, "old")


def intent_name(name: str) -> str:
    """Return a name, not used before, for the record of what is done to a folder of a remote directory."""
    return _new_name(os.fsencode(name)[:_KEPT_BYTES].decode(errors="ignore"), "folder")


def _new_name(kept: str, kind: str) -> str:
    return f".{kept}.{host_tag()}.{secrets.token_hex(8)}.asyncckpt-{kind}"


class TemporaryName(NamedTuple):
    """What a temporary name tells.

    Attributes:
        kept: the first bytes of the name it is for; of what was moved aside, all of them.
        host: the tag of the machine that made it.
        digits: what tells it from others of that name and machine.
        kind: "tmp" for a draft, "old" for what was moved aside, "folder" for the record of an intent.
    """

    kept: str
    host: str
    digits: str
    kind: str


def parse_temporary(name: str) -> TemporaryName | None:
    """Take a temporary name apart, on whatever machine it was made; None for any other name."""
    match = _PATTERN.fullmatch(name)
    return TemporaryName(*match.groups()) if match else None


def is_temporary(name: str) -> bool:
    """Return whether a name is a temporary one, on whatever machine it was made."""
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
