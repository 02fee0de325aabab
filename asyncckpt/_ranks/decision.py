"""Decide a save of all ranks in one key of their store, so that they all see the same end of it."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from asyncckpt._ranks.requests import Requests

_SCATTERED = 1 << 32  # what a rank adds to the counter that has scattered, beside 1
_LONGEST_TEXT = 4000  # every rank reads it


class Phase(IntEnum):
    """How far a save is. Each step is one `compare_set`, from the phases before only."""

    NOTHING = 0
    GATHERED = 1
    PLANNED = 2
    BEGUN = 3
    REPORTED = 4
    DECIDED = 5  # to commit; only rank 0 goes on from here
    ENDED = 6
    FAILED = 7


class State(NamedTuple):
    """The value of the key."""

    phase: Phase
    text: str = ""


class Decision:
    """The key of one save, and the counter of the ranks that need it no longer."""

    def __init__(self, requests: Requests, number: int, size: int) -> None:
        self._requests = requests
        self._size = size
        self.key = f"r{number}"

    def look(self) -> State:
        """Return the state."""
        return _decoded(self._requests.peek(self.key))

    def advance(self, phase: Phase, text: str = "") -> State:
        """Go on to a phase, unless a later one is reached; return the state that is reached."""
        return self._change(phase, text, Phase(phase - 1))

    def fail(self, why: str, before: Phase) -> State:
        """Fail the save if it is in a phase before `before`; return the state that is reached."""
        return self._change(Phase.FAILED, why[:_LONGEST_TEXT], Phase(before - 1))

    def leave(self, *, scattered: bool = False) -> bool | None:
        """Note that this rank needs the keys no longer.

        Returns:
            None while other ranks need them; for the last rank, whether any said that it `scattered`.
        """
        left = self._requests.add(f"{self.key}/left", 1 + (_SCATTERED if scattered else 0))
        return left > _SCATTERED if left % _SCATTERED == self._size else None

    def delete(self) -> None:
        """Delete both keys."""
        self._requests.delete(self.key, f"{self.key}/left")

    def _change(self, phase: Phase, text: str, latest: Phase) -> State:
        seen, new = self._requests.peek(self.key), f"{phase:d}{text}".encode()
        while _decoded(seen).phase <= latest:
            found = self._requests.swap(self.key, seen, new)
            if found == new:
                return State(phase, text)
            if found == seen:  # the key is gone: all ranks have left
                break
            seen = found
        return _decoded(seen)


def _decoded(value: bytes | None) -> State:
    return State(Phase(int(value[:1])), value[1:].decode()) if value else State(Phase.NOTHING)
