"""Measure what saves cost the training of a GPT, beside bare copies of its state."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

import states
from asyncckpt import Checkpointer, LastN
from asyncckpt._bench.training import PlainCopy
from gpu_model import MEDIUM, TINY, WIDE, GPTTraining
from gpu_ways import Blocking, Cloned, HandMade, Saved, Way
from harness import order
from same import difference

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_model import Shape
    from harness import Options

    Samples = dict[str, list[Any]]

STEPS = 8  # in which there is one save
LONG, SHORT = 59e-3, 10e-3  # seconds of a step
ROOMY = 1 << 30  # bytes of device memory, more than a Checkpointer takes by itself
BUDGETS = (64 << 20, 256 << 20, 1 << 30)
STATS = ("stall", "wait", "freeze", "copy", "deferred", "fence", "device_fence", "durable")
COUNTS = ("overlapped", "deferred_bytes", "spilled_bytes", "reason")


def lost(options: Options) -> Samples:
    """Save by turns in each way, while steps take 59 ms; the first save of the process is overlapped."""
    return _lost(options, MEDIUM, LONG)


def short(options: Options) -> Samples:
    """Do the same while steps are shorter than the copy."""
    return _lost(options, WIDE, SHORT)


def _lost(options: Options, shape: Shape, seconds: float) -> Samples:
    samples: defaultdict[str, list[Any]] = defaultdict(list)
    torch.set_num_threads(1)  # as the host of a GPU job; on busy cores more of them wait for each other
    training = GPTTraining(TINY if options.quick else shape, options.device)
    if not options.quick:
        training.last(seconds)
    with (
        Checkpointer(options.directory / "default", keep=LastN(1)) as ckpt,
        Checkpointer(options.directory / "roomy", keep=LastN(1), device_memory=ROOMY) as roomy,
    ):
        loop = _Loop(options, training, samples)
        overlapped = Saved(ckpt, training.state, overlap=True)
        loop.measure("first", overlapped)
        # Its pinned memory would have been ready for the first save.
        plain = PlainCopy(training.state_dicts(0))
        ways: dict[str, Way] = {
            "overlapped": overlapped,
            "roomy": Saved(roomy, training.state, overlap=True),
            "blocking": Saved(ckpt, training.state, overlap=False),
            "bare": Blocking(plain),
            "handmade": HandMade(plain, options.device),
            "cloned": Cloned(plain, options.device),
        }
        for way in ways.values():
            loop.warm_up(way)
        for turn in range(options.repeat):
            for name in order(list(ways), turn):
                loop.measure(name, ways[name])
        del plain, ways
        _check(training, overlapped, ckpt)
    samples["batch"].append(float(training.batch))
    samples["state_bytes"].append(float(states.bytes_of(training.state_dicts(0))))
    samples["tensors"].append(float(len(states.distinct_tensors(training.state_dicts(0)))))
    return dict(samples)


class _Loop:
    """A training loop that notes what a save in it costs."""

    def __init__(self, options: Options, training: GPTTraining, samples: Samples) -> None:
        self._options, self._training, self._samples = options, training, samples
        self._step = 0
        self._alone = self._steps()

    def warm_up(self, way: Way) -> None:
        """Save once without measuring."""
        self._begin(way)
        self._steps(way.fence)
        way.end()

    def measure(self, name: str, way: Way) -> None:
        """Save, take some steps, and note what they take longer than without a save, before and after it."""
        self._options.synchronize()
        began = time.perf_counter()
        self._begin(way)
        call = time.perf_counter() - began
        self._steps(way.fence)
        taken = time.perf_counter() - began
        way.end()
        before, self._alone = self._alone, self._steps()
        alone = mean((before, self._alone))
        self._samples[f"{name}_call_s"].append(call)
        self._samples[f"{name}_lost_s"].append(taken - alone)
        self._samples["step_s"].append(alone / STEPS)
        if isinstance(way, Saved):
            self._note_stats(name, way)

    def _begin(self, way: Way) -> None:
        self._step += 1
        way.begin(self._step)

    def _steps(self, fence: Callable[[], object] = lambda: None) -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            self._training.step(fence)
        self._options.synchronize()
        return time.perf_counter() - began

    def _note_stats(self, name: str, way: Saved) -> None:
        stats = way.save.stats
        for part in STATS:
            self._samples[f"{name}_stats_{part}_s"].append(getattr(stats, part))
        for count in COUNTS:
            self._samples[f"{name}_stats_{count}"].append(getattr(stats, count))


def _check(training: GPTTraining, way: Saved, ckpt: Checkpointer) -> None:
    """Make sure that an overlapped save has the values that the state had when it was called."""
    step = 1 << 20  # after all others
    expected = copy.deepcopy(training.state_dicts(step))
    way.begin(step)
    training.step()
    training.step()
    way.end()
    found = difference(expected, ckpt.load(step, weights_only=True))
    if found is not None:
        raise RuntimeError(f"the checkpoint is not the state at the save: {found}")


def device_memory(options: Options) -> Samples:
    """Find how much device memory an overlapped save takes beyond its budget.

    The save comes when the gradients are there, and the update next. Nothing has been copied by then, so all
    that fits into the budget is cloned. A whole step is measured as well: its backward pass has its own peak.
    """
    if options.device != "cuda":
        raise RuntimeError("the memory of a CPU is no device memory")
    samples: defaultdict[str, list[Any]] = defaultdict(list)
    training = GPTTraining(TINY if options.quick else MEDIUM, options.device)
    for budget in BUDGETS:
        with Checkpointer(options.directory / str(budget), keep=LastN(1), device_memory=budget) as ckpt:
            way = Saved(ckpt, training.state, overlap=True)
            for turn in range(options.repeat + 1):
                for name, action in (("update", training.optimizer.step), ("step", training.step)):
                    found = _peak_of_save(training, way, 2 * turn + (name == "step"), action) - budget
                    if turn:
                        samples["budget_bytes"].append(float(budget))
                        samples[f"{name}_beyond_bytes"].append(float(found))
                        samples[f"{name}_spilled_bytes"].append(float(way.save.stats.spilled_bytes))
    return dict(samples)


def _peak_of_save(training: GPTTraining, way: Saved, step: int, action: Callable[[], object]) -> int:
    """Return how much more device memory a save and an action take at once than the action alone."""

    def save_and_act() -> None:
        way.begin(step)
        action()

    training.backward()
    alone = _peak(action)
    training.backward()
    beside = _peak(save_and_act)
    way.end()
    return beside - alone


def _peak(action: Callable[[], object]) -> int:
    """Return the most device memory allocated during an action."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
