"""Let all ranks of a process group agree on a save before any of them begins it.

An exchange takes two requests a rank, and those of its wait; one server answers those of all ranks.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

from asyncckpt._ranks.arrivals import Arrivals, Note, Stage, State
from asyncckpt._ranks.calls import Call, Running, StoppedError, call
from asyncckpt._ranks.decision import Decision, Phase
from asyncckpt._ranks.ranges import from_ranges
from asyncckpt._ranks.requests import Requests
from asyncckpt.errors import BusyError, RankError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from collections.abc import Set as AbstractSet

    from asyncckpt._ranks.group import ProcessGroup

_GRACE = 2.0  # seconds in which ranks that wait answer a roll call
_CLOSING = 5.0  # seconds that deleting the last keys may take


@dataclass(frozen=True, slots=True)
class Exchange:
    """What all ranks have said; equal on all of them.

    Attributes:
        number: of the exchange, from 0; the same on all ranks. Failed exchanges have one, too.
        flags: which ranks raised a flag, in order; flags that no rank raised are absent.
    """

    number: int
    flags: Mapping[str, list[int]] = field(default_factory=dict)


class Coordination:
    """Coordinate the saves of all ranks through the key-value store of their group.

    All ranks make one; the k-th one of a name that is used on each rank belong together. No collective is
    used. `exchange` is for one thread at a time; the rounds of earlier exchanges may run beside it.

    Args:
        group: the ranks.
        name: keeps the keys of several coordinations apart.
        timeout: seconds that a rank waits for the others.
    """

    def __init__(self, group: ProcessGroup, name: str, timeout: float) -> None:
        self.rank, self.size = group.rank, group.size
        self.timeout = timeout
        self.requests = Requests(group, name)
        self._exchanging = Lock()
        self._noting = Lock()  # a call that was broken off may end beside the next one
        self.number = 0  # of the next exchange of this rank
        self.rounds: set[int] = set()  # exchanges whose rounds delete their keys themselves
        self.broken_off: set[int] = set()  # those whose rounds this rank has failed and left
        self._passed: list[tuple[int, State]] = []  # exchanges that other ranks may still look at
        self._spent: list[tuple[int, State]] = []  # exchanges that no rank will look at again

    @property
    def longest_pause(self) -> float:
        """Seconds between two looks at a key, so that all ranks together leave the store idle mostly."""
        return max(0.02, self.size * 2e-5)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def exchange(self, same: str, flags: Collection[str] = (), problem: str | None = None) -> Exchange:
        """Wait until all ranks have called this, and return what they said.

        Args:
            same: the call, with all that has to be equal on all ranks: "save(100)".
            flags: names of what holds on this rank ("changed", "busy").
            problem: why this rank cannot go on.

        Raises:
            RankError: on all ranks, with one text: a rank called with another `same`, has a problem, was
                interrupted, or has not called within the timeout; the message names it. A rank that comes
                late with the same text gets the same error; with another text, it takes part in the next
                exchange. The next exchange is a new one on all ranks. Also: the store does not answer.
            BusyError: another call of this rank has not ended within the timeout.
        """
        return self.exchanging(same, flags, problem).call()

    def exchanging(
        self, same: str, flags: Collection[str] = (), problem: str | None = None
    ) -> Running[Exchange]:
        """Return an exchange that is still to be started; the caller may do something else meanwhile."""
        note = Note(self.rank, same, sorted(flags), problem)
        begun: list[int] = []

        def work(running: Call) -> Exchange:
            if not self._exchanging.acquire(timeout=self.timeout):
                raise BusyError(
                    f"{same} cannot begin: an earlier call of rank {self.rank} still waits for others"
                )
            try:
                return self._exchange(note, running, begun)
            finally:
                self._exchanging.release()

        def undo(why: str | None) -> None:
            how = f" was interrupted in {same}" if why is None else f": {why}"
            self._break_off(begun[-1] if begun else self._next(), same, how)

        return Running(work, undo, self.requests, self.timeout)

    def refuse(self, number: int, same: str, why: str) -> None:
        """Fail an exchange on all ranks, without waiting for them; raises no error.

        For an exception (Ctrl-C) before `exchange` was called: the other ranks would wait for this one.
        Without effect if this rank has taken part in that exchange.

        Args:
            number: `self.number` as it was at the beginning of the call that is given up.
            same: the call.
            why: the reason that the other ranks raise.
        """

        def work(_: Call) -> None:
            if self.number == number:
                self._break_off(self._next(), same, f" gave up {same}: {why}")

        with suppress(RankError):
            call(work, lambda _: None, self.requests, self.timeout)

    def flags(self, number: int) -> AbstractSet[str] | None:
        """Return the flags of the last exchange, if that is its number and it is done; None otherwise."""
        passed, state = self._passed[-1] if self._passed else (-1, State(Stage.OPEN, ""))
        return state.flags.keys() if passed == number and state.stage is Stage.DONE else None

    def close(self) -> None:
        """Delete what is left in the store once all ranks have called this; waits for nobody."""

        def work(_: Call) -> None:
            self._delete(self._spent)
            if self.requests.add("closed", 1) == self.size:
                self._delete(self._passed)
                self.requests.delete("closed")

        with suppress(RankError):
            call(work, lambda _: None, self.requests, min(self.timeout, _CLOSING))

    def _exchange(self, note: Note, running: Call, begun: list[int]) -> Exchange:
        while True:
            running.restart()
            number = self._next()
            begun.append(number)
            if running.stopped:
                raise StoppedError
            arrivals = Arrivals(self.requests, number, self.size)
            came = arrivals.enter(note).stage is Stage.OPEN
            self._tidy()
            state = self._wait(arrivals, running, came=came)
            self._note(number, state)
            if state.stage is Stage.DONE:
                return Exchange(number, {flag: from_ranges(ranges) for flag, ranges in state.flags.items()})
            if came or state.same == note.same:
                raise RankError(state.text)
            # The others gave up waiting for this rank at a call that it has not made.

    def _wait(self, arrivals: Arrivals, running: Call, *, came: bool) -> State:
        """Wait for the end of an exchange; a rank that did not come in time waits for what the others say."""
        grace, calls, since = min(_GRACE, self.timeout), False, None
        while (state := arrivals.look()).stage not in {Stage.DONE, Stage.FAILED}:
            if running.stopped:
                raise StoppedError
            if state.stage is Stage.ROLL_CALL:
                if since is None:
                    since = running.waited()
                    if came:
                        arrivals.answer(self.rank)
                # The rank that called the roll counts the answers; others only if it has died.
                if (calls and arrivals.answered()) or running.waited() - since > grace * (1 if calls else 2):
                    arrivals.give_up(self.timeout)
                    continue
            elif running.waited() > self.timeout:
                calls = True
                arrivals.call_roll()
                continue
            running.pause(self.longest_pause)
        return state

    def _break_off(self, number: int, same: str, how: str) -> None:
        """Fail an exchange that this rank has given up; its round, if it is done."""
        text = f"rank {self.rank}{how}"
        state = Arrivals(self.requests, number, self.size).fail(same, text)
        self._note(number, state)
        if state.stage is Stage.FAILED:
            return
        self.rounds.add(number)
        self.broken_off.add(number)
        decision = Decision(self.requests, number, self.size)
        decision.fail(text, Phase.DECIDED)
        if decision.leave() is not None:
            decision.delete()

    def _next(self) -> int:
        with self._noting:
            self.number += 1
            return self.number - 1

    def _note(self, number: int, state: State) -> None:
        """Note how an exchange has ended; if it is done, all ranks have come past those before it."""
        with self._noting:
            if (number, state) not in self._passed:
                self._passed.append((number, state))
            if state.stage is Stage.DONE:
                self._spent += [passed for passed in self._passed if passed[0] < number]
                self._passed = [passed for passed in self._passed if passed[0] >= number]

    def _tidy(self) -> None:
        """Delete the keys that no rank needs, while others are yet to come."""
        if self.leads:
            self._delete(self._spent)
        spent = {number for number, _ in self._spent}
        self.rounds -= spent
        self.broken_off -= spent
        self._spent.clear()

    def _delete(self, exchanges: list[tuple[int, State]]) -> None:
        for number, state in exchanges:
            Arrivals(self.requests, number, self.size).delete(state)
            if number not in self.rounds and state.stage is Stage.DONE:
                Decision(self.requests, number, self.size).delete()
