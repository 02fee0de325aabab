"""Measure what the background does to the training beside it: step times, processor time, memory."""

from __future__ import annotations

import time
from collections import defaultdict
from functools import partial
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch

import states
from asyncckpt import Checkpointer, LastN
from asyncckpt._bench.training import steps_for, steps_while
from bare import Bare
from harness import Options, Samples, forget_peak, status

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt import Save

STEP = 2e-3
SAVES = 4


def host_step() -> Callable[[], None]:
    """Return a training step as the host thread of a GPU job takes it: short calls, each yields the GIL."""
    a, b, c = (torch.rand(96, 96) for _ in range(3))

    def multiply(calls: int) -> None:
        for _ in range(calls):
            torch.mm(a, b, out=c)

    single = median(steps_for(partial(multiply, 1), 0.3))
    return partial(multiply, max(1, round(STEP / single)))


def steps(options: Options) -> Samples:
    """Take training steps by turns undisturbed, beside a save, and beside a bare process that writes."""
    samples: defaultdict[str, list[float]] = defaultdict(list)
    state = options.training().state()
    torch.set_num_threads(1)
    step_once = host_step()
    path = options.directory / "bare"
    with Checkpointer(options.directory, keep=LastN(1)) as ckpt:
        nbytes = ckpt.save(0, state).committed.result().nbytes
        ckpt.save(1, state)
        ckpt.wait()
        with Bare(options.directory, nbytes) as bare:
            bare.write(path, nbytes)
            for step in range(2, options.repeat + 2):
                options.settle()
                _note(samples, "undisturbed", steps_for(step_once, 0.2 if options.quick else 1.0))
                options.settle()
                cpu = _background_cpu()
                save = ckpt.save(step, state)
                _note(samples, "save", steps_while(step_once, _not_done(save)))
                ckpt.wait()
                samples["save_cpu_s_per_gb"].append((_background_cpu() - cpu) / nbytes * 1e9)
                options.settle()
                bare.begin_write(path, nbytes)
                _note(samples, "bare", steps_while(step_once, bare.writing))
                samples["bare_cpu_s_per_gb"].append(bare.end_write(path).cpu / nbytes * 1e9)
    undisturbed = median(samples["undisturbed_median_s"])
    for kind in ("undisturbed", "save", "bare"):
        samples[f"{kind}_pause_s"] = [longest - undisturbed for longest in samples[f"{kind}_longest_s"]]
    return samples


def _not_done(save: Save) -> Callable[[], bool]:
    return lambda: not save.committed.done()


def _note(samples: Samples, kind: str, times: list[float]) -> None:
    samples[f"{kind}_step_s"].append(mean(times))
    samples[f"{kind}_median_s"].append(median(times))
    samples[f"{kind}_longest_s"].append(max(times))


def _background_cpu() -> float:
    """Return the processor time of all threads of this process but the calling one."""
    return time.process_time() - time.thread_time()


def memory(options: Options) -> Samples:
    """Measure the host memory that several saves take at most, one in flight at a time."""
    torch.set_num_threads(1)
    state: Any = options.training().state()
    nbytes = states.bytes_of(state)
    before = status("VmRSS")
    forget_peak()
    with Checkpointer(options.directory, keep=LastN(1), max_in_flight=1) as ckpt:
        for step in range(SAVES):
            ckpt.save(step, state)
        ckpt.wait()
        after = status("VmRSS")
    return {
        "peak_bytes": [status("VmHWM") - before],
        "held_bytes": [after - before],
        "state_bytes": [float(nbytes)],
    }
