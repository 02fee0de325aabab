"""Note each file that is synced; every Python that has this directory on its path imports it at its start."""

from __future__ import annotations

import os
import sys
from functools import wraps
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

VARIABLE = "ASYNCCKPT_NOTE_FSYNCS"  # as in fsync_notes.py


def noting(sync: Callable[[Any], None], log: str) -> Callable[[Any], None]:
    """Return `sync`, which from now on notes device and inode of what it has synced."""

    @wraps(sync)
    def noted(fd: Any) -> None:
        sync(fd)
        status = os.fstat(fd if isinstance(fd, int) else fd.fileno())
        # Opened each time: a number that is kept might be closed by others and then be another file's.
        notes = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(notes, f"{status.st_dev} {status.st_ino}\n".encode())
        finally:
            os.close(notes)

    return noted


def run_hidden() -> None:
    """Run the sitecustomize that is hidden by this one, if there is one."""
    here = Path(__file__).resolve().parent
    spec = PathFinder.find_spec(__name__, [entry for entry in sys.path if Path(entry).resolve() != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


log = os.environ.get(VARIABLE)
if log is not None:
    for name in ("fsync", "fdatasync"):
        if hasattr(os, name):
            setattr(os, name, noting(getattr(os, name), log))
run_hidden()
