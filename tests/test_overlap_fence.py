"""What steps may change waits for its copy, and nothing else does."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from asyncckpt import Checkpointer
from asyncckpt._snapshot import fences
from asyncckpt.testing import Gate
from overlaps import Call, Held
from support import gated_store
from trainings import WIDTH, momentum, perceptron, train, with_closure

if TYPE_CHECKING:
    from pathlib import Path

    from copier import Copier

fused = partial(torch.optim.AdamW, fused=True)
plain = partial(torch.optim.SGD, lr=0.1)
OPTIMIZERS: dict[str, Any] = {
    "SGD": plain,
    "SGD with momentum": momentum,
    "SGD fused": partial(momentum, fused=True),
    "AdamW": torch.optim.AdamW,
    "AdamW fused": fused,
    "RMSprop": torch.optim.RMSprop,
}


class Impatient(torch.optim.SGD):
    """Changes parameters before it calls the closure."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(1.5)
        return super().step(closure)


def are_same(now: list[torch.Tensor], then: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(one, other) for one, other in zip(now, then, strict=True)]


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_changes_nothing_before_the_copy_is_over(
    tmp_path: Path, copier: Copier, monkeypatch: pytest.MonkeyPatch, name: str, cores: int
) -> None:
    # With one core the step copies all that is left, and waits for the piece that was begun behind it.
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores), raising=False)
    copier.yields = False
    with Held(copier, tmp_path, partial(train, make_optimizer=OPTIMIZERS[name])) as held:
        held.backward()
        before, save = held.values(), held.save()
        step = Call(held.opt.step)
        step.assert_waits()
        assert all(are_same(held.values(), before))
        assert not save.snapshotted.done()
        copier.open()
        step.join()
        assert not any(are_same(held.values(), before))
        assert save.snapshotted.done()
        assert save.stats.fence > 0
        held.assert_saved(save)


def test_a_step_waits_once_per_save(tmp_path: Path, copier: Copier) -> None:
    with Held(copier, tmp_path) as held:
        held.backward()
        save = held.save()
        held.opt.step()
        assert save.snapshotted.done()
        fenced = copier.fenced
        for _ in range(3):
            held.opt.step()
        assert copier.fenced == fenced > 0
        held.assert_saved(save)


def test_a_fence_by_hand_allows_every_change(tmp_path: Path, copier: Copier) -> None:
    copier.yields = False
    with Held(copier, tmp_path) as held:
        save = held.save()
        fence = Call(held.ckpt.fence)
        fence.assert_waits()
        copier.open()
        fence.join()
        assert save.snapshotted.done()
        for parameter in held.model.parameters():
            parameter.detach().add_(1)
            parameter.data.zero_()
        held.assert_saved(save)


@pytest.mark.parametrize("keyword", [False, True], ids=["step(closure)", "step(closure=closure)"])
@pytest.mark.parametrize(
    "make",
    [momentum, fused, partial(torch.optim.LBFGS, max_iter=3)],
    ids=["SGD", "AdamW fused", "LBFGS"],
)
def test_the_first_call_of_a_closure_comes_before_the_fence(
    tmp_path: Path, copier: Copier, make: Any, *, keyword: bool
) -> None:
    fenced: list[int] = []

    def closure() -> float:
        fenced.append(copier.fenced)
        held.opt.zero_grad()
        held.backward()
        return 1.0

    with Held(copier, tmp_path, partial(with_closure, make_optimizer=make)) as held:
        save = held.save()
        assert (held.opt.step(closure=closure) if keyword else held.opt.step(closure)) == 1.0
        assert fenced[0] == 0
        assert copier.fenced > 0
        assert set(fenced[1:]) <= {copier.fenced}
        held.assert_saved(save)


def test_an_optimizer_of_another_kind_is_fenced_before_its_closure(tmp_path: Path, copier: Copier) -> None:
    with Held(copier, tmp_path, partial(train, make_optimizer=partial(Impatient, lr=0.1))) as held:
        save = held.save()
        held.opt.step(lambda: float(copier.fenced > 0 or pytest.fail("it was not fenced")))
        held.assert_saved(save)


def test_an_optimizer_that_owns_nothing_of_it_does_not_wait(tmp_path: Path, copier: Copier) -> None:
    with Held(copier, tmp_path) as held:
        other = train(lambda _: None, fused)
        held.ckpt.attach(other.objects["opt"])
        other.step()
        save = held.save()
        for _ in range(3):
            other.step()
        assert (copier.behind, copier.fenced) == (0, 0)
        assert not save.snapshotted.done()
        held.opt.step()
        held.assert_saved(save)


def test_only_what_attached_optimizers_own_is_deferred(tmp_path: Path, copier: Copier) -> None:
    with Held(copier, tmp_path) as held:
        other = train(lambda _: None, momentum)
        other.step()
        state = {**held.training.objects, "other": other.plain_state()}
        save = held.save(1, {name: copy.copy(value) for name, value in held.training.plain_state().items()})
        alone = save.stats.deferred_bytes
        assert alone == sum(2 * p.nbytes for p in held.model.parameters() if p.ndim == 2)
        held.opt.step()
        held.assert_saved(save)
        copier.hold()
        save = held.ckpt.save(2, state, overlap=True)
        assert save.stats.deferred_bytes == alone
        copier.open()
        held.ckpt.wait()
        held.ckpt.attach(other.objects["opt"])
        save = held.ckpt.save(3, state, overlap=True)
        assert save.stats.deferred_bytes == 2 * alone


@pytest.mark.parametrize("checkpointers", [1, 2])
def test_a_step_waits_for_all_pending_snapshots(tmp_path: Path, copier: Copier, checkpointers: int) -> None:
    copier.yields = False
    with Held(copier, tmp_path / "0", max_in_flight=2) as held, Checkpointer(tmp_path / "1") as other:
        held.backward()
        state = held.training.plain_state()
        saves = [held.save(1)]
        if checkpointers == 1:
            saves.append(held.save(2))
        else:
            held.expected[2] = held.expected[1]
            other.attach(held.opt)
            saves.append(other.save(2, state, overlap=True))
            assert saves[1].stats.overlapped
        assert len(fences.pending()) == 2
        step = Call(held.opt.step)
        step.assert_waits()
        copier.open()
        step.join()
        assert all(save.snapshotted.done() for save in saves)
        for save in saves:
            held.assert_saved(save)


def test_wrappers_of_optimizers_attach_what_they_wrap(tmp_path: Path, copier: Copier) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    with Held(copier, tmp_path) as held:
        model, opt = fabric.setup(held.model, held.opt)
        with Checkpointer(tmp_path / "fabric") as ckpt:
            ckpt.attach(opt)
            wrapped: Any = LightningOptimizer(held.opt)
            ckpt.attach(wrapped)
            copier.hold()
            save = ckpt.save(1, held.training.plain_state(), overlap=True)
            held.expected[1] = held.training.plain_state()
            assert save.stats.overlapped
            fabric.backward(model(torch.ones(2, WIDTH)).sum())
            before = held.values()
            opt.step()
            assert copier.fenced > 0
            saved = ckpt.load(1, weights_only=False)
            assert all(are_same([*saved["model"].values()], before))


class Unhooked(torch.optim.Optimizer):
    """Has a step without hooks, as it has not called `super().__init__()`."""

    def __init__(self) -> None:
        self.state, self.param_groups = {}, []  # type: ignore[assignment]


@pytest.mark.parametrize("no_optimizer", [object(), None, Unhooked(), nn.Linear(1, 1)])
def test_what_has_no_step_hooks_is_not_attached(tmp_path: Path, copier: Copier, no_optimizer: Any) -> None:
    del copier
    model = perceptron()
    opt = momentum(model.parameters())
    with Checkpointer(tmp_path, overlap=True) as ckpt:
        with pytest.raises(TypeError, match=f"a {type(no_optimizer).__name__} is no torch.optim.Optimizer"):
            ckpt.attach(opt, no_optimizer)
        opt.step()
        save = ckpt.save(1, {"model": model}, overlap=True)
        assert save.stats.reason == "nothing of the state belongs to an attached optimizer"


def test_what_nobody_owns_is_saved_as_it_was(tmp_path: Path, copier: Copier) -> None:
    with Held(copier, tmp_path) as held:
        ema = AveragedModel(held.model)
        held.model.register_buffer("average", torch.ones(100_000))
        loose = {"tensor": torch.ones(100_000), "array": np.ones(100_000), "list": [1]}
        alias = held.model[0].weight.detach()[1:]
        state = {**held.training.plain_state(), "ema": ema.state_dict(), "loose": loose, "alias": alias}
        save = held.save(1, state)
        held.model.average.zero_()
        ema.update_parameters(nn.Sequential(*held.model, nn.Identity()))
        for parameter in ema.parameters():
            parameter.detach().zero_()
        loose["tensor"].zero_()  # type: ignore[attr-defined]
        loose["array"][:] = 0  # type: ignore[index]
        loose["list"].clear()  # type: ignore[attr-defined]
        state["opt"]["param_groups"].clear()
        state["rng"].zero_()
        state.clear()
        held.assert_saved(save)


def test_a_queued_save_is_replaced_once_it_is_copied(tmp_path: Path, copier: Copier) -> None:
    gate = Gate()
    store = gated_store(tmp_path, gate, "draft")
    with Held(copier, gate=gate, store=store, max_in_flight=2, when_busy="replace") as held:
        first = held.save(1)
        copier.open()
        gate.wait_for_arrival()
        second = held.save(2)
        held.expected[3] = held.expected[2]
        saves: list[Any] = []
        replacing = Call(lambda: saves.append(held.ckpt.save(3, held.training.plain_state(), overlap=True)))
        replacing.assert_waits()
        copier.open()
        replacing.join()
        assert second.skipped
        assert second.snapshotted.done()
        held.backward()
        held.opt.step()
        gate.open()
        for save in (first, *saves):
            held.assert_saved(save)


def test_a_save_that_is_replaced_leaves_no_fence(tmp_path: Path, copier: Copier) -> None:
    gate = Gate()
    store = gated_store(tmp_path, gate, "draft")
    with Held(copier, gate=gate, store=store, max_in_flight=2, when_busy="replace") as held:
        held.ckpt.save(1, {}, overlap=False)
        gate.wait_for_arrival()
        second = held.save(2)
        copier.open()
        held.ckpt.save(3, {}, overlap=False)
        assert second.skipped
        assert fences.pending() == ()
        gate.open()


def test_a_skipped_save_is_not_fenced(tmp_path: Path, copier: Copier) -> None:
    with Held(copier, tmp_path, when_busy="skip") as held:
        save = held.save()
        second = held.ckpt.save(2, held.training.plain_state(), overlap=True)
        assert second.skipped
        assert not second.stats.overlapped
        assert len(fences.pending()) == 1
        copier.open()
        held.assert_saved(save)


@pytest.mark.parametrize("call", ["load", "restore", "wait", "close"])
def test_a_call_that_waits_for_the_save_waits_for_its_copy(tmp_path: Path, copier: Copier, call: str) -> None:
    with Held(copier, tmp_path) as held:
        save = held.save()
        arguments = [held.training.state()] if call == "restore" else []
        calling = Call(lambda: getattr(held.ckpt, call)(*arguments))
        calling.assert_waits()
        copier.open()
        calling.join()
        assert save.snapshotted.done()
        held.assert_saved(save)


def test_an_error_after_a_save_loses_nothing(tmp_path: Path, copier: Copier) -> None:
    held = Held(copier, tmp_path)
    save = held.save()
    with pytest.raises(ZeroDivisionError), held:
        _ = 1 / 0
    held.assert_saved(save)
