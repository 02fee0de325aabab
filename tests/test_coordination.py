"""Exchanges: all ranks learn the same of each other, or get the same error."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from asyncckpt._ranks.arrivals import Arrivals, Stage, State
from asyncckpt._ranks.coordination import Coordination, Exchange
from asyncckpt._ranks.group import ProcessGroup
from asyncckpt._ranks.ranges import named
from asyncckpt.errors import BusyError, RankError
from interrupts import wait_until
from rank_threads import KINDS, Stores, failures, hash_store, tcp_store, together

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=KINDS)
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Stores:
    return Stores(request.param, tmp_path, size=4)


def late(ranks: list[Coordination], timeout: float = 0.3) -> None:
    """Make ranks wait for a short time only."""
    for rank in ranks:
        rank.requests.peek("connected")  # which may take longer than the timeout
        rank.timeout = timeout


def test_all_ranks_learn_which_ranks_raised_which_flag(stores: Stores) -> None:
    flags = [["changed"], [], ["busy", "changed"], ["changed"]]
    results = together(stores.coordinations(), lambda ranks: ranks.exchange("save(1)", flags[ranks.rank]))
    assert results == [Exchange(0, {"changed": [0, 2, 3], "busy": [2]})] * 4


def test_exchanges_are_numbered_and_leave_no_keys(stores: Stores) -> None:
    def many(ranks: Coordination) -> list[int]:
        numbers = [
            ranks.exchange(f"save({step})", ["busy"] * (step % 3 == ranks.rank)).number for step in range(30)
        ]
        assert stores.left() <= 12  # of this exchange and the one before it
        ranks.exchange("done")
        ranks.close()
        return numbers

    assert together(stores.coordinations(), many) == [list(range(30))] * 4
    assert stores.left() == 0


def test_coordinations_of_a_name_are_told_apart_by_their_order(stores: Stores) -> None:
    first, second, other = stores.coordinations(), stores.coordinations(), stores.coordinations(name="other")
    for ranks in (first, second, other):
        assert together(ranks, lambda ranks: ranks.exchange("save(1)")) == [Exchange(0)] * 4


def test_different_calls_are_an_error_on_all_ranks(stores: Stores) -> None:
    ranks = stores.coordinations()
    calls = ["save(1)", "save(1)", "save(2)", "save(1)"]
    texts = failures(together(ranks, lambda ranks: ranks.exchange(calls[ranks.rank])))
    assert len(set(texts)) == 1
    assert "RankError: the ranks call different things: " in texts[0]
    assert "ranks 0-1, 3 save(1)" in texts[0]
    assert "rank 2 save(2)" in texts[0]
    assert together(ranks, lambda ranks: ranks.exchange("save(3)")) == [Exchange(1)] * 4


def test_problems_are_an_error_on_all_ranks_that_names_them(stores: Stores) -> None:
    ranks = stores.coordinations()
    problems = [None, "no memory", None, "no memory"]
    texts = failures(together(ranks, lambda ranks: ranks.exchange("save(1)", problem=problems[ranks.rank])))
    assert texts == ["RankError: ranks 1, 3: no memory"] * 4
    assert together(ranks, lambda ranks: ranks.exchange("save(2)")) == [Exchange(1)] * 4


def test_long_problems_and_many_calls_are_shortened(tmp_path: Path) -> None:
    ranks = Stores("tcp", tmp_path, size=12).coordinations()
    texts = failures(
        together(
            ranks, lambda ranks: ranks.exchange(f"save({ranks.rank})", problem=f"{ranks.rank} " * 100_000)
        )
    )
    assert len(set(texts)) == 1
    assert texts[0].startswith("RankError: rank ")
    assert len(texts[0]) < 10_000
    assert ", …; make the same calls" in texts[0]


def test_ranks_that_do_not_come_are_named(stores: Stores) -> None:
    ranks = stores.coordinations()
    late(ranks)
    texts = failures(together(ranks[:2], lambda ranks: ranks.exchange("save(1)")))
    assert len(set(texts)) == 1
    assert "ranks 2-3 did not take part in save(1) within 0.3 s" in texts[0]


def test_problems_are_told_if_other_ranks_do_not_come(stores: Stores) -> None:
    ranks = stores.coordinations()
    late(ranks)
    problems = [None, None, "no memory"]
    texts = failures(
        together(ranks[:3], lambda ranks: ranks.exchange("save(1)", problem=problems[ranks.rank]))
    )
    assert len(set(texts)) == 1
    assert "rank 3 did not take part" in texts[0]
    assert "rank 2: no memory" in texts[0]


def test_a_late_rank_gets_the_same_error_and_the_next_exchange_works(stores: Stores) -> None:
    ranks = stores.coordinations()
    late(ranks)
    texts = failures(together(ranks[1:], lambda ranks: ranks.exchange("save(1)")))
    texts += failures(together(ranks[:1], lambda ranks: ranks.exchange("save(1)")))
    assert len(set(texts)) == 1
    late(ranks, 60)
    assert together(ranks, lambda ranks: ranks.exchange("save(2)")) == [Exchange(1)] * 4
    together(ranks, Coordination.close)
    assert stores.left() == 0


def test_a_rank_that_left_calls_out_takes_part_in_the_next(stores: Stores) -> None:
    ranks = stores.coordinations()
    late(ranks)
    for call in ("save(1)", "save(2)", "save(3)"):
        failures(together(ranks[1:], partial(Coordination.exchange, same=call)))
    late(ranks, 60)
    assert together(ranks, lambda ranks: ranks.exchange("save(4)")) == [Exchange(3)] * 4
    assert together(ranks, lambda ranks: ranks.exchange("save(5)")) == [Exchange(4)] * 4


def test_a_rank_that_died_while_it_waited_is_missing(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = stores.coordinations()
    late(ranks)

    def die(_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(ranks[2].requests, "peek", die)
    assert isinstance(together(ranks[2:3], lambda ranks: ranks.exchange("save(1)"))[0], SystemExit)
    texts = failures(together(ranks[:2], lambda ranks: ranks.exchange("save(1)")))
    assert len(set(texts)) == 1
    assert "ranks 2-3 did not take part" in texts[0]


def test_a_store_whose_host_has_ended_is_named() -> None:
    hosts = [tcp_store()]
    ranks = Coordination(ProcessGroup(tcp_store(hosts[0].port), 1, 2), "test", 60)

    def end_later(ranks: Coordination | None) -> Exchange | None:
        if ranks is not None:
            return ranks.exchange("save(1)")
        wait_until(lambda: hosts[0].num_keys() == 2, "the rank does not come")
        hosts.clear()
        return None

    texts = failures(together([ranks, None], end_later)[:1])
    assert "the store of the process group failed; has the process that hosts it" in texts[0]
    ranks.close()


def test_an_exchange_beside_another_of_the_same_rank_waits_for_it() -> None:
    store = hash_store()
    ranks = Coordination(ProcessGroup(store, 0, 2), "test", 60)
    other = Coordination(ProcessGroup(store, 1, 2), "test", 60)

    def save(ranks: Coordination | None) -> Exchange:
        if ranks is not None:
            return ranks.exchange("save")
        wait_until(lambda: store.num_keys() > 0, "the rank does not come")
        other.exchange("save")
        return other.exchange("save")

    assert together([ranks, ranks, None], save)[2] == Exchange(1)


def test_an_exchange_is_refused_if_another_of_the_same_rank_does_not_end() -> None:
    ranks = Coordination(ProcessGroup(hash_store(), 0, 2), "test", 0.1)
    message = r"save\(2\) cannot begin: an earlier call of rank 0 still waits for others"
    with ranks._exchanging, pytest.raises(BusyError, match=message):
        ranks.exchange("save(2)")


def test_a_store_that_does_not_answer_is_given_up() -> None:
    class Stuck:
        """A store whose host was stopped."""

        def compare_set(self, *_: object) -> bytes:
            answered.wait(60)
            return b'[0, "save(1)", "", {}]'

    answered = threading.Event()
    ranks = Coordination(ProcessGroup(Stuck(), 0, 2), "test", 0.2)
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(RankError, match="has not answered for 0 s; is the process that hosts it"):
            ranks.exchange("save(1)")
        assert time.monotonic() - began < 30
    answered.set()


def test_ranks_are_named_in_ranges() -> None:
    assert named([3]) == "rank 3"
    assert named([5, 0, 1, 2]) == "ranks 0-2, 5"
    assert named(range(0, 100, 2)).endswith("28, 30, …")


def test_an_exchange_whose_keys_are_gone_is_not_changed_for_ever() -> None:
    ranks = Coordination(ProcessGroup(hash_store(), 0, 1), "gone", 5.0)
    requests = ranks.requests
    arrivals = Arrivals(requests, 0, 1)
    opened = State(Stage.OPEN, "save").encoded()
    peek = requests.peek
    requests.peek = lambda key: opened if key == "e0" else peek(key)  # type: ignore[method-assign]
    assert arrivals.fail("save", "given up").stage is Stage.FAILED
    assert peek("e0") is None
