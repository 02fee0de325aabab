"""Ctrl-C at each point of a call: the other ranks learn it at once, and the next call works on all."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

from asyncckpt._ranks.coordination import Coordination, Exchange
from asyncckpt._ranks.round import Round
from asyncckpt.errors import RankError
from interrupts import interrupt_everywhere, wait_until
from rank_threads import Stores, failures, together

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Group:
    """Ranks 0 and 2 on threads; the main thread is rank 1."""

    def __init__(self, tmp_path: Path) -> None:
        self.stores = Stores("hash", tmp_path, size=3)
        self.ranks = self.stores.coordinations()
        self.mine = self.ranks[1]
        self._results: list[Any] = []
        self._thread = threading.Thread()

    def start(self, body: Callable[[Coordination], object]) -> None:
        """Call `body` with ranks 0 and 2."""
        self._results = []
        self._thread = threading.Thread(target=lambda: self._results.extend(together(self.ranks[::2], body)))
        self._thread.start()

    def results(self) -> list[Any]:
        """Return what they returned or raised."""
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self._results

    def exchange(self) -> list[Any]:
        """Make an exchange on all ranks."""
        self.start(lambda ranks: ranks.exchange("next"))
        return [self.mine.exchange("next"), *self.results()]

    def close(self) -> None:
        """Close all, and look for keys that are left."""
        self.exchange()
        together(self.ranks, Coordination.close)
        assert self.stores.left() == 0


@pytest.mark.parametrize("first", [True, False], ids=["others come first", "others come later"])
def test_an_interrupted_exchange_fails_on_all_ranks(tmp_path: Path, *, first: bool) -> None:
    group = Group(tmp_path)
    mine, interrupted = group.mine, threading.Event()
    number = 0

    def came() -> bool:
        return interrupted.is_set() or group.ranks[0].requests.peek(f"e{number}") is not None

    def exchange(ranks: Coordination) -> Exchange:
        if not first:
            wait_until(came, "the main thread does not come")
        return ranks.exchange("save")

    def before() -> None:
        nonlocal number
        number = mine.number
        interrupted.clear()
        group.start(exchange)

    def after(where: str) -> None:
        interrupted.set()
        if mine.number == number:  # it had not begun
            mine.exchange("save")
            assert group.results() == [Exchange(number)] * 2, where
        elif isinstance(group.results()[0], Exchange):  # its end was not reached
            assert group.results() == [Exchange(number)] * 2, where
            begun = together([Round(ranks, number) for ranks in group.ranks[::2]], Round.begun)
            assert failures(begun) == ["RankError: rank 1 was interrupted in save"] * 2, where
        else:
            assert failures(group.results()) == ["RankError: rank 1 was interrupted in save"] * 2, where
        assert group.exchange() == [Exchange(number + 1)] * 3, where

    assert interrupt_everywhere(lambda: mine.exchange("save"), before, after) > 10
    assert group.results() == [Exchange(number)] * 2
    group.close()


def test_an_interrupted_plan_fails_the_save_on_all_ranks(tmp_path: Path) -> None:
    group = Group(tmp_path)
    save: Round

    def plan(save: Round) -> bytes:
        plans = save.gather(b"")
        return save.scatter(plans)

    def others(ranks: Coordination) -> str:
        number = ranks.exchange("save").number
        save = Round(ranks, number)
        plan(save)
        return save.begun()

    def before() -> None:
        nonlocal save
        group.start(others)
        save = Round(group.mine, group.mine.exchange("save").number)

    def after(where: str) -> None:
        save.fail("interrupted elsewhere")
        for text in failures(group.results()):
            assert text in {
                "RankError: rank 1 was interrupted",
                "RankError: rank 1: interrupted elsewhere",
            }, where
        with pytest.raises(RankError, match="rank 1"):
            save.begun()

    assert interrupt_everywhere(lambda: plan(save), before, after) > 20
    after("the end")
    group.close()


def test_an_interrupted_wait_ends_that_of_the_others_at_once(tmp_path: Path) -> None:
    group = Group(tmp_path)

    def interrupt(ranks: Coordination) -> Exchange | None:
        if ranks.rank == 0:
            return ranks.exchange("save")
        wait_until(lambda: ranks.requests.peek("e0/count") == b"2", "the others do not come")
        os.kill(os.getpid(), signal.SIGINT)
        return None

    group.start(interrupt)  # rank 2 does not come
    with pytest.raises(KeyboardInterrupt):
        group.mine.exchange("save")
    assert failures(group.results()[:1]) == ["RankError: rank 1 was interrupted in save"]
    with pytest.raises(RankError, match="rank 1 was interrupted in save"):
        group.ranks[2].exchange("save")
    group.close()


def test_an_exchange_is_refused_for_all_ranks_unless_it_was_made(tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.start(lambda ranks: ranks.exchange("save"))
    group.mine.refuse(0, "save", "out of memory")
    assert failures(group.results()) == ["RankError: rank 1 gave up save: out of memory"] * 2
    assert group.exchange() == [Exchange(1)] * 3
    group.mine.refuse(1, "next", "out of memory")
    assert group.exchange() == [Exchange(2)] * 3
    group.close()
