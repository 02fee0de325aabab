"""Let all ranks decide one save together: committed or failed."""

from __future__ import annotations

import zlib
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from asyncckpt._ranks.calls import Call, StoppedError, call
from asyncckpt._ranks.decision import Decision, Phase, State
from asyncckpt._ranks.frames import packed, unpacked
from asyncckpt._ranks.ranges import named
from asyncckpt.errors import RankError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncckpt._ranks.coordination import Coordination

T = TypeVar("T")

_PAUSES = 3  # the background looks less often


class Round:
    """One save of all ranks, from its plan to its end.

    Make one on each rank right after the exchange. Then either `fail` is called, or the last wait is made
    (`outcome`; on rank 0 `end`): a rank is through then, and the store is cleared when all are. Every wait
    ends `timeout` seconds after it began, and fails the save for all ranks with an error that names those
    that are missing; so does an exception that is raised in it (Ctrl-C). A failed save stays failed: all
    later calls raise the error of the first rank that failed it.

    Any method but `fail` raises RankError if the save has failed, or if the store does not answer.

    Args:
        coordination: of the ranks.
        number: of the exchange.
        cancelled: looked at during waits; if true, the save is failed.

    Attributes:
        number: of the exchange.
        error: why the save has failed, once this rank knows.
    """

    def __init__(
        self, coordination: Coordination, number: int, cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        coordination.rounds.add(number)
        self.number = number
        self._ranks = coordination
        self._requests = coordination.requests
        self._decision = Decision(coordination.requests, number, coordination.size)
        self._cancelled = cancelled
        self._key = self._decision.key
        self._own = b""  # what rank 0 sends to itself
        self._using = Lock()  # held while keys are used; behind `_leave` they may be deleted
        self._left = self._failed = self._scattered = False
        self.error: RankError | None = None

    # --- on the training thread

    def gather(self, payload: bytes) -> list[bytes] | None:
        """Send a payload to rank 0; rank 0 waits and gets all of them, in order of rank, the others None."""
        return self._call(lambda running: self._gather(payload, running))

    def scatter(self, payloads: Sequence[bytes] | None = None) -> bytes:
        """Wait for the payload of this rank from rank 0, which passes one for each rank."""
        return self._call(lambda running: self._scatter(payloads, running))

    # --- in the background

    def begin(self, text: str) -> None:
        """Publish a text (rank 0)."""
        self._call(lambda _: self._change(lambda: self._decision.advance(Phase.BEGUN, text)))

    def begun(self) -> str:
        """Wait for the text of `begin` (other ranks, before they report)."""
        return self._call(
            lambda running: self._wait(Phase.BEGUN, running, lambda: self._late([0], "begun to write")).text
        )

    def report(self, payload: bytes) -> None:
        """Report that this rank has written its part (every rank, rank 0 too); does not wait."""
        self._call(lambda _: self._send("reports", payload, Phase.REPORTED))

    def reports(self) -> list[bytes]:
        """Wait for the reports of all ranks, decide to commit, and return them in order of rank (rank 0).

        Once it has returned, no other rank can fail the save.
        """
        return self._call(self._reports)

    def end(self, text: str) -> None:
        """Tell all ranks that the save is committed, and a text (rank 0)."""

        def work(_: Call) -> None:
            self._change(lambda: self._decision.advance(Phase.ENDED, text))
            self._leave()

        # An interrupt does not unmake a commit.
        call(work, lambda _: None, self._requests, self._ranks.timeout)

    def linger(self, seconds: float) -> None:
        """Wait until all ranks are through, no longer than so many seconds (rank 0, after `end`).

        Nor longer than a quarter of the timeout, within which the next save has to begin.

        The process that hosts the store may end then.
        """
        seconds = min(seconds, self._ranks.timeout / 4)

        def work(running: Call) -> None:
            while self._requests.peek(f"{self._key}/left") is not None and running.waited() < seconds:
                if running.stopped:
                    raise StoppedError
                running.pause(_PAUSES * self._ranks.longest_pause)

        with suppress(RankError):
            call(work, lambda _: None, self._requests, seconds)

    def outcome(self) -> str:
        """Wait for the end of the save, and return the text of `end` (other ranks).

        Raises:
            RankError: the save has failed; or rank 0 has decided to commit and then been silent for `timeout`
                seconds more: the message says that it may be committed.
        """

        def work(running: Call) -> str:
            text = self._wait(Phase.ENDED, running, self._late_end).text
            self._leave()
            return text

        return self._call(work)

    def fail(self, why: str) -> bool:
        """Fail the save for all ranks, on any rank, at any time, from any thread; raises no error.

        Without effect once the commit was decided (on rank 0, whose commit may fail, once it has ended).

        Returns:
            Whether the save has failed, for this reason or an earlier one. If not, it may be committed, or
            the store does not answer.
        """
        why = f"rank {self._ranks.rank}: {why}"
        try:
            return call(lambda _: self._fail(why), lambda _: None, self._requests, self._ranks.timeout)
        except RankError:
            return False

    def _call(self, work: Callable[[Call], T]) -> T:
        """Call `work`; an exception in the caller (Ctrl-C) fails the save."""
        why = f"rank {self._ranks.rank} was interrupted"
        return call(work, lambda _: self._fail(why), self._requests, self._ranks.timeout)

    def _gather(self, payload: bytes, running: Call) -> list[bytes] | None:
        self._send("plans", payload, Phase.GATHERED)
        if not self._ranks.leads:
            return None
        self._wait(Phase.GATHERED, running, self._late_plan)
        return self._received("plans")

    def _scatter(self, payloads: Sequence[bytes] | None, running: Call) -> bytes:
        if payloads is not None:
            self._change(lambda: self._publish(payloads))
            return payloads[0]
        self._wait(Phase.PLANNED, running, self._late_plan)
        return zlib.decompress(self._take(f"to/{self._ranks.rank}"))

    def _publish(self, payloads: Sequence[bytes]) -> State:
        self._scattered = True
        for rank, payload in enumerate(payloads[1:], 1):
            self._requests.append(f"{self._key}/to/{rank}", zlib.compress(payload, 1))
        return self._decision.advance(Phase.PLANNED)

    def _reports(self, running: Call) -> list[bytes]:
        self._wait(Phase.REPORTED, running, self._late_end)
        reports = self._received("reports")
        self._change(lambda: self._decision.advance(Phase.DECIDED))
        return reports

    def _send(self, kind: str, payload: bytes, last: Phase) -> None:
        """Send a payload to rank 0; the rank that sends the last one goes on to a phase."""

        def send() -> State | None:
            if self._ranks.leads:
                self._own = payload
            for frame in packed(self._ranks.rank, b"" if self._ranks.leads else payload):
                self._requests.append(f"{self._key}/{kind}", frame)
            sent = self._requests.add(f"{self._key}/{kind}/count", 1)
            return self._decision.advance(last) if sent == self._ranks.size else None

        self._change(send)

    def _received(self, kind: str) -> list[bytes]:
        """Return what all ranks have sent, and delete it."""
        payloads = unpacked(self._take(kind, f"{kind}/count"))
        return [self._own, *(payloads[rank] for rank in range(1, self._ranks.size))]

    def _wait(self, phase: Phase, running: Call, late: Callable[[], str]) -> State:
        """Wait for a phase; behind the deadline, fail the save for the reason that `late` returns, if any."""
        running.restart()
        decided = False
        while (state := self._use(self._decision.look)).phase < phase:
            if state.phase is Phase.DECIDED and not decided:
                decided = True
                running.restart()  # rank 0 may have waited nearly as long as this rank
            if running.stopped:
                raise StoppedError
            cancelled = self._cancelled()
            if not cancelled and running.waited() <= self._ranks.timeout:
                running.pause(_PAUSES * self._ranks.longest_pause)
            elif decided:
                raise self._doubt()
            elif why := f"rank {self._ranks.rank} was cancelled" if cancelled else late():
                self._fail(why)
            else:
                running.restart()
        if state.phase is Phase.FAILED:
            raise self._failure(state)
        return state

    def _use(self, func: Callable[[], T]) -> T:
        """Call `func`, which uses keys of this round, unless this rank has left it."""
        with self._using:
            if self._left:
                raise self.error or RankError("this save has ended")
            return func()

    def _change(self, func: Callable[[], State | None]) -> None:
        """Call `func`, and raise the error of the save if it returns that it has failed."""
        state = self._use(func)
        if state is not None and state.phase is Phase.FAILED:
            raise self._failure(state)

    def _take(self, key: str, *others: str) -> bytes:
        """Return the value of a key, and delete it, and others."""

        def take() -> bytes:
            value = self._requests.peek(f"{self._key}/{key}")
            self._requests.delete(*(f"{self._key}/{name}" for name in (key, *others)))
            return value or b""

        return self._use(take)

    def _fail(self, why: str) -> bool:
        """Fail the save if it can be failed; return whether it has failed."""
        with self._using:
            if self._left:
                return self._failed
            state = self._decision.fail(why, Phase.ENDED if self._ranks.leads else Phase.DECIDED)
        if state.phase is Phase.FAILED:
            self._failure(state)
        return state.phase is Phase.FAILED

    def _failure(self, state: State) -> RankError:
        """Leave a failed round, and return its error."""
        self._failed = True
        self.error = self.error or RankError(state.text)
        self._leave()
        return self.error

    def _doubt(self) -> RankError:
        """Leave a round whose commit was decided, and return the error that says so."""
        self.error = RankError(
            f"{self._late([0], 'ended the save')} after it decided to commit: the checkpoint may be committed"
        )
        self._leave()
        return self.error

    def _leave(self) -> None:
        """Note that this rank is through; the last one deletes the keys. Also where the store has failed."""
        with self._using, suppress(RankError):
            if self._left:
                return
            self._left = True
            scattered = self._decision.leave(scattered=self._scattered)
            if scattered is None:
                return
            self._decision.delete()
            if self._failed:  # otherwise those who read them have deleted them
                kinds = ["plans", "plans/count", "reports", "reports/count"]
                kinds += [f"to/{rank}" for rank in range(1, self._ranks.size) if scattered]
                self._requests.delete(*(f"{self._key}/{kind}" for kind in kinds))

    def _missing(self, kind: str, last: Phase) -> list[int]:
        """Return the ranks that have not sent a payload of a kind; if there are none, go on to a phase.

        A rank may have died when it had sent the last one.
        """

        def missing() -> list[int]:
            there = unpacked(self._requests.peek(f"{self._key}/{kind}") or b"").keys()
            others = [rank for rank in range(self._ranks.size) if rank not in there]
            if not others:
                self._decision.advance(last)
            return others

        return self._use(missing)

    def _late(self, ranks: list[int], what: str) -> str:
        return (
            f"{named(ranks)} had not {what} when rank {self._ranks.rank} had waited {self._ranks.timeout:g} s"
        )

    def _late_plan(self) -> str:
        return self._late_payloads("plans", Phase.GATHERED, "sent the plan", "sent its plan")

    def _late_end(self) -> str:
        return self._late_payloads("reports", Phase.REPORTED, "decided to commit", "written its part")

    def _late_payloads(self, kind: str, last: Phase, what: str, each: str) -> str:
        """Return which ranks have not sent a payload; nothing if it turns out that all have."""
        if self._use(self._decision.look).phase >= last:
            return self._late([0], what)
        missing = self._missing(kind, last)
        return self._late(missing, each) if missing else ""
