"""Directory and name of a checkpoint's path or URL, and its step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.core import split_protocol

if TYPE_CHECKING:
    from collections.abc import Mapping


def is_local(path: str | Path) -> bool:
    """Return whether `path` is one of a mounted file system."""
    return split_protocol(os.fspath(path))[0] in {None, "file", "local"}


def locate(path: str | Path) -> tuple[str, str]:
    """Return directory and name; of a local path absolute, with the links of the directory resolved."""
    if not is_local(path):
        directory, _, name = str(path).rpartition("/")
        return directory, name
    full = Path(split_protocol(os.fspath(path))[1]).expanduser().absolute()
    return str(full.parent.resolve()), full.name


def step_of(checkpoint: Mapping[str, Any]) -> int | None:
    """Return the step of a checkpoint of a Trainer; None if there is none."""
    step = checkpoint.get("global_step")
    return step if isinstance(step, int) else None
