"""Overlapped saves beside the streams, graphs, modes and allocators of a real GPU."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncckpt import Checkpointer
from asyncckpt._snapshot.fences import watch_steps
from asyncckpt.errors import TornSnapshotError
from support import run_python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

MIB = 1 << 20
WIDTH = 1024
SLEEP = 1_500_000_000  # cycles of the device: about a second

on_gpu = pytest.mark.gpu
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


class Training:
    """Weights of 4 MiB and many small tensors that no optimizer owns; its steps need no device memory."""

    def __init__(self, device: str, layers: int = 6, **options: Any) -> None:
        watch_steps()  # a save is overlapped only after a step that was seen
        torch.manual_seed(0)
        self.weights = [torch.rand(WIDTH, WIDTH, device=device, requires_grad=True) for _ in range(layers)]
        self.small = [torch.full((7,), float(i), device=device, dtype=torch.bfloat16) for i in range(300)]
        for weight in self.weights:
            weight.grad = torch.rand_like(weight)
        self.opt = torch.optim.AdamW(self.weights, lr=0.1, **{"fused": True, **options})
        self.step()

    def step(self) -> None:
        self.opt.step()
        torch._foreach_add_(self.small, 1)

    def state(self) -> dict[str, Any]:
        return {"weights": [weight.detach() for weight in self.weights], "opt": self.opt, "small": self.small}

    def values(self) -> list[torch.Tensor]:
        moments = [value for entry in self.opt.state.values() for value in entry.values()]
        return [tensor.detach().cpu().clone() for tensor in (*self.weights, *moments, *self.small)]


def assert_loads(ckpt: Checkpointer, step: int, expected: list[torch.Tensor]) -> None:
    found = ckpt.load(step, map_location="cpu", weights_only=True)
    moments = [value for entry in found["opt"]["state"].values() for value in entry.values()]
    for one, other in zip([*found["weights"], *moments, *found["small"]], expected, strict=True):
        assert torch.equal(one, other.to(one.dtype))


@pytest.fixture
def warm(tmp_path: Path) -> Iterator[Callable[..., tuple[Checkpointer, Training]]]:
    """Make a training on the GPU and a Checkpointer whose memory is pinned, after a first overlapped save."""
    opened = []

    def make(budget: int = 256 * MIB, **options: Any) -> tuple[Checkpointer, Training]:
        training = Training("cuda", **options)
        ckpt = Checkpointer(tmp_path, overlap=True, device_memory=budget)
        opened.append(ckpt)
        ckpt.save(0, training.state())
        training.step()
        ckpt.wait()
        torch.cuda.synchronize()
        return ckpt, training

    yield make
    for ckpt in opened:
        ckpt.close()


@on_gpu
@pytest.mark.parametrize("budget", [16 * MIB, 256 * MIB])
def test_neither_a_save_nor_the_step_after_it_waits_for_the_device(
    warm: Callable[..., tuple[Checkpointer, Training]], budget: int
) -> None:
    ckpt, training = warm(budget)
    expected = training.values()
    torch.cuda._sleep(SLEEP)
    done = torch.cuda.current_stream().record_event()
    save = ckpt.save(1, training.state())
    training.step()
    assert not done.query()
    ckpt.wait()
    assert save.stats.overlapped
    # The copies had not begun when the fence came: as much is cloned as the budget allows.
    assert 0 < save.stats.spilled_bytes <= budget
    assert_loads(ckpt, 1, expected)


@on_gpu
def test_without_device_memory_a_step_waits_for_the_copies_on_the_device(
    warm: Callable[..., tuple[Checkpointer, Training]],
) -> None:
    ckpt, training = warm(0)
    expected = training.values()
    save = ckpt.save(1, training.state())
    for _ in range(3):
        training.step()
    ckpt.wait()
    assert save.stats.overlapped
    assert not save.stats.spilled_bytes
    assert_loads(ckpt, 1, expected)


@on_gpu
def test_a_full_device_makes_a_fence_wait_instead_of_clone(
    warm: Callable[..., tuple[Checkpointer, Training]],
) -> None:
    ckpt, training = warm(64 * MIB, layers=12)
    expected = training.values()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + MIB) / total)
        torch.cuda._sleep(SLEEP // 3)
        save = ckpt.save(1, training.state())
        training.step()
        ckpt.wait()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not save.stats.spilled_bytes
    assert_loads(ckpt, 1, expected)


@on_gpu
@pytest.mark.parametrize("budget", [0, 256 * MIB])
def test_a_training_on_a_stream_of_its_own(tmp_path: Path, budget: int) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), Checkpointer(tmp_path, overlap=True, device_memory=budget) as ckpt:
        training = Training("cuda")
        for step in range(3):
            expected = training.values()
            torch.cuda._sleep(SLEEP // 10)
            ckpt.save(step, training.state())
            training.step()
            assert torch.cuda.current_stream() == stream
            ckpt.wait()
            assert_loads(ckpt, step, expected)


@on_gpu
@pytest.mark.parametrize("budget", [0, 256 * MIB])
def test_the_optimizer_that_steps_second_on_another_stream_waits_as_well(tmp_path: Path, budget: int) -> None:
    first, second = Training("cuda"), Training("cuda")
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    with Checkpointer(tmp_path, overlap=True, device_memory=budget) as ckpt:
        for step in range(3):
            torch.cuda.synchronize()
            expected = first.values(), second.values()
            torch.cuda._sleep(SLEEP // 10)
            ckpt.save(step, {"first": first.state(), "second": second.state()})
            for training, stream in zip((first, second), streams, strict=True):
                with torch.cuda.stream(stream):  # neither is ordered behind the default stream
                    training.opt.step()
            ckpt.wait()
            torch.cuda.synchronize()
            found = ckpt.load(step, map_location="cpu", weights_only=True)
            for name, values in zip(("first", "second"), expected, strict=True):
                weights = found[name]["weights"]
                assert all(map(torch.equal, weights, values[: len(weights)]))


@on_gpu
def test_an_optimizer_whose_step_is_captured_is_saved_blocking(tmp_path: Path) -> None:
    training = Training("cuda", fused=False, capturable=True)
    with Checkpointer(tmp_path, overlap=True) as ckpt:
        assert ckpt.save(0, training.state()).stats.overlapped
        training.step()
        ckpt.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            training.step()
        expected = training.values()
        save = ckpt.save(1, training.state())
        graph.replay()
        ckpt.wait()
        assert not save.stats.overlapped
        assert "captured into a CUDA graph" in save.stats.reason
        assert_loads(ckpt, 1, expected)


@on_gpu
def test_a_capture_in_the_default_mode_succeeds_while_copies_are_under_way(tmp_path: Path) -> None:
    training = Training("cuda", layers=40)
    x = torch.zeros(10, device="cuda")
    with Checkpointer(tmp_path, overlap=True) as ckpt:
        for step in range(3):
            expected = training.values()
            ckpt.save(step, training.state())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="global"):
                for _ in range(500):
                    x += 1
            graph.replay()
            training.step()
            ckpt.wait()
            assert_loads(ckpt, step, expected)
    assert x.eq(1500).all()


@devices
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", ["inference", "autocast", "default device", "no_grad"])
def test_saves_in_modes_of_the_calling_thread(
    tmp_path: Path, device: str, mode: str, *, overlap: bool
) -> None:
    modes: dict[str, AbstractContextManager[Any]] = {
        "inference": torch.inference_mode(),
        "autocast": torch.autocast(device, dtype=torch.float16),
        "default device": torch.device(device),
        "no_grad": torch.no_grad(),
    }
    training = Training(device)
    expected = training.values()
    with Checkpointer(tmp_path) as ckpt:
        with modes[mode]:
            save = ckpt.save(1, training.state(), overlap=overlap)
        training.step()
        ckpt.wait()
        assert save.stats.overlapped is overlap
        assert_loads(ckpt, 1, expected)


@devices
def test_checksums_see_what_version_counters_do_not(tmp_path: Path, device: str) -> None:
    training = Training(device)
    before = training.values()
    errors: list[BaseException] = []
    with Checkpointer(
        tmp_path, overlap=True, guard="checksum", on_error=lambda _, error: errors.append(error)
    ) as ckpt:
        if device == "cuda":
            torch.cuda._sleep(SLEEP // 10)
        save = ckpt.save(1, training.state())
        training.weights[0].data.add_(1)
        with suppress(TornSnapshotError):
            save.committed.result()
            assert_loads(ckpt, 1, before)
        expected = training.values()
        ckpt.save(2, training.state(), overlap=False).committed.result()
        assert_loads(ckpt, 2, expected)
    assert all(isinstance(error, TornSnapshotError) for error in errors)


SCRIPT = """
    import sys, torch
    from asyncckpt import Checkpointer

    device, directory = sys.argv[1:]
    weights = [torch.rand(1024, 1024, device=device, requires_grad=True) for _ in range(8)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    opt = torch.optim.AdamW(weights, fused=True)
    with Checkpointer(directory, overlap=True, device_memory=8 << 20) as ckpt:
        opt.step()
        for step in range(3):
            expected = [weight.detach().cpu().clone() for weight in weights]
            save = ckpt.save(step, {"weights": [weight.detach() for weight in weights], "opt": opt})
            assert save.stats.overlapped
            opt.step()
            del opt.state[weights[step]]
            filling = [torch.zeros_like(weight) for weight in weights]
            ckpt.wait()
            found = ckpt.load(step, map_location="cpu", weights_only=True)["weights"]
            assert all(map(torch.equal, found, expected))
    devices = range(torch.cuda.device_count())
    print([torch._C._cuda_hasPrimaryContext(index) for index in devices])
"""


@on_gpu
def test_with_expandable_segments(tmp_path: Path) -> None:
    env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert run_python(SCRIPT, "cuda", str(tmp_path), env=env)[0::2] == (0, "")


@on_gpu
def test_no_context_is_made_on_a_gpu_that_the_program_does_not_use(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    status, output, errors = run_python(SCRIPT, "cuda:1", str(tmp_path))
    assert (status, errors) == (0, "")
    assert output.startswith("[False, True")


@on_gpu
def test_a_state_on_two_gpus(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    trainings = Training("cuda:0"), Training("cuda:1")
    with Checkpointer(tmp_path, overlap=True, device_memory=8 * MIB) as ckpt:
        for step in range(3):
            expected = [training.values() for training in trainings]
            ckpt.save(step, dict(enumerate(training.state() for training in trainings)))
            for training in trainings:
                training.step()
            ckpt.wait()
            found = ckpt.load(step, map_location="cpu", weights_only=True)
            for index, values in enumerate(expected):
                assert all(map(torch.equal, found[index]["weights"], values[: len(trainings[index].weights)]))
