"""Copies of checkpoints, and links to them, which may be pending."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING

from asyncckpt._trainer.locations import locate
from asyncckpt.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._saving.save import Outcome
    from asyncckpt._trainer.checkpoint_io import BackgroundIO


def refer(
    operation: Callable[..., Outcome[None]], source: str, target: str, io: BackgroundIO | None = None
) -> None:
    """Copy or link a checkpoint, which may be pending; in the background if there is an `io` for it."""
    directory, name = locate(target)
    relative = posixpath.relpath(posixpath.join(*locate(source)), directory)
    if io is None:
        operation(open_store(directory), relative, name).result()
    else:
        io.submitted.note(target, operation(io._open_store(directory), relative, name, causes=io.causes))
