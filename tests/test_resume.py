"""A run that is resumed in another process goes on as if it had never stopped, to the last bit."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import pytest

from programs import Interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STEPS = 12

TRAIN = """
import json, os, signal, sys
import asyncckpt, torch

torch.set_num_threads(1)

class Run:
    def __init__(self, seed):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(16, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Dropout(0.3),
            torch.nn.Linear(32, 1),
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.05, total_steps=100)
        self.state = {
            "model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler,
            "rng": torch.get_rng_state(), "step": 0,
        }

    def train(self):
        # one step; the loss to the last bit
        x = torch.randn(8, 16)
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.state["rng"] = torch.get_rng_state()
        self.state["step"] += 1
        return loss.item().hex(), self.scheduler.get_last_lr()[0].hex()

    def weights(self):
        # every byte of the model
        return [bytes(t.numpy().tobytes()).hex() for t in self.model.state_dict().values()]

path, until = sys.argv[1], int(sys.argv[2])
"""

# Saves after every step and goes on at once, so that every file is written while the model changes.
FIRST = """
run = Run(1)
ckpt = asyncckpt.Checkpointer(path)
seen = []
for _ in range(until):
    seen.append(run.train())
    if sys.argv[3] == "save":
        ckpt.save(run.state["step"], run.state, metrics={"lr": run.scheduler.get_last_lr()[0]})
print(json.dumps([seen, run.weights()]), flush=True)
if sys.argv[3] == "save":
    ckpt.wait()
    os.kill(os.getpid(), signal.SIGKILL)
"""

# Resumes from each of these steps in turn, in objects that were made anew.
RESUMED = """
ckpt = asyncckpt.Checkpointer(path)
found = []
for step in map(int, sys.argv[3:]):
    run = Run(2)  # another seed: nothing is right by chance
    checkpoint = ckpt.restore(run.state, step)
    torch.set_rng_state(run.state["rng"])
    assert checkpoint.step == run.state["step"] == step
    assert checkpoint.metrics == {"lr": run.scheduler.get_last_lr()[0]}
    found.append([[run.train() for _ in range(until - step)], run.weights()])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    def run(script: str, *arguments: object, status: int = 0) -> Any:
        ended, output, errors = interpreter.run(TRAIN + script, tmp_path, *arguments)
        assert (ended, errors) == (status, "")
        return json.loads(output)

    expected, weights = run(FIRST, STEPS, "keep nothing")
    assert len({loss for loss, _ in expected}) == STEPS
    assert list(tmp_path.iterdir()) == []
    middle = STEPS // 2
    interrupted, _ = run(FIRST, middle + 1, "save", status=-signal.SIGKILL)
    assert interrupted == expected[: middle + 1]
    resumed = run(RESUMED, STEPS, middle, middle + 1)
    assert resumed == [[expected[middle:], weights], [expected[middle + 1 :], weights]]
