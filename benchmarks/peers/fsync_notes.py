"""Which files were synced, by whatever Python process had a hand in it."""

from __future__ import annotations

import os
from pathlib import Path

HOOK = Path(__file__).resolve().with_name("fsyncs")
VARIABLE = "ASYNCCKPT_NOTE_FSYNCS"  # as in fsyncs/sitecustomize.py


class Notes:
    """The calls of os.fsync and os.fdatasync in the processes that were started with `environment`.

    What is synced by other means than these two (`O_SYNC`, a library in C) is not seen.

    Args:
        folder: an existing directory for the notes.

    Attributes:
        environment: variables for the measured process; the Python processes that it starts have them, too.
    """

    def __init__(self, folder: Path) -> None:
        self._log = folder.resolve() / "fsyncs"
        before = os.environ.get("PYTHONPATH")
        path = f"{HOOK}{os.pathsep}{before}" if before else str(HOOK)
        self.environment = {"PYTHONPATH": path, VARIABLE: str(self._log)}
        self.forget()

    def forget(self) -> None:
        """Start anew; without this, a new file may be taken for an old one whose inode it has been given."""
        self._log.write_bytes(b"")

    def synced(self, path: Path) -> bool:
        """Whether every regular file under `path`, a file or a directory, was synced."""
        noted = set(self._log.read_text(encoding="ascii").splitlines())
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        found = [file.stat() for file in files]
        return bool(found) and all(f"{file.st_dev} {file.st_ino}" in noted for file in found)
