"""The law of coordination: ranks that go on agree, wherever others die, hang, fail or stay away."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from asyncckpt._ranks.coordination import Coordination, Exchange
from asyncckpt._ranks.group import ProcessGroup
from asyncckpt._ranks.round import Round
from asyncckpt.errors import BusyError, RankError
from interrupts import wait_until
from rank_threads import hash_store, together

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE, STEPS, TIMEOUT = 4, 5, 0.25
COMMITTED, IN_DOUBT = "committed", "may be committed"


class Died(BaseException):
    """The process of a rank has ended."""


class FaultyStore:
    """A store as one rank has it: one of its requests takes too long, or it dies in one.

    Args:
        store: the real one.
        at: number of that request, counted from 1; the rank dies if it is negative.
        slowness: seconds that it takes.
    """

    def __init__(self, store: Any, at: int | None, slowness: float) -> None:
        self._store, self._at, self._slowness, self._number = store, at, slowness, 0

    def heal(self) -> None:
        """Have no fault any longer."""
        self._at = None

    def _request(self, name: str, *args: Any) -> Any:
        self._number += 1
        if self._at is not None and self._number >= -self._at > 0:
            raise Died
        if self._number == self._at:
            time.sleep(self._slowness)
        return getattr(self._store, name)(*args)

    def compare_set(self, *args: Any) -> Any:
        return self._request("compare_set", *args)

    def add(self, *args: Any) -> Any:
        return self._request("add", *args)

    def append(self, *args: Any) -> Any:
        return self._request("append", *args)

    def delete_key(self, *args: Any) -> Any:
        return self._request("delete_key", *args)


class Rank:
    """One rank of a simulation, and what it has seen.

    Attributes:
        exchanges: what each exchange ended with, by number.
        saves: what each save ended with.
        silences: how many calls the store did not answer in time.
    """

    def __init__(self, ranks: Coordination, seed: int) -> None:
        self.ranks = ranks
        self.exchanges: dict[int, Exchange | str] = {}
        self.saves: dict[int, str] = {}
        self.silences = 0
        self.died = False
        self._random = random.Random(f"{seed} {ranks.rank}")

    def run(self) -> None:
        try:
            for step in range(STEPS):
                if self._random.random() > 0.05:  # otherwise it leaves out a call
                    self._step(step)
        except Died:
            self.died = True

    def _step(self, step: int) -> None:
        before = self.ranks.number
        try:
            said = self.ranks.exchange(
                f"save({step})",
                ["busy"] if self._random.random() < 0.3 else [],
                "no memory" if self._random.random() < 0.05 else None,
            )
        except (RankError, BusyError) as error:
            if self._heard(error) and self.ranks.number > before:
                self.exchanges[self.ranks.number - 1] = str(error)
            return
        self.exchanges[said.number] = said
        save = Round(self.ranks, said.number)
        steps = self._steps(save)
        fails_at = self._random.randrange(len(steps)) if self._random.random() < 0.1 else None
        try:
            for number, call in enumerate(steps):
                if number == fails_at and save.fail("disk full"):
                    return
                call()
        except RankError as error:
            if self._heard(error):
                self.saves[said.number] = str(error)
            save.fail("given up")
        else:
            self.saves[said.number] = COMMITTED

    def _heard(self, error: Exception) -> bool:
        silent = isinstance(error, BusyError) or "has not answered" in str(error)
        self.silences += silent
        return not silent

    def _steps(self, save: Round) -> list[Callable[[], Any]]:
        lead = self.ranks.leads
        return [
            lambda: save.gather(b""),
            lambda: save.scatter([b""] * SIZE if lead else None),
            lambda: save.begin("folder") if lead else save.begun(),
            lambda: save.report(b""),
            lambda: save.reports() if lead else None,
            lambda: save.end("committed") if lead else save.outcome(),
        ]


def check(seed: int) -> None:
    """Run a simulation, and check that the ranks agree."""
    chosen = random.Random(seed)
    store = hash_store()
    faults = [chosen.choice([None, None, None, 1, 1, -1]) for _ in range(SIZE)]
    stores = [
        FaultyStore(store, fault and fault * chosen.randrange(1, 80), TIMEOUT * chosen.choice([0.7, 2]))
        for fault in faults
    ]
    ranks = [
        Rank(Coordination(ProcessGroup(stores[rank], rank, SIZE), "law", TIMEOUT), seed)
        for rank in range(SIZE)
    ]
    assert together(ranks, Rank.run) == [None] * SIZE
    for number in range(STEPS * SIZE):
        exchanges = [rank.exchanges[number] for rank in ranks if number in rank.exchanges]
        assert all(said == exchanges[0] for said in exchanges), (seed, number, exchanges)
        saves = {rank.saves[number] for rank in ranks if number in rank.saves}
        failed = {text for text in saves if text != COMMITTED and IN_DOUBT not in text}
        assert len(failed) <= 1, (seed, number, saves)
        assert not failed or failed == saves, (seed, number, saves)
    if not any(rank.died for rank in ranks):
        for faulty in stores:
            faulty.heal()
        heal(seed, ranks, store)


def heal(seed: int, ranks: list[Rank], store: Any) -> None:
    """Check that the ranks find each other again, and leave no keys."""
    for rank in ranks:
        rank.ranks.timeout = 30
    for call in ("end(1)", "end(2)", "end(3)"):  # one may meet a call that the store did not answer in time
        ends = together([rank.ranks for rank in ranks], partial(Coordination.exchange, same=call))
        if all(isinstance(said, Exchange) for said in ends):
            break
    assert all(said == ends[0] and isinstance(said, Exchange) for said in ends), (seed, ends)
    together(ranks, lambda rank: rank.ranks.close())
    # A call that the store did not answer in time may be broken off behind the end of all.
    if not any(rank.silences for rank in ranks):
        wait_until(lambda: store.num_keys() == 0, f"seed {seed}: keys are left")


@pytest.mark.parametrize("first", [0, pytest.param(1000, marks=pytest.mark.soak)])
def test_ranks_that_go_on_agree_on_every_exchange_and_every_save(first: int) -> None:
    for seeds in range(first, first + (20 if first else 2)):
        results = together(range(8 * seeds, 8 * seeds + 8), check)
        assert results == [None] * 8
