"""Decide in one key of the store of a group whether all ranks have come to the same call."""

from __future__ import annotations

import json
import struct
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from asyncckpt._ranks.ranges import named, to_ranges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from asyncckpt._ranks.requests import Requests

_NOTE = 1 << 32  # what a rank with a note adds to the counter, beside 1
_MOST_PROBLEMS, _MOST_CALLS = 8, 8  # of a decision, which every rank reads
_LONGEST_PROBLEM = 1000  # in a note, which is appended by one request
_ADVICE = "make the same calls on every rank, in the same order"


class Stage(Enum):
    """How far an exchange is."""

    OPEN = 0
    ROLL_CALL = 1  # a rank waits no longer: who is there?
    DONE = 2
    FAILED = 3


class State(NamedTuple):
    """The value of the key.

    Attributes:
        stage: of the exchange.
        same: the call of the rank that came first.
        text: why the exchange has failed.
        flags: of an exchange that is done: the ranges of the ranks that raised each.
    """

    stage: Stage
    same: str
    text: str = ""
    flags: dict[str, list[list[int]]] = {}  # noqa: RUF012 - never changed

    def encoded(self) -> bytes:
        return json.dumps([self.stage.value, *self[1:]]).encode()


class Note(NamedTuple):
    """What a rank has to say."""

    rank: int
    same: str
    flags: list[str]
    problem: str | None


class Arrivals:
    """The keys of one exchange.

    Args:
        requests: to the store.
        number: of the exchange.
        size: how many ranks there are.
    """

    def __init__(self, requests: Requests, number: int, size: int) -> None:
        self._requests = requests
        self._size = size
        self._key = f"e{number}"

    def look(self) -> State:
        """Return the state."""
        return _decoded(self._requests.peek(self._key))

    def enter(self, note: Note) -> State:
        """Come to the exchange; the last rank decides. Not for a rank that comes after others gave up.

        Returns:
            The state that this rank found.
        """
        opened = State(Stage.OPEN, note.same).encoded()
        found = self._requests.swap(self._key, None, opened)
        state = _decoded(found)
        if state.stage is not Stage.OPEN:
            return state
        amount = 1
        if note.flags or note.problem is not None or note.same != state.same:
            note = note._replace(problem=note.problem and note.problem[:_LONGEST_PROBLEM])
            self._requests.append(f"{self._key}/notes", json.dumps(note).encode() + b"\n")
            amount += _NOTE
        total = self._requests.add(f"{self._key}/count", amount)
        if total % _NOTE == self._size:
            self._requests.swap(self._key, found, self._decide(state.same, noted=total > _NOTE).encoded())
        return state

    def call_roll(self) -> None:
        """Ask all ranks that wait to answer; those that come later are late."""
        self._change(lambda state: state._replace(stage=Stage.ROLL_CALL), {Stage.OPEN})

    def answer(self, rank: int) -> None:
        """Answer the roll call."""
        self._requests.append(f"{self._key}/here", struct.pack("<I", rank))
        self._requests.add(f"{self._key}/here/count", 1)

    def answered(self) -> bool:
        """Return whether all ranks that came have answered the roll call."""
        count, here = (
            int(self._requests.peek(f"{self._key}/{name}") or 0) for name in ("count", "here/count")
        )
        return here >= count % _NOTE

    def give_up(self, timeout: float) -> None:
        """Fail the exchange, and name the ranks that have not answered."""
        here = self._requests.peek(f"{self._key}/here") or b""
        missing = set(range(self._size)).difference(rank for (rank,) in struct.iter_unpack("<I", here))
        total = int(self._requests.peek(f"{self._key}/count") or 0)
        notes = self._notes() if total > _NOTE else []

        def failed(state: State) -> State:
            if missing:
                what = f"{named(missing)} did not take part in {state.same} within {timeout:g} s"
            else:
                what = f"a rank came to {state.same} more than {timeout:g} s after the first"
            text = "; ".join([what, *self._complaints(notes, state.same)])
            return State(Stage.FAILED, state.same, f"{text}; {_ADVICE}")

        self._change(failed, {Stage.ROLL_CALL})

    def fail(self, same: str, text: str) -> State:
        """Fail the exchange, unless it is done; return the state that is reached."""
        return self._change(
            lambda state: State(Stage.FAILED, state.same or same, text), {Stage.OPEN, Stage.ROLL_CALL}
        )

    def delete(self, state: State) -> None:
        """Delete all keys of an exchange that has ended with `state`."""
        self._requests.delete(self._key, f"{self._key}/count")
        if state.flags or state.stage is Stage.FAILED:
            self._requests.delete(f"{self._key}/notes")
        if state.stage is Stage.FAILED:
            self._requests.delete(f"{self._key}/here", f"{self._key}/here/count")

    def _change(self, change: Callable[[State], State], stages: set[Stage]) -> State:
        """Change the state while it is in one of `stages`; return that which is reached."""
        found = self._requests.peek(self._key)
        while (state := _decoded(found)).stage in stages:
            new = change(state)
            before, found = found, self._requests.swap(self._key, found, new.encoded())
            if found == before:  # the key is gone: all ranks are past this exchange
                return new
        return state

    def _decide(self, same: str, *, noted: bool) -> State:
        notes = self._notes() if noted else []
        complaints = self._complaints(notes, same)
        if complaints:
            return State(Stage.FAILED, same, "; ".join(complaints))
        flags: dict[str, list[int]] = {}
        for note in notes:
            for flag in note.flags:
                flags.setdefault(flag, []).append(note.rank)
        return State(Stage.DONE, same, "", {flag: to_ranges(ranks) for flag, ranks in flags.items()})

    def _complaints(self, notes: Iterable[Note], same: str) -> list[str]:
        calls: dict[str, list[int]] = {same: []}
        problems: dict[str, list[int]] = {}
        for note in notes:
            if note.same != same:
                calls.setdefault(note.same, []).append(note.rank)
            if note.problem is not None:
                problems.setdefault(note.problem, []).append(note.rank)
        texts = [f"{named(ranks)}: {problem}" for problem, ranks in problems.items()][:_MOST_PROBLEMS]
        if len(calls) > 1:
            others = {rank for ranks in calls.values() for rank in ranks}
            calls[same] = [rank for rank in range(self._size) if rank not in others]
            most = list(calls.items())[:_MOST_CALLS]
            each = ", ".join(f"{named(ranks)} {what}" for what, ranks in most)
            each += ", …" if len(calls) > len(most) else ""
            texts.append(f"the ranks call different things: {each}; {_ADVICE}")
        return texts

    def _notes(self) -> list[Note]:
        notes = self._requests.peek(f"{self._key}/notes") or b""
        return [Note(*json.loads(line)) for line in notes.splitlines()]


def _decoded(value: bytes | None) -> State:
    if value is None:  # no rank has come
        return State(Stage.OPEN, "")
    stage, same, text, flags = json.loads(value)
    return State(Stage(stage), same, text, flags)
