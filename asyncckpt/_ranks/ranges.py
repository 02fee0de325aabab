"""Name ranks in messages and in keys, many of them in few characters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST_NAMED = 16


def to_ranges(ranks: Iterable[int]) -> list[list[int]]:
    """Return the first and the last rank of each unbroken range."""
    ranges: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    return ranges


def from_ranges(ranges: Iterable[list[int]]) -> list[int]:
    """Return the ranks."""
    return [rank for first, last in ranges for rank in range(first, last + 1)]


def named(ranks: Iterable[int]) -> str:
    """Return "rank 3", or "ranks 0-2, 5"."""
    ranges = to_ranges(ranks)
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:_MOST_NAMED]]
    more = ", …" if len(ranges) > _MOST_NAMED else ""
    one = len(ranges) == 1 and ranges[0][0] == ranges[0][1]
    return f"rank{'' if one else 's'} {', '.join(texts)}{more}"
