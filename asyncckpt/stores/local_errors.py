"""Errors of the operating system, told as what, where, and what to do."""

# ruff: noqa: PTH120 - paths stay the str that the user gave

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from asyncckpt.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def translated(doing: str, path: str, *, absent_ok: bool = False) -> Iterator[None]:
    """Turn an OSError into a StoreError that says what was done, where, and what to do about it.

    Args:
        doing: what the operation does, to be read after "while".
        path: the file it does it to.
        absent_ok: let FileNotFoundError pass as it is: the file is one that the caller named.
    """
    try:
        yield
    except StoreError:
        raise
    except FileNotFoundError as error:
        if absent_ok:
            raise
        raise _store_error(error, doing, path) from error
    except OSError as error:
        raise _store_error(error, doing, path) from error


def size_text(nbytes: int) -> str:
    """Return a size for people: 1.5 GB."""
    for limit, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= limit:
            return f"{nbytes / limit:.1f} {unit}"
    return f"{nbytes} bytes"


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


def _store_error(error: OSError, doing: str, path: str) -> StoreError:
    code = error.errno or errno.EIO
    unknown = (f"{error.strerror or error} in {{}}", "check the disk and its mount")
    cause, advice = _CAUSES.get(code, unknown)
    return StoreError(code, f"{cause.format(os.path.dirname(path))} while {doing}; {advice}", path)
