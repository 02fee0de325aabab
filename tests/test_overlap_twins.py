"""Overlapped saves hold what torch.save would have written at the same points; training is the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncckpt import Checkpointer, TornSnapshotError
from sameness import assert_same
from support import torch_round_trip
from trainings import TRAININGS, with_max_norm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from asyncckpt._saving.save import Save
    from copier import Copier
    from trainings import Phase, Training

# torch's own, of the backends of torch.compile, and of schedulers that step before a skipped step.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)`:UserWarning"),
]

STEPS = 5
SAVED = (2, 3)  # before these steps


class Pace:
    """Lets a copy go on as training does.

    Args:
        kind: "slow" for a piece in each phase and the others at the fence, "at once" for none before the
            fence, "quick" for a checkpoint that is durable before the step.
    """

    def __init__(self, copier: Copier, kind: str) -> None:
        self._copier = copier
        self._kind = kind
        self._save: Save | None = None
        self._phases: set[str] = set()
        self.copied_in = dict.fromkeys(("forward", "backward"), 0)

    def hold(self) -> None:
        self._copier.hold()

    def begin(self, save: Save) -> None:
        """Note a save whose copy is held back."""
        self._save, self._phases = save, {"forward", "backward"}
        self._copier.wait_for_arrival()

    def __call__(self, phase: str) -> None:
        if phase not in self._phases:
            return
        assert self._save is not None
        self._phases.remove(phase)
        before = self._copier.behind
        if self._kind == "slow":
            self._copier.release()
        elif self._kind == "quick" and phase == "backward":
            self._copier.open()
            self._save.committed.result(30)
        self.copied_in[phase] += self._copier.behind - before


def run(make: Callable[[Phase], Training], phase: Phase, save: Callable[[int, Training], object]) -> Any:
    """Train, and return the state at the end."""
    torch.manual_seed(1)
    training = make(phase)
    for number in range(STEPS):
        if number in SAVED:
            save(number, training)
        training.step()
    return torch_round_trip(training.plain_state())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in TRAININGS
        for kind in ("slow", "at once", "quick")
        if kind == "slow" or "compiled" not in name  # compilations take seconds
    ],
)
def test_twins(tmp_path: Path, copier: Copier, name: str, kind: str) -> None:
    pace = Pace(copier, kind)
    saves: dict[int, Save] = {}
    expected: dict[int, Any] = {}

    def save(step: int, training: Training) -> None:
        pace.hold()
        saves[step] = ckpt.save(step, training.state(), overlap=True)
        pace.begin(saves[step])

    def save_by_torch(step: int, training: Training) -> None:
        expected[step] = torch_round_trip(training.plain_state())

    with Checkpointer(tmp_path, max_in_flight=2, overlap=True) as ckpt:
        end = run(TRAININGS[name], pace, save)
    assert_same(end, run(TRAININGS[name], lambda _: None, save_by_torch))
    for step in SAVED:
        assert saves[step].stats.overlapped, saves[step].stats.reason
        assert_same(torch.load(saves[step].path, weights_only=False), expected[step])
    if kind == "slow":
        assert pace.copied_in == {"forward": len(SAVED), "backward": len(SAVED)}
    assert (copier.fenced == 0) == (kind == "quick")


def test_a_parameter_that_the_forward_pass_changes(tmp_path: Path, copier: Copier) -> None:
    saves = []

    def save(step: int, training: Training) -> None:
        copier.hold()
        saves.append(ckpt.save(step, training.state(), overlap=True))

    with Checkpointer(tmp_path, overlap=True) as ckpt:
        torch.manual_seed(1)
        training = with_max_norm(lambda _: None)
        training.step()
        save(1, training)
        training.step()
        with pytest.raises(TornSnapshotError, match=r'state\["model"\]\["weight"\] was changed in place'):
            saves[0].committed.result(30)
        assert ckpt.checkpoints() == []
        ckpt.save(2, training.state(), overlap=False)
    assert [checkpoint.step for checkpoint in Checkpointer(tmp_path).checkpoints()] == [2]
