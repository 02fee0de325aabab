"""Saves of states on a GPU have the values that the state had at the save; each test runs on the CPU, too."""

from __future__ import annotations

import gc
import io
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from asyncckpt import Checkpointer
from asyncckpt.errors import TornSnapshotError
from sameness import assert_same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20
WIDTH = 256
BUDGETS = (0, 4 * MIB, 256 * MIB)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on busy cores more of them wait for each other
    yield request.param
    torch.set_num_threads(threads)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
}


class Training:
    """A few MB of parameters, batch-norm, and an average of the weights, which no optimizer owns."""

    def __init__(self, device: str, kind: str = "fused") -> None:
        torch.manual_seed(0)
        with torch.device(device):
            layers = [
                layer
                for _ in range(8)
                for layer in (nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU())
            ]
            self.model = nn.Sequential(*layers)
            self.average = [parameter.detach().clone() for parameter in self.model.parameters()]
            self.inputs = torch.rand(64, WIDTH)
        self.optimizer = OPTIMIZERS[kind](self.model.parameters())
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()
        torch._foreach_lerp_(self.average, list(self.model.parameters()), 0.1)

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "opt": self.optimizer, "average": self.average}

    def expected(self) -> Any:
        """Return what torch.save would save now."""
        state = self.state()
        return as_torch_saves({**state, "model": self.model.state_dict(), "opt": self.optimizer.state_dict()})


def as_torch_saves(state: object) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def loaded(ckpt: Checkpointer, step: int) -> Any:
    return ckpt.load(step, map_location="cpu", weights_only=True)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_an_overlapped_save_has_the_values_at_its_call_whatever_the_steps_after_it_change(
    tmp_path: Path, device: str, kind: str, budget: int
) -> None:
    training, expected = Training(device, kind), {}
    with Checkpointer(tmp_path, overlap=True, device_memory=budget) as ckpt:
        for step in range(5):
            expected[step] = training.expected()
            ckpt.save(step, training.state())
            for _ in range(step):
                training.step()
        ckpt.wait()
        for step, state in expected.items():
            assert_same(loaded(ckpt, step), state)


def test_a_save_takes_what_queued_kernels_will_have_written(tmp_path: Path, device: str) -> None:
    factor = torch.rand(1024, 1024, device=device) / 512
    for overlap in (False, True):
        x = torch.rand(1024, 1024, device=device)
        other = x.clone()
        for tensor in (other, x):
            for _ in range(20):
                torch.mm(tensor.clone(), factor, out=tensor)
        with Checkpointer(tmp_path / str(overlap)) as ckpt:
            ckpt.save(1, {"x": x}, overlap=overlap)
            x.zero_()
            ckpt.wait()
            assert_same(loaded(ckpt, 1), as_torch_saves({"x": other}))


def test_a_state_may_be_dropped_and_its_memory_reused_as_soon_as_save_returns(
    tmp_path: Path, device: str
) -> None:
    training = Training(device)
    expected = training.expected()
    with Checkpointer(tmp_path, overlap=True) as ckpt:
        ckpt.save(1, training.state())
        del training
        gc.collect()
        filling = [torch.full((MIB,), 7.0, device=device) for _ in range(16)]
        ckpt.wait()
        del filling
        assert_same(loaded(ckpt, 1), expected)


def test_a_parameter_changed_by_hand_fails_an_overlapped_save(tmp_path: Path, device: str) -> None:
    training = Training(device)
    with Checkpointer(tmp_path, overlap=True, on_error=lambda *_: None) as ckpt:
        save = ckpt.save(1, training.state())
        with torch.no_grad():
            next(training.model.parameters()).add_(1)
        assert isinstance(save.committed.exception(), TornSnapshotError) or not save.stats.overlapped
        save = ckpt.save(2, training.state())
        ckpt.fence()
        expected = training.expected()
        save.committed.result()
        assert_same(loaded(ckpt, 2), expected)


@pytest.mark.parametrize("overlap", [False, True])
def test_many_small_tensors_of_several_kinds_are_saved(tmp_path: Path, device: str, *, overlap: bool) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)
    with torch.device(device):
        state = {
            f"{kind} {i}": torch.randint(0, 2, (i % 7, 33)).to(kind) for kind in kinds for i in range(200)
        }
        state["column"] = torch.rand(64, 64)[:, 3]
        state["tied"] = state["torch.float32 5"]
        state["none"] = torch.empty(0)
    expected = as_torch_saves(state)
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state, overlap=overlap)
        for tensor in state.values():
            tensor.zero_()
        ckpt.wait()
        assert_same(loaded(ckpt, 1), expected)


def test_load_puts_tensors_where_it_is_told(tmp_path: Path, device: str) -> None:
    training = Training(device)
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, training.state())
        found = ckpt.load(1, map_location=device, weights_only=True)
    assert {tensor.device.type for tensor in found["model"].values()} == {device}
    assert_same(as_torch_saves(found), training.expected())


def test_restore_fills_live_parameters_where_they_are(tmp_path: Path, device: str) -> None:
    training = Training(device)
    expected = training.expected()
    parameters = [parameter.data_ptr() for parameter in training.model.parameters()]
    with Checkpointer(tmp_path, overlap=True) as ckpt:
        ckpt.save(1, training.state())
        training.step()
        training.step()
        ckpt.wait()
        ckpt.restore(training.state(), 1)
        assert_same(training.expected(), expected)
    assert [parameter.data_ptr() for parameter in training.model.parameters()] == parameters


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [0, MIB, 64 * MIB])
def test_an_overlapped_save_takes_no_more_device_memory_than_its_budget(tmp_path: Path, budget: int) -> None:
    training = Training("cuda")
    alone = peak_of(training.optimizer.step)
    with Checkpointer(tmp_path, overlap=True, device_memory=budget) as ckpt:

        def save_and_step(step: int) -> None:
            ckpt.save(step, training.state())
            training.optimizer.step()

        for step in range(3):
            assert peak_of(partial(save_and_step, step)) <= alone + budget
            ckpt.wait()


def peak_of(action: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
