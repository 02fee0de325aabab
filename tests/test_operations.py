"""Removing, copying and linking wait their turn, and what is pending counts as being there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncckpt import SaveError, SaveSkipped, StoreError
from asyncckpt._loading.planned import load_plan
from asyncckpt._saving import operations, staging
from asyncckpt._saving.engine import get_engine
from asyncckpt._saving.saver import Saver
from asyncckpt._saving.staging import FileStager
from asyncckpt._saving.targets import FileTarget
from asyncckpt._snapshot.copy import copy_ranges
from asyncckpt.layout.description import Description
from asyncckpt.stores.local import LocalStore
from asyncckpt.testing import Gate, SlowStore
from asyncckpt.types import SaveStats

if TYPE_CHECKING:
    from pathlib import Path

    from asyncckpt import Save
    from asyncckpt.stores.base import Store


def save_to(store: Store, name: str, value: float, saver: Saver) -> Save:
    target = FileTarget(store, name, Description(0, None, {}, 0.0))
    return saver.save({"x": torch.full((3,), value)}, target, None, time.perf_counter())


def test_operations_follow_the_saves_before_them(tmp_path: Path) -> None:
    gate = Gate()
    store = SlowStore(LocalStore(str(tmp_path)), gates={"commit": gate})
    saver = Saver(max_in_flight=3)
    first = save_to(store, "first.pt", 1.0, saver)
    copied = operations.copy(store, "first.pt", "copy.pt")
    linked = operations.link(store, "first.pt", "link.pt")
    second = save_to(store, "first.pt", 2.0, saver)
    removed = operations.remove(store, "copy.pt")
    last = operations.copy(store, "first.pt", "last.pt")
    assert not any(done.done() for done in (first.committed, copied, linked, removed, last))
    pending = [get_engine().pending(store.path_of(n)) for n in ("first.pt", "copy.pt", "link.pt", "other.pt")]
    assert pending == [True, False, True, None]
    gate.open()
    last.result(60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.pt", "last.pt", "link.pt"]
    assert torch.load(tmp_path / "last.pt")["x"].tolist() == [2.0] * 3
    assert torch.load(tmp_path / "link.pt")["x"].tolist() == [2.0] * 3
    assert second.committed.result(0).path == str(tmp_path / "first.pt")
    get_engine().drain()
    assert get_engine().pending(store.path_of("last.pt")) is None


def test_an_operation_that_fails_tells_its_caller_and_stops_nothing(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    failed = operations.copy(store, "absent.pt", "target.pt")
    after = operations.remove(store, "absent.pt")
    with pytest.raises(FileNotFoundError):
        failed.result(60)
    assert after.result(60) is None


def test_what_follows_a_failed_operation_is_left_undone(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    (tmp_path / "old.pt").write_bytes(b"old")
    failed = operations.copy(store, "absent.pt", "new.pt")
    other = operations.remove(store, "other.pt")
    undone = operations.remove(store, "old.pt", causes=[other, failed])
    called: list[str] = []
    chained = operations.call(lambda: called.append("chained"), "x", exists=True, causes=[undone])
    operations.call(lambda: called.append("done"), "x", exists=True, causes=[other]).result(60)
    for left in (undone, chained):
        with pytest.raises(SaveSkipped, match="is unchanged"):
            left.result(60)
    assert (tmp_path / "old.pt").read_bytes() == b"old"
    assert called == ["done"]
    assert not failed.retrieved


def test_a_save_that_fails_early_keeps_its_buffer_while_the_copy_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ended_early = get_engine(), []

    class Refusing(LocalStore):
        async def prepare(self) -> None:
            raise StoreError("refused")

    def copy_beside_the_failure(*arguments: Any) -> None:
        # Within the time of this wait the save would have ended, were it not waiting for the copy.
        ended_early.append(engine.drain(0.5))
        ended_early.append(engine.arena.statistics().leases == 0)
        copy_ranges(*arguments)

    monkeypatch.setattr(staging, "copy_ranges", copy_beside_the_failure)
    target = FileTarget(Refusing(str(tmp_path)), "x.pt", Description(0, None, {}, 0.0))
    save = Saver(1).save({"x": torch.zeros(10 << 20)}, target, None, time.perf_counter())
    with pytest.raises(SaveError, match="refused"):
        save.committed.result(60)
    assert ended_early == [False, False]
    assert engine.arena.statistics().leases == 0


def test_a_snapshot_is_a_state_for_somebody_elses_writer() -> None:
    shared = torch.arange(12.0).view(3, 4)
    state = {"a": shared, "b": shared[1], "t": shared.t(), "n": [1, None], "half": torch.ones(2).bfloat16()}
    arena = get_engine().arena
    stager = FileStager(arena)
    stats = SaveStats()
    snapshot = stager.stage(stager.freeze(state, stats), stats)
    snapshot.copy()
    shared.zero_()
    host = load_plan(snapshot.plan(b"{}"), snapshot.lease.view)
    assert torch.equal(host["a"], torch.arange(12.0).view(3, 4))
    assert host["b"].untyped_storage().data_ptr() == host["a"].untyped_storage().data_ptr()
    assert host["t"].stride() == (1, 4)
    assert host["n"] == [1, None]
    lease = range(snapshot.lease.address, snapshot.lease.address + len(snapshot.lease.view))
    assert host["a"].data_ptr() in lease
    snapshot.lease.release()
    assert arena.statistics().leases == 0
