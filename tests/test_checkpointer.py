"""What a Checkpointer takes, how it names it, and what it says of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

import asyncckpt
from asyncckpt import AsyncCkptError, Checkpointer, CheckpointExistsError, LastN, SaveError, SaveSkipped
from asyncckpt._saving.engine import get_engine
from asyncckpt.testing import Gate
from support import faulty_store, gated_store

if TYPE_CHECKING:
    from pathlib import Path


def state_of(value: float) -> dict[str, Any]:
    return {"w": torch.full((5,), float(value)), "n": [value]}


def value_in(path: Path) -> float:
    value: float = torch.load(path)["n"][0]
    return value


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_save_becomes_a_file_that_torch_loads_and_a_checkpoint_that_says_what_it_is(tmp_path: Path) -> None:
    before = time.time()
    with Checkpointer(tmp_path / "deep" / "run") as ckpt:
        save = ckpt.save(7, state_of(1.5), metrics={"val/loss": 0.25, "acc": 1})
        assert save.snapshotted.done()
        checkpoint = save.committed.result(60)
    path = tmp_path / "deep" / "run" / "step-00000007.pt"
    assert (save.step, save.path, save.skipped) == (7, str(path), False)
    assert (checkpoint.step, checkpoint.path, checkpoint.sequence) == (7, str(path), 1)
    assert checkpoint.metrics == {"val/loss": 0.25, "acc": 1.0}
    assert checkpoint.nbytes == path.stat().st_size
    assert before <= checkpoint.created <= time.time()
    assert names(path.parent) == [path.name]
    loaded = torch.load(path)
    assert torch.equal(loaded["w"], torch.full((5,), 1.5))
    assert loaded["n"] == [1.5]
    assert ckpt.checkpoints() == [checkpoint]


@pytest.mark.parametrize(
    ("template", "metrics", "name"),
    [
        ("{step}.pt", {}, "12.pt"),
        ("step={step:04d}-{val_loss:.2f}.ckpt", {"val/loss": 0.257}, "step=0012-0.26.ckpt"),
        ("{acc}-{a_b_c}", {"acc": float("nan"), "a.b-c": 1e300}, "nan-1e+300"),
        ("{{x}}-{step:>6}", {}, "{x}-    12"),
        ("last.pt", {"unused": 1}, "last.pt"),
    ],
)
def test_names_come_from_step_and_metrics(
    tmp_path: Path, template: str, metrics: dict[str, float], name: str
) -> None:
    with Checkpointer(tmp_path, filename=template) as ckpt:
        ckpt.save(12, state_of(1), metrics=metrics)
        ckpt.wait()
        assert names(tmp_path) == [name]
        found = ckpt.latest()
        assert found is not None
        assert set(found.metrics) == set(metrics)
        assert ckpt.load(12)["n"] == [1]


@pytest.mark.parametrize("template", ["", "a/{step}.pt", ".{step}.pt", "{step", "{step:08d"])
def test_a_template_that_names_no_visible_file_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(ValueError, match="filename="):
        Checkpointer(tmp_path, filename=template)


def test_a_metric_that_the_name_needs_has_to_be_given(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, filename="{step}-{val_loss:.2f}.pt") as ckpt:
        with pytest.raises(ValueError, match=r"needs the metric 'val_loss'; given were \['loss'\]"):
            ckpt.save(1, state_of(1), metrics={"loss": 1.0})
        ckpt.save(2, state_of(2), metrics={"val_loss": 1.0})
    assert names(tmp_path) == ["2-1.00.pt"]


def test_a_directory_may_be_relative_or_a_file_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Checkpointer("run") as relative, Checkpointer(f"file://{tmp_path}/url") as url:
        monkeypatch.chdir("/")
        assert relative.save(1, state_of(1)).path == "run/step-00000001.pt"
        url.save(2, state_of(2))
    assert value_in(tmp_path / "run" / "step-00000001.pt") == 1
    assert value_in(tmp_path / "url" / "step-00000002.pt") == 2


def test_another_step_is_not_overwritten(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, filename="best.pt") as ckpt:
        ckpt.save(1, state_of(1))
        for _ in range(2):  # while it is pending, perhaps, and once it is there
            with pytest.raises(
                CheckpointExistsError, match=r"best\.pt .*step 1 .*step 2; .*overwrite=True"
            ) as told:
                ckpt.save(2, state_of(2))
            assert isinstance(told.value, FileExistsError)
            ckpt.wait()
        assert value_in(tmp_path / "best.pt") == 1
        ckpt.save(1, state_of(3))
        ckpt.wait()
        assert value_in(tmp_path / "best.pt") == 3
    with pytest.raises(CheckpointExistsError), Checkpointer(tmp_path, filename="best.pt") as ckpt:
        ckpt.save(2, state_of(2))
    with Checkpointer(tmp_path, filename="best.pt", overwrite=True) as ckpt:
        ckpt.save(2, state_of(2))
        ckpt.save(4, state_of(4))
    assert value_in(tmp_path / "best.pt") == 4
    assert [c.step for c in ckpt.checkpoints()] == [4]


@pytest.mark.parametrize("what", ["other bytes", "torch.save", "asyncckpt.save", "another Checkpointer"])
def test_a_file_of_somebody_else_is_not_overwritten(tmp_path: Path, what: str) -> None:
    path = tmp_path / "best.pt"
    with Checkpointer(tmp_path, filename="best.pt") as ckpt:
        if what == "other bytes":
            path.write_bytes(b"my notes")
        elif what == "torch.save":
            torch.save(state_of(9), path)
        elif what == "asyncckpt.save":
            asyncckpt.save(state_of(9), path).committed.result(60)
        else:
            with Checkpointer(tmp_path, filename="best.pt") as other:
                other.save(9, state_of(9))
        content = path.read_bytes()
        with pytest.raises(AsyncCkptError, match=r"best\.pt is .* and would be replaced by step 1; ") as told:
            ckpt.save(1, state_of(1)).committed.result(60)
        assert isinstance(told.value, CheckpointExistsError) or isinstance(
            told.value.__cause__, CheckpointExistsError
        )
    assert path.read_bytes() == content
    assert names(tmp_path) == ["best.pt"]


def test_the_name_of_a_failed_save_is_free(tmp_path: Path) -> None:
    store = faulty_store(tmp_path)
    store.fail("commit", OSError("the disk is gone"))
    with Checkpointer(store=store, filename="best.pt") as ckpt:
        with pytest.raises(SaveError, match="the disk is gone"):
            ckpt.save(1, state_of(1)).committed.result(60)
        ckpt.save(2, state_of(2))
    assert value_in(tmp_path / "best.pt") == 2


def test_the_name_of_a_save_whose_state_cannot_be_saved_is_free(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, filename="best.pt") as ckpt:
        with pytest.raises(SaveError, match="hook"):
            ckpt.save(1, {"hook": lambda: None})
        checkpoint = ckpt.save(2, state_of(2)).committed.result(60)
    assert checkpoint.step == 2


@pytest.mark.parametrize("when_busy", ["skip", "replace"])
def test_the_name_of_a_save_that_gave_way_is_free(tmp_path: Path, when_busy: Any) -> None:
    room = {"skip": 1, "replace": 2}[when_busy]
    gate = Gate()
    store = gated_store(tmp_path, gate)
    with Checkpointer(store=store, filename="{tag:.0f}.pt", when_busy=when_busy, max_in_flight=room) as ckpt:
        ckpt.save(1, state_of(1), metrics={"tag": 1})
        gate.wait_for_arrival()
        gave_way = ckpt.save(2, state_of(2), metrics={"tag": 2})
        if when_busy == "replace":
            ckpt.save(3, state_of(3), metrics={"tag": 3})
        assert gave_way.skipped
        with pytest.raises(SaveSkipped):
            gave_way.committed.result(0)
        gate.open()
        ckpt.wait()
        ckpt.save(4, state_of(4), metrics={"tag": 2})
    assert value_in(tmp_path / "2.pt") == 4


def test_the_name_of_a_file_that_was_removed_by_hand_is_free(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, filename="best.pt") as ckpt:
        ckpt.save(1, state_of(1)).committed.result(60)
        (tmp_path / "best.pt").unlink()
        ckpt.save(2, state_of(2))
    assert value_in(tmp_path / "best.pt") == 2


def test_the_name_of_an_evicted_checkpoint_is_free(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, filename="{tag:.0f}.pt", keep=LastN(1)) as ckpt:
        for step, tag in enumerate([1, 2, 1, 2]):
            ckpt.save(step, state_of(step), metrics={"tag": tag})
            ckpt.wait()
    assert names(tmp_path) == ["2.pt"]


def test_a_closed_checkpointer_takes_no_more_and_still_finds(tmp_path: Path) -> None:
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, state_of(1))
    ckpt.close()
    with pytest.raises(SaveError, match=rf"{tmp_path} is closed"):
        ckpt.save(2, state_of(2))
    ckpt.close()
    ckpt.wait()
    assert [c.step for c in ckpt.checkpoints()] == [1]
    assert ckpt.load()["n"] == [1]


def test_statistics_are_filled(tmp_path: Path) -> None:
    gate = Gate()
    with Checkpointer(store=gated_store(tmp_path, gate)) as ckpt:
        save = ckpt.save(1, {"x": torch.rand(1 << 20)})
        gate.open()
        save.committed.result(60)
        stats = save.stats
        assert min(stats.stall, stats.freeze, stats.copy, stats.checksum, stats.write, stats.sync) > 0
        assert stats.stall >= stats.wait + stats.freeze + stats.copy
        assert stats.durable >= stats.freeze + stats.copy + stats.write + stats.commit
        assert stats.commit >= stats.sync
        assert stats.nbytes == (tmp_path / "step-00000001.pt").stat().st_size
        assert stats.queue_depth == 0


def test_repr_says_what_is_in_flight(tmp_path: Path) -> None:
    gate = Gate()
    with Checkpointer(store=gated_store(tmp_path, gate)) as ckpt:
        assert str(tmp_path) in repr(ckpt)
        assert "0 checkpoints, 0 in flight" in repr(ckpt)
        ckpt.save(1, state_of(1))
        assert "0 checkpoints, 1 in flight" in repr(ckpt)
        gate.open()
    assert "closed, 1 checkpoints, 0 in flight" in repr(ckpt)


def test_reserve_makes_the_memory_that_saves_then_use(tmp_path: Path) -> None:
    state = {"model": torch.nn.Linear(1000, 1000), "step": 0}
    with Checkpointer(tmp_path, max_in_flight=2) as ckpt:
        nbytes = ckpt.reserve(state)
        assert nbytes >= 4 * 1001 * 1000
        arena = get_engine().arena
        reserved = arena.statistics()
        assert reserved.mapped >= 2 * nbytes
        assert reserved.leases == 0
        for step in range(4):
            ckpt.save(step, state)
        ckpt.wait()
        assert arena.statistics().mapped == reserved.mapped
