"""Whether saves are overlapped: by default, by argument, and after what the first ones have shown."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

import pytest
import torch

import asyncckpt
from asyncckpt import Checkpointer, Save, SaveError, TornSnapshotError
from asyncckpt._saving.engine import get_engine
from asyncckpt._saving.overlapping import Overlapping
from asyncckpt._saving.trial import Trial
from asyncckpt._snapshot import fences
from asyncckpt.testing import Gate
from support import gated_store, run_python

if TYPE_CHECKING:
    from pathlib import Path


class Training:
    """A model whose weight is large enough to be deferred, and its optimizer."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(200, 200)
        self.opt = torch.optim.AdamW(self.model.parameters())
        self.state = {"model": self.model, "opt": self.opt}

    def step(self) -> None:
        self.model(torch.ones(2, 200)).square().mean().backward()
        self.opt.step()


@pytest.fixture
def training() -> Training:
    return Training()


def test_saves_are_blocking_unless_asked(tmp_path: Path, training: Training) -> None:
    with Checkpointer(tmp_path, max_in_flight=4) as ckpt:
        ckpt.attach(training.opt)
        training.step()
        assert not ckpt.save(1, training.state).stats.overlapped
        assert ckpt.save(2, training.state, overlap=True).stats.overlapped
    with Checkpointer(tmp_path, overlap=True, max_in_flight=4) as ckpt:
        assert ckpt.save(3, training.state).stats.overlapped
        assert not ckpt.save(4, training.state, overlap=False).stats.overlapped


def test_a_save_before_the_first_step_is_blocking_and_says_why(tmp_path: Path, training: Training) -> None:
    with Checkpointer(tmp_path, overlap=True) as ckpt:
        first = ckpt.save(1, training.state)
        first.committed.result()
        training.step()
        second = ckpt.save(2, training.state)
    assert (first.stats.overlapped, first.stats.reason) == (False, "no step of AdamW was seen yet")
    assert (second.stats.overlapped, second.stats.reason) == (True, "")


def test_a_state_of_small_tensors_says_why_it_is_not_overlapped(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, overlap=True) as ckpt:
        save = ckpt.save(1, {"x": torch.zeros(10)})
        with Checkpointer(tmp_path / "other", overlap=True) as large:
            other = large.save(1, {"x": torch.zeros(100_000)})
    assert save.stats.reason == "all of the state is small"
    assert other.stats.reason == "nothing of the state belongs to an attached optimizer"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"overlap": 1}, TypeError),
        ({"guard": "crc"}, ValueError),
        ({"device_memory": -1}, ValueError),
        ({"device_memory": 0.5}, TypeError),
    ],
)
def test_bad_arguments_are_errors(
    tmp_path: Path, arguments: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        Checkpointer(tmp_path, **arguments)  # type: ignore[arg-type]


def test_after_a_torn_snapshot_saves_are_blocking(
    tmp_path: Path, training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    def change_beside(step: int, overlap: bool | None) -> Save:  # noqa: FBT001
        save = ckpt.save(step, training.state, overlap=overlap)
        with torch.no_grad():
            training.model.weight.add_(1)
        gate.open()
        ckpt._saver.drain()
        gate.close()
        return save

    gate = Gate()
    with Checkpointer(store=gated_store(tmp_path, gate, "write"), overlap=True) as ckpt:
        training.step()
        for step, overlap in ((1, None), (2, True)):
            torn = change_beside(step, overlap)
            with pytest.raises(TornSnapshotError, match=r'state\["model"\]\["weight"\] was changed'):
                torn.committed.result()
        after = change_beside(3, None)
        after.committed.result()
    assert after.stats.reason == "an earlier snapshot was torn"
    assert caplog.text.count("saves are not overlapped any more, since a snapshot was torn") == 1


@pytest.mark.parametrize("overlapped_wins", [True, False])
def test_the_first_saves_are_a_trial(
    tmp_path: Path,
    training: Training,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    overlapped_wins: bool,
) -> None:
    now = [0.0]
    monkeypatch.setattr("asyncckpt._saving.trial.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("asyncckpt.checkpointer.time.perf_counter", lambda: now[0])
    with caplog.at_level(logging.WARNING), Checkpointer(tmp_path, overlap=True) as ckpt:
        training.step()
        kinds = []
        for step in range(12):
            save = ckpt.save(step, training.state)
            save.committed.result()
            kinds.append(save.stats.overlapped)
            now[0] += 1 if save.stats.overlapped is overlapped_wins else 2
            training.step()
    assert kinds == [True, False] * 4 + [overlapped_wins] * 4
    assert caplog.text.count("they lose time here: 2.000 s") == (0 if overlapped_wins else 1)
    assert fences.watchers() == []


def test_the_trial_does_not_count_waits_for_earlier_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncckpt._saving.trial.time.perf_counter", lambda: 9.0)
    overlapping = Overlapping(default=True)
    overlapping._preparation.end()
    save = Save(1, "run/1.pt")
    save.stats.wait = 5.0
    overlapping.note(save, 2.0)
    for watcher in fences.watchers():
        watcher(torch.optim.SGD([torch.zeros(1)]))
    assert overlapping._trial._spans[False] == [2.0]


def test_a_dropped_checkpointer_leaves_no_fence_and_no_threads(tmp_path: Path, training: Training) -> None:
    engine = get_engine()
    gc.disable()  # references in a cycle would be kept until it runs
    try:
        ckpt = Checkpointer(tmp_path, overlap=True)
        training.step()
        assert ckpt.save(1, training.state).stats.overlapped
        ckpt.wait()
        del ckpt
        assert fences.watchers() == []
        assert engine._changed.until(lambda: engine._threads is None, 10)
    finally:
        gc.enable()


def test_saves_that_say_what_they_are_take_no_part_in_the_trial(tmp_path: Path, training: Training) -> None:
    with Checkpointer(tmp_path, overlap=True) as ckpt:
        training.step()
        for step in range(6):
            save = ckpt.save(step, training.state, overlap=True)
            assert save.stats.overlapped
            save.committed.result()
            training.step()


def test_a_trial_that_is_not_over_leaves_no_fence(tmp_path: Path, training: Training) -> None:
    ckpt = Checkpointer(tmp_path, overlap=True)
    training.step()
    ckpt.save(1, training.state).committed.result()
    assert fences.watchers()
    ckpt.close()
    assert fences.watchers() == []


def test_a_trial_measures_one_save_at_a_time() -> None:
    spans = Trial()
    for _ in range(3):
        spans.begin(0.0, overlapped=True)
    assert len(fences.watchers()) == 1
    spans.end()
    assert fences.watchers() == []


PREPARED = """
    import sys, torch, asyncckpt
    from asyncckpt import Checkpointer
    from asyncckpt._saving.engine import get_engine

    model = torch.nn.Linear(200, 200)
    opt = torch.optim.AdamW(model.parameters())
    state = {"model": model, "opt": opt}

    def step():
        model(torch.ones(2, 200)).square().mean().backward()
        opt.step()

    ckpt = Checkpointer(sys.argv[1], overlap=True)
    assert ckpt.restore(state, missing_ok=True) is None
    step()
    assert asyncckpt.statistics().memory == 0
    step()
    arena = get_engine().arena
    arena._changed.until(arena._is_prepared)
    prepared = asyncckpt.statistics().memory
    assert prepared > 3 * model.weight.nbytes
"""


def test_memory_is_ready_after_the_second_step(tmp_path: Path) -> None:
    script = (
        PREPARED
        + """
    save = ckpt.save(1, state)
    assert asyncckpt.statistics().memory == prepared
    save.committed.result()
    """
    )
    assert run_python(script, str(tmp_path)) == (0, "", "")


def test_memory_is_made_ready_for_several_optimizers(tmp_path: Path) -> None:
    both = Training(), Training()
    with Checkpointer(tmp_path, overlap=True) as ckpt:
        ckpt.attach(*(each.opt for each in both))
        for each in both * 2:
            each.step()
        get_engine().arena._changed.until(get_engine().arena._is_prepared)
        prepared = asyncckpt.statistics().memory
        ckpt.save(1, [each.state for each in both]).committed.result()
        assert asyncckpt.statistics().memory == prepared


def test_memory_that_was_prepared_for_no_save_is_released(tmp_path: Path) -> None:
    script = (
        PREPARED
        + """
    ckpt.close()
    held = asyncckpt.statistics()
    assert held.memory == held.threads == 0
    """
    )
    assert run_python(script, str(tmp_path)) == (0, "", "")


def test_memory_that_cannot_be_prepared_is_left_to_the_save(tmp_path: Path, training: Training) -> None:
    before = get_engine().arena.limit
    asyncckpt.set_memory_limit(1000)
    try:
        with Checkpointer(tmp_path, overlap=True) as ckpt:
            ckpt.attach(training.opt)
            training.step()
            training.step()
            with pytest.raises(SaveError, match="exceeds the limit of 1000 bytes"):
                ckpt.save(1, training.state)
    finally:
        asyncckpt.set_memory_limit(before)


def test_a_blocking_checkpointer_prepares_nothing(tmp_path: Path) -> None:
    script = (
        PREPARED.replace(", overlap=True", "").partition("    step()\n    arena")[0]
        + """
    assert get_engine().arena._preparer is None
    assert asyncckpt.statistics().memory == 0
    """
    )
    assert run_python(script, str(tmp_path)) == (0, "", "")


@pytest.mark.parametrize("buffers", [0, 1])
def test_a_flat_storage_is_deferred_if_all_of_it_belongs_to_optimizers(tmp_path: Path, buffers: int) -> None:
    flat = torch.zeros(40_000 + buffers)
    model = torch.nn.Linear(100, 200)
    model.weight = torch.nn.Parameter(flat[:20_000].view(200, 100))
    other = torch.nn.Parameter(flat[20_000:40_000])
    opt = torch.optim.SGD([model.weight, other], 0.1)
    with Checkpointer(tmp_path) as ckpt:
        ckpt.attach(opt)
        (model.weight.sum() + other.sum()).backward()
        opt.step()
        save = ckpt.save(1, {"flat": flat}, overlap=True)
        assert save.stats.overlapped is not bool(buffers)
