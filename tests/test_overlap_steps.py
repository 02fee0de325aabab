"""Saves within a step, calls within a fence, and what saves leave behind."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

import asyncckpt
from asyncckpt import BusyError, LastN, SaveError
from asyncckpt._saving.engine import get_engine
from asyncckpt._snapshot import fences
from asyncckpt._snapshot.lanes import HostLane
from asyncckpt._threads import is_locked_by_caller
from asyncckpt.testing import Gate
from interrupts import Interrupt
from overlaps import Held
from support import faulty_store, gated_store
from trainings import train

if TYPE_CHECKING:
    from pathlib import Path

    from asyncckpt import Save
    from copier import Copier

fused = partial(train, make_optimizer=partial(torch.optim.AdamW, fused=True))


class Entry:
    """An entry of a state that can be referred to weakly."""


@pytest.mark.parametrize("where", ["closure", "hook"])
def test_nothing_is_deferred_while_a_step_is_under_way(tmp_path: Path, copier: Copier, where: str) -> None:
    """The fence of the step was before the save, and no version counter shows what fused steps change."""
    made: list[Save] = []
    before: list[torch.Tensor] = []

    def save(*_: object) -> None:
        if not made:
            copier.hold()
            before.extend(held.values())
            made.append(held.ckpt.save(1, held.training.plain_state(), overlap=True))

    with Held(copier, tmp_path, fused) as held:
        held.backward()
        if where == "hook":
            held.opt.register_step_pre_hook(save)
            held.opt.step()
        else:
            held.opt.step(save)  # type: ignore[arg-type]
        copier.open()
        assert not made[0].stats.overlapped
        assert made[0].stats.reason == "a step of AdamW was under way"
        loaded = torch.load(made[0].committed.result(30).path)["model"].values()
        assert all(torch.equal(one, other) for one, other in zip(loaded, before, strict=True))
        held.assert_saved(held.save(2))


def test_the_state_of_an_optimizer_may_hold_anything(tmp_path: Path, copier: Copier) -> None:
    with Held(copier, tmp_path) as held:
        held.opt.state["count"] = 3  # type: ignore[index]
        held.opt.state["scale"] = torch.tensor(2.0)  # type: ignore[index]
        other = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))])
        other.state["count"] = 3  # type: ignore[index]
        save = held.save()
        other.step()
        held.opt.step()
        held.assert_saved(save)


@pytest.mark.parametrize("call", ["save", "wait", "close", "fence", "load"])
def test_a_handler_that_interrupts_a_fence_is_told(
    tmp_path: Path, copier: Copier, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    told: list[BaseException] = []

    def handle(*_: object) -> None:
        arguments: tuple[Any, ...] = {"save": (2, {}), "load": ("latest",)}.get(call, ())
        try:
            getattr(held.ckpt, call)(*arguments)
        except BusyError as error:
            told.append(error)

    def interrupted(lane: HostLane, pieces: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        copier.open()
        return fence(lane, pieces)

    fence = HostLane.fence
    former = signal.signal(signal.SIGUSR1, handle)
    try:
        with Held(copier, tmp_path) as held:
            save = held.save()
            with monkeypatch.context() as patch:
                patch.setattr(HostLane, "fence", interrupted)
                held.opt.step()
            held.assert_saved(save)
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert told
    assert all("by a signal handler" in str(error) for error in told)


def test_an_interrupt_at_any_point_of_a_fence_loses_nothing(tmp_path: Path, copier: Copier) -> None:
    with Held(copier, tmp_path, keep=LastN(1)) as held:
        number = 0
        while True:
            save = held.save(number)
            interrupt = Interrupt(number)
            opening = threading.Timer(0, copier.open)
            opening.start()
            try:
                with interrupt:
                    held.ckpt.fence()
            except KeyboardInterrupt:
                pass
            opening.join()
            held.ckpt.fence()
            held.assert_saved(save)
            held.ckpt.wait()
            assert fences.pending() == ()
            number += 1
            if not interrupt.came:
                break
        assert number > 20


def test_no_memory_is_prepared_beside_that_of_the_first_save(tmp_path: Path, copier: Copier) -> None:
    gate = Gate()
    with Held(copier, gate=gate, store=gated_store(tmp_path, gate, "draft")) as held:
        held.ckpt.save(1, held.training.state())
        gate.wait_for_arrival()
        before = asyncckpt.statistics().memory
        held.opt.step()
        arena = get_engine().arena
        arena._changed.until(arena._is_prepared)
        assert asyncckpt.statistics().memory == before


@pytest.mark.filterwarnings("ignore:weights_only=True")
def test_a_failed_save_lets_go_of_the_state(tmp_path: Path, copier: Copier) -> None:
    store = faulty_store(tmp_path)
    with Held(copier, store=store) as held:
        store.fail("draft", OSError(28, "No space left on device"))
        state = {**held.training.plain_state(), "entry": Entry()}
        gone = weakref.ref(state["entry"])
        save = held.save(1, state)
        del state
        held.expected.clear()
        copier.open()
        assert isinstance(save.committed.exception(30), SaveError)
        held.ckpt.wait()
        gc.collect()
        assert gone() is None


def test_callbacks_of_a_replaced_snapshot_are_called_without_the_lock(tmp_path: Path, copier: Copier) -> None:
    gate, found = Gate(), list[Any]()
    store = gated_store(tmp_path, gate, "draft")
    with Held(copier, gate=gate, store=store, max_in_flight=2, when_busy="replace") as held:
        held.ckpt.save(1, {}, overlap=False)
        gate.wait_for_arrival()
        second = held.save(2)
        second.snapshotted.add_done_callback(lambda _: found.append(is_locked_by_caller()))
        copier.open()
        held.ckpt.save(3, {}, overlap=False)
        assert second.skipped
        assert found == [False]
        gate.open()
