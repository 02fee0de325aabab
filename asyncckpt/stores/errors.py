"""Errors of operating systems and clients, translated to what failed, where, and what to do about it."""

# ruff: noqa: PTH120 - paths stay the str that the user gave

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from asyncckpt.errors import AsyncCkptError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


def local_errors(doing: str, path: str, *, absent_ok: bool = False) -> AbstractContextManager[None]:
    """Turn an OSError into a StoreError.

    Args:
        doing: what the operation does, to be read after "while".
        path: the file it does it to.
        absent_ok: let FileNotFoundError pass as it is: the file is one that the caller named.
    """
    return _translated(OSError, lambda error: _local_error(error, doing, path), absent_ok=absent_ok)


def remote_errors(doing: str, where: str, *, absent_ok: bool = False) -> AbstractContextManager[None]:
    """Turn whatever a file system or its client raises into a StoreError; for the arguments see above."""
    return _translated(Exception, lambda error: _remote_error(error, doing, where), absent_ok=absent_ok)


@contextmanager
def _translated(
    kind: type[Exception], translate: Callable[[Exception], StoreError], *, absent_ok: bool
) -> Iterator[None]:
    try:
        yield
    except AsyncCkptError:
        raise
    except kind as error:
        if absent_ok and isinstance(error, FileNotFoundError):
            raise
        raise translate(error) from error


_CAUSES: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("no space left on the disk that holds {}", "free space or choose another directory"),
    errno.EDQUOT: ("the disk quota for {} is used up", "free space or choose another directory"),
    errno.EFBIG: (
        "the file is larger than {} may hold",
        "raise the limit (ulimit -f) or use a file system for large files",
    ),
    errno.EACCES: ("no permission in {}", "check its owner and mode, or choose another directory"),
    errno.EPERM: ("no permission in {}", "check its owner and mode, or choose another directory"),
    errno.EROFS: ("{} is on a read-only file system", "mount it for writing or choose another directory"),
    errno.EMFILE: ("too many open files in this process", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many open files on this machine", "raise the limit (sysctl fs.file-max)"),
    errno.ENAMETOOLONG: ("the name is too long for {}", "use a shorter one"),
    errno.ENOENT: ("something in {} was removed meanwhile", "keep other programs out of it"),
    errno.EISDIR: ("a directory stands in the way in {}", "remove it or use another name"),
    errno.ENOTDIR: ("a part of {} is a file, not a directory", "choose another directory"),
    errno.EIO: ("the device that holds {} failed", "check it (dmesg), or choose another directory"),
}

_HINTS = {
    "NoCredentialsError": "give credentials in storage_options, in the environment or in a profile",
    "PartialCredentialsError": "give both the key and the secret",
    "PermissionError": "check the credentials and what they may do there",
    "TypeError": "check the names in storage_options",
    "InvalidRetryConfigurationError": "check the names in storage_options",
    "EndpointConnectionError": "check endpoint_url and the network",
}


def _local_error(error: Exception, doing: str, path: str) -> StoreError:
    code, said = _errno(error), getattr(error, "strerror", None) or error
    cause, advice = _CAUSES.get(code, (f"{said} in {{}}", "check the disk and its mount"))
    return StoreError(code, f"{cause.format(os.path.dirname(path))} while {doing}; {advice}", path)


def _remote_error(error: Exception, doing: str, where: str) -> StoreError:
    hint = _HINTS.get(type(error).__name__)
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    text = said.strip().partition("\n")[0] or type(error).__name__
    # How often the client made the request, where it says so.
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
    retries = int(response.get("ResponseMetadata", {}).get("RetryAttempts", 0))
    text = f"{text} (tried {retries + 1} times)" if retries else text
    return StoreError(_errno(error), f"while {doing}: {text}" + (f"; {hint}" if hint else ""), where)


def _errno(error: Exception) -> int:
    return (isinstance(error, OSError) and error.errno) or errno.EIO
