"""Drafts in forked children: they are the parent's, whose descriptors a child closes."""

# ruff: noqa: PTH112, PTH115, PTH208 - plain calls, in a child in which only this thread runs

from __future__ import annotations

import os
from contextlib import suppress
from typing import Protocol
from weakref import WeakSet

# Under which name each descriptor of this process was opened, on Linux; what follows that of a removed file.
_DESCRIPTORS = "/proc/self/fd"
_REMOVED = " (deleted)"


class Forked(Protocol):
    """A draft that holds descriptors."""

    def disown(self) -> str:
        """End in a forked child: close what it inherited, and leave the files to the parent.

        Returns:
            The name of the temporary file or folder, of which more descriptors may be open.
        """


def disown_in_children(draft: Forked) -> None:
    """Let every child that is forked from now on disown a draft."""
    _drafts.add(draft)


def _disown_all() -> None:
    """Close every descriptor of a draft in a forked child, where only this thread runs.

    Those that another thread of the parent had just opened, or was about to close, are found by name: the
    objects hold no number of them.
    """
    names = {draft.disown() for draft in list(_drafts)} - {""}
    for number in os.listdir(_DESCRIPTORS) if names and os.path.isdir(_DESCRIPTORS) else []:
        # The descriptor of the listing itself is gone.
        with suppress(FileNotFoundError):
            link = os.readlink(f"{_DESCRIPTORS}/{number}")
            if not names.isdisjoint(link.removesuffix(_REMOVED).split("/")):
                os.close(int(number))


_drafts: WeakSet[Forked] = WeakSet()
os.register_at_fork(after_in_child=_disown_all)
