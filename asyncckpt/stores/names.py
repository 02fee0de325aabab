"""Names of files: which are allowed, and those of temporary files."""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
from functools import cache
from hashlib import blake2b
from pathlib import Path

from asyncckpt.errors import StoreError

TEMPORARY = re.compile(r"\..*\.([0-9a-f]{8})\.[0-9a-f]{16}\.asyncckpt-tmp", re.DOTALL)
"""Temporary files; the group is the tag of the host that made it."""

# What a temporary name keeps of the name it is for: enough for a person, short enough for any file system.
_KEPT_BYTES = 80


def checked_name(name: str, *, longest: int | None = None) -> str:
    """Return `name`, or raise StoreError if it is not the flat name of a file of at most `longest` bytes."""
    too_long = longest is not None and len(os.fsencode(name)) > longest
    if name in {"", ".", ".."} or "/" in name or "\0" in name or too_long:
        limit = f" of at most {longest} bytes" if longest else ""
        message = f"{name!r} cannot be the name of a file; use one without slashes{limit}"
        raise StoreError(errno.EINVAL, message)
    return name


def checked_source(source: str, *, longest: int | None = None) -> str:
    """Return `source`, or raise StoreError if it is not a name or the relative path of a file."""
    checked_name(source if source.startswith("/") else source.rpartition("/")[2], longest=longest)
    return source


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
    return TEMPORARY.fullmatch(name) is not None
