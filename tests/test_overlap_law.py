"""The law: a committed checkpoint holds the state as of its `save`, and what was changed by hand is torn."""

from __future__ import annotations

import copy
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncckpt import Checkpointer, TornSnapshotError
from asyncckpt._snapshot import fences
from asyncckpt._snapshot.range_copy import RangeCopy
from copier import Copier, assert_nothing_is_left
from sameness import assert_same
from support import torch_round_trip
from trainings import WIDTH, momentum, perceptron

if TYPE_CHECKING:
    from asyncckpt import Save

IN_FLIGHT = 3
OPTIMIZERS = [
    partial(torch.optim.SGD, lr=0.1),
    momentum,
    torch.optim.AdamW,
    partial(torch.optim.AdamW, fused=True),
]


class Overlapped(RuleBasedStateMachine):
    """Saves, steps, fences, pieces of copies, changes by hand, loads and closes, in any order.

    Attributes:
        guarded: the saves that no fence or commit has come behind: no change by hand is allowed.
        torn: those that have to fail.
        doubtful: those that may fail: nobody knows which came first, the change or the end of the copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp())
        self.copier = Copier()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("asyncckpt._snapshot.lanes.memmove", self.copier)
        fence = RangeCopy.fence

        def opening(copy: RangeCopy) -> None:
            self.copier.open()  # not before: a step without a fence would tear what is held back
            fence(copy)

        self.patch.setattr(RangeCopy, "fence", opening)
        self.expected: dict[int, Any] = {}
        self.saves: dict[int, Save] = {}
        self.guarded: set[int] = set()
        self.torn: set[int] = set()
        self.doubtful: set[int] = set()
        self.committed: list[int] = []

    @initialize(make=st.sampled_from(OPTIMIZERS), guard=st.sampled_from(["version", "checksum"]))
    def begin(self, make: Any, guard: Any) -> None:
        torch.manual_seed(0)
        self.guard = guard
        self.model: Any = perceptron()
        self.opt = make(self.model.parameters())
        self.loose = torch.zeros(20_000)
        self.reopen()
        self.step(1)

    def reopen(self) -> None:
        self.ckpt = Checkpointer(
            self.path,
            overlap=True,
            guard=self.guard,
            max_in_flight=IN_FLIGHT,
            on_error=lambda _save, _error: None,
        )

    @precondition(lambda self: len(self.saves) < IN_FLIGHT)
    @rule(hold=st.booleans())
    def save(self, *, hold: bool) -> None:
        if hold:
            self.copier.hold()
        number = len(self.expected) + 1
        self.expected[number] = torch_round_trip(
            {"model": self.model.state_dict(), "opt": self.opt.state_dict(), "loose": self.loose}
        )
        state = {"model": self.model, "opt": self.opt, "loose": self.loose}
        self.saves[number] = self.ckpt.save(number, state, overlap=True)
        assert self.saves[number].stats.overlapped
        self.guarded.add(number)

    @rule(count=st.integers(1, 2))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.model(torch.randn(2, WIDTH)).square().mean().backward()
            self.opt.step()
            self.opt.zero_grad()
        self.guarded.clear()

    @rule()
    def step_once(self) -> None:
        self.step(1)

    @rule()
    def fence(self) -> None:
        self.ckpt.fence()
        self.guarded.clear()

    @rule()
    def copy_a_piece(self) -> None:
        # Which rules there are must not depend on how fast other threads are.
        if self.copier._held and not self.copier._opened:
            self.copier.release()

    @rule()
    def copy_all(self) -> None:
        self.copier.open()

    @rule(of_optimizer=st.booleans(), layer=st.sampled_from([0, 2, -1]))
    def change_by_hand(self, *, of_optimizer: bool, layer: int) -> None:
        weight = self.model[layer].weight
        state = [t for t in self.opt.state.get(weight, {}).values() if t is not None and t.nbytes > 1 << 15]
        for number in self.guarded:
            self.doubtful.add(number)
            if not self.copier._opened and not self.is_copied(number):
                self.torn.add(number)
        (state[0] if of_optimizer and state else weight.detach()).mul_(0.5)

    def is_copied(self, number: int) -> bool:
        return not any(
            job.save is self.saves[number]
            and job.snapshot is not None
            and job.snapshot.deferred is not None
            and not job.snapshot.deferred.copy.is_complete()
            for job in self.ckpt._saver._jobs_in_flight()
        )

    @precondition(lambda self: self.guard == "checksum")
    @rule(layer=st.sampled_from([0, 2, -1]))
    def change_unseen(self, layer: int) -> None:
        self.model[layer].weight.data.mul_(0.5)
        self.doubtful |= self.guarded  # unless that was copied already

    @rule(what=st.sampled_from(["what nobody owns", "memory of parameters", "state of the optimizer"]))
    def change_what_may_change(self, what: str) -> None:
        if what == "what nobody owns":
            self.loose.add_(1)
        elif what == "memory of parameters":
            for parameter in self.model.parameters():
                parameter.data = parameter.detach() * 0.9
        else:
            self.opt.load_state_dict(copy.deepcopy(self.opt.state_dict()))

    @rule(how=st.sampled_from(["wait", "restore", "close"]))
    def look(self, how: str) -> None:
        self.copier.open()
        if how == "restore" and self.committed:
            self.restore()
        elif how == "close":
            self.ckpt.close()
            assert fences.pending() == ()
        self.check()
        if how == "close":
            self.reopen()

    def check(self) -> None:
        """Wait for all saves, and compare what they have written."""
        self.copier.open()
        for number, save in self.saves.items():
            error = save.committed.exception(30)
            assert save.snapshotted.done()
            if error is None:
                assert number not in self.torn
                assert_same(torch.load(save.path, weights_only=False), self.expected[number])
                self.committed.append(number)
            else:
                assert isinstance(error, TornSnapshotError), error
                assert number in self.doubtful
        self.saves.clear()
        self.guarded.clear()
        assert sorted(c.step or 0 for c in self.ckpt.checkpoints()) == self.committed

    def restore(self) -> None:
        live = {"model": self.model, "opt": self.opt, "loose": self.loose}
        found = self.ckpt.restore(live)
        assert found is not None
        assert found.step is not None
        state = {**live, "model": self.model.state_dict(), "opt": self.opt.state_dict()}
        assert_same(torch_round_trip(state), self.expected[found.step])

    @invariant()
    def host_memory_is_bounded(self) -> None:
        assert len(fences.pending()) <= IN_FLIGHT

    def teardown(self) -> None:
        try:
            if hasattr(self, "ckpt"):
                self.check()
                self.ckpt.close()
                assert_nothing_is_left()
        finally:
            self.copier.open()
            self.patch.undo()
            shutil.rmtree(self.path)


TestOverlapped = pytest.mark.timeout(300)(Overlapped.TestCase)
TestOverlapped.settings = settings(max_examples=12, stateful_step_count=16, deadline=None)
