"""Descriptors of temporary files in forked children."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

# By which name each descriptor of this process was opened; Linux alone tells.
_DESCRIPTORS = "/proc/self/fd"
_REMOVED = " (deleted)"


def close_by_name(names: Collection[str]) -> None:
    """Close the descriptors of this process whose files have one of these names, or had it when removed.

    Call it while no other thread runs. It finds descriptors that another thread of the parent had just
    opened, or was about to close, at the fork, of which the parent's objects hold no number.
    """
    try:
        numbers = [int(number) for number in os.listdir(_DESCRIPTORS)]  # noqa: PTH208 - names are wanted
    except FileNotFoundError:
        return
    for number in numbers:
        # The descriptor of the listing itself is gone.
        with suppress(FileNotFoundError):
            link = os.readlink(f"{_DESCRIPTORS}/{number}")  # noqa: PTH115 - the text is wanted
            if link.rpartition("/")[2].removesuffix(_REMOVED) in names:
                os.close(number)
