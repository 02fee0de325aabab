"""The checkpoints of a directory, series by series."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncckpt._naming import NameTemplate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asyncckpt.types import Checkpoint


def by_series(checkpoints: Iterable[Checkpoint]) -> dict[str | None, list[Checkpoint]]:
    """Return the checkpoints of each series, in the order given.

    What has no place in the order of commits is of no series, and neither is a copy under another name. A
    file of an old version, which does not tell its series, is of the one whose template makes its name; those
    that are of none are one series together, None.
    """
    committed = [checkpoint for checkpoint in checkpoints if checkpoint.sequence]
    templates = _templates(committed)
    found: dict[str | None, list[Checkpoint]] = {}
    for checkpoint in committed:
        owner = next((key for key, names in templates.items() if names.owns(checkpoint)), None)
        if owner is not None or checkpoint.filename is None:
            found.setdefault(owner, []).append(checkpoint)
    return found


def series_text(key: str | None) -> str:
    """Return a series as it stands in a table."""
    return "(not told)" if key is None else key


def _templates(checkpoints: Iterable[Checkpoint]) -> dict[str, NameTemplate]:
    found = {}
    for filename in dict.fromkeys(checkpoint.filename for checkpoint in checkpoints):
        if filename is not None:
            try:
                found[filename] = NameTemplate(filename)
            except ValueError:  # no Checkpointer has written it
                continue
    return found
