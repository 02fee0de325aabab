"""Rounds: a save of all ranks is committed or failed, for all of them."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from asyncckpt._ranks.round import Round
from asyncckpt.errors import RankError
from interrupts import wait_until
from rank_threads import KINDS, Stores, failures, together

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from asyncckpt._ranks.coordination import Coordination


@pytest.fixture(params=KINDS)
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Stores:
    return Stores(request.param, tmp_path, size=4)


@pytest.fixture
def hashed(tmp_path: Path) -> Stores:
    return Stores("hash", tmp_path, size=4)


def rounds(stores: Stores, timeout: float = 60.0) -> list[Round]:
    coordinations = stores.coordinations(timeout)
    for ranks in coordinations:
        ranks.requests.peek("connected")  # which may take longer than some timeouts
    return [Round(ranks, 0) for ranks in coordinations]


def leads(save: Round) -> bool:
    return save._ranks.leads


def background(save: Round, end: str = "committed") -> str:
    """Do what the background of a rank does."""
    rank = save._ranks.rank
    if leads(save):
        save.begin("folder")
        save.report(b"0")
        assert save.reports() == [b"0", b"1", b"2", b"3"]
        save.end(end)
        return end
    assert save.begun() == "folder"
    save.report(b"%d" % rank)
    return save.outcome()


def test_a_save_is_planned_written_and_committed(stores: Stores) -> None:
    def save(ranks: Coordination) -> str:
        save = Round(ranks, ranks.exchange("save(1)").number)
        plans = save.gather(b"plan %d" % ranks.rank)
        assert plans == ([b"plan 0", b"plan 1", b"plan 2", b"plan 3"] if ranks.leads else None)
        mine = save.scatter([b"to " + plan for plan in plans] if plans else None)
        assert mine == b"to plan %d" % ranks.rank
        result = background(save)
        ranks.close()
        return result

    assert together(stores.coordinations(), save) == ["committed"] * 4
    assert stores.left() == 0


def test_later_saves_need_no_plan_and_may_overlap(stores: Stores) -> None:
    everyone = stores.coordinations()

    def save(ranks: Coordination) -> list[str]:
        saves = [Round(ranks, ranks.exchange(f"save({step})").number) for step in range(3)]
        results = [background(save) for save in reversed(saves)]
        ranks.exchange("done")
        ranks.close()
        return results

    assert together(everyone, save) == [["committed"] * 3] * 4
    assert stores.left() == 0


def test_payloads_may_be_longer_than_a_request(stores: Stores) -> None:
    # A FileStore writes a value anew with each piece.
    long = os.urandom(
        (1 if stores.kind == "file" else 9) << 20
    )  # a TCPStore refuses more than 8 MiB at once, in torch 2.7 much less

    def plan(save: Round) -> bytes:
        plans = save.gather(long if save._ranks.rank == 2 else b"")
        assert plans in (None, [b"", b"", long, b""])
        return save.scatter([b"", long, b"", b""] if leads(save) else None)

    assert together(rounds(stores), plan) == [b"", long, b"", b""]


@pytest.mark.parametrize("when", ["first", "planned", "begun", "reported"])
@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_fails_fails_the_save_for_all(hashed: Stores, when: str, failing: int) -> None:
    def save(save: Round) -> object:
        fails = save._ranks.rank == failing
        if fails and when == "first":
            return save.fail("disk full")
        save.gather(b"")
        if fails and when == "planned":
            return save.fail("disk full")
        save.scatter([b""] * 4 if leads(save) else None)
        save.begin("folder") if leads(save) else save.begun()
        if fails and when == "begun":
            return save.fail("disk full")
        if failing == 0 or not fails:
            save.report(b"")
        if fails:
            return save.fail("disk full")
        return save.reports() if leads(save) else save.outcome()

    results = together(rounds(hashed), save)
    assert results.pop(failing) is True
    assert failures(results) == [f"RankError: rank {failing}: disk full"] * 3
    assert hashed.left() == 0


def test_a_failed_save_stays_failed(hashed: Stores) -> None:
    saves = rounds(hashed)
    assert saves[1].fail("first") is True
    assert saves[2].fail("second") is True
    calls: list[Callable[[Round], object]] = [
        Round.outcome,
        Round.begun,
        Round.scatter,
        lambda save: save.report(b""),
        lambda save: save.gather(b""),
    ]
    for call in calls:
        for save in saves[1:3]:
            with pytest.raises(RankError, match="rank 1: first"):
                call(save)
    with pytest.raises(RankError, match="rank 1: first"):
        saves[0].begin("folder")
    assert hashed.left() == 2  # until rank 3 has seen it
    with pytest.raises(RankError, match="rank 1: first"):
        saves[3].begun()
    assert hashed.left() == 0


def test_no_other_rank_can_fail_a_save_that_is_decided(hashed: Stores) -> None:
    decided = threading.Event()

    def save(save: Round) -> object:
        if leads(save):
            save.begin("folder")
            save.report(b"")
            save.reports()
            decided.set()
            wait_until(lambda: all(tried), "others do not try to fail it")
            save.end("committed")
            return save.fail("too late")
        save.begun()
        save.report(b"")
        decided.wait(30)
        assert save.fail("too late") is False
        tried[save._ranks.rank] = True
        return save.outcome()

    tried = [True, False, False, False]
    assert together(rounds(hashed), save) == [False, "committed", "committed", "committed"]
    assert hashed.left() == 0


def test_rank_0_can_fail_a_save_whose_commit_fails(hashed: Stores) -> None:
    def save(save: Round) -> object:
        if leads(save):
            save.begin("folder")
            save.report(b"")
            save.reports()
            return save.fail("rename refused")
        save.begun()
        save.report(b"")
        return save.outcome()

    results = together(rounds(hashed), save)
    assert results[0] is True
    assert failures(results[1:]) == ["RankError: rank 0: rename refused"] * 3
    assert hashed.left() == 0


def play(save: Round, until: str) -> Any:
    """Do what the rank does in a save, up to a call that it never makes."""
    lead = leads(save)
    steps: list[tuple[str, Callable[[], object]]] = [
        ("gather", lambda: save.gather(b"")),
        ("scatter", lambda: save.scatter([b""] * 4 if lead else None)),
        ("begin", lambda: save.begin("folder") if lead else save.begun()),
        ("report", lambda: save.report(b"")),
        ("reports", lambda: save.reports() if lead else None),
        ("end", lambda: save.end("committed") if lead else save.outcome()),
    ]
    for name, step in steps:
        if name == until:
            return None
        result = step()
    return result


@pytest.mark.parametrize(
    ("rank", "until", "message"),
    [
        (3, "gather", "rank 3 had not sent its plan when rank "),
        (0, "scatter", "rank 0 had not sent the plan when rank "),
        (0, "begin", "rank 0 had not begun to write when rank "),
        (2, "report", "rank 2 had not written its part when rank "),
        (0, "report", "rank 0 had not written its part when rank "),
        (0, "reports", "rank 0 had not decided to commit when rank "),
    ],
)
def test_a_rank_that_hangs_is_named_on_all_others(
    stores: Stores, rank: int, until: str, message: str
) -> None:
    saves = rounds(stores, timeout=0.5)
    results = together(saves, lambda save: play(save, until if save._ranks.rank == rank else ""))
    assert results.pop(rank) is None
    texts = failures(results)
    assert len(set(texts)) == 1
    assert message in texts[0]
    with pytest.raises(RankError, match=message):
        saves[rank].begin("folder") if rank == 0 else saves[rank].begun()
    assert stores.left() == 0


@pytest.mark.parametrize("operation", ["add", "swap"])
def test_a_save_goes_on_if_a_rank_dies_that_has_sent_the_last_report(hashed: Stores, operation: str) -> None:
    saves = rounds(hashed, timeout=0.5)
    saves[0].begin("folder")
    for save in saves[:3]:
        save.report(b"")

    def die(*_: object) -> None:
        raise RankError("killed")

    setattr(saves[3]._requests, operation, die)
    with pytest.raises(RankError, match="killed"):
        saves[3].report(b"3")
    assert saves[0].reports() == [b"", b"", b"", b"3"]


def test_a_save_may_be_committed_if_rank_0_is_silent_behind_its_decision(stores: Stores) -> None:
    saves = rounds(stores, timeout=0.5)
    results = together(saves, lambda save: play(save, "end" if leads(save) else ""))
    for text in failures(results[1:]):
        assert text.startswith("RankError: rank 0 had not ended the save when rank ")
        assert text.endswith("after it decided to commit: the checkpoint may be committed")
    assert saves[1].fail("disk full") is False
    saves[0].end("committed")
    assert stores.left() == 0


def test_a_cancelled_wait_fails_the_save(hashed: Stores) -> None:
    stopped = threading.Event()
    saves = [Round(ranks, 0, stopped.is_set) for ranks in hashed.coordinations()]

    def save(save: Round) -> object:
        if leads(save):
            save.begin("folder")
            return save.reports()
        save.begun()
        save.report(b"")
        if save._ranks.rank == 3:
            stopped.set()
        return save.outcome()

    texts = failures(together(saves, save))
    assert len(set(texts)) == 1
    assert texts[0].endswith(" was cancelled")
    assert hashed.left() == 0


def test_rank_0_waits_until_all_know_of_the_commit(hashed: Stores) -> None:
    saves = rounds(hashed)
    lead, *others = saves
    lead.begin("folder")
    for save in saves:
        save.report(b"")
    lead.reports()
    lead.end("committed")
    waiting = threading.Thread(target=lead.linger, args=(60.0,))
    waiting.start()
    for save in others:
        assert waiting.is_alive()
        assert save.outcome() == "committed"
    waiting.join()


def test_rank_0_does_not_wait_for_ever(hashed: Stores) -> None:
    lead, *others = rounds(hashed)
    lead.begin("folder")
    for save in (lead, *others):
        save.report(b"")
    lead.reports()
    lead.end("committed")
    lead.linger(0.01)
    assert [save.outcome() for save in others] == ["committed"] * 3
