"""Measure what a save costs the training thread, and how soon it is durable."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

import states
from asyncckpt import Checkpointer, LastN
from asyncckpt._bench.training import PlainCopy
from bare import Bare, bring_in_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt import Save
    from harness import Options, Samples

WARMING = 3


def warm_saves(options: Options) -> Samples:
    """Save the same state again and again, by turns with a plain copy and with bare writes."""
    state = options.training().state()
    samples: defaultdict[str, list[float]] = defaultdict(list)
    copy = PlainCopy(state)
    with Checkpointer(options.directory, keep=LastN(1)) as ckpt:
        nbytes = ckpt.save(0, state).committed.result().nbytes
        ckpt.save(1, state)
        ckpt.wait()
        with Bare(options.directory, nbytes) as bare:
            samples["direct"].append(float(bare.direct))
            bare.write(options.directory / "bare", nbytes)
            for step in range(2, options.repeat + 2):
                options.settle()
                samples["copy_s"].append(copy.run())
                options.settle()
                _save_until_durable(ckpt, step, state, samples)
                options.settle()
                samples["bare_write_s"].append(bare.write(options.directory / "bare", nbytes).seconds)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(options.repeat):
            samples["copy_by_one_thread_s"].append(copy.run())
    samples["threads"].append(threads)
    samples["state_bytes"].append(states.bytes_of(state))
    samples["tensors"].append(len(states.distinct_tensors(state)))
    return samples


def _save_until_durable(ckpt: Checkpointer, step: int, state: Any, samples: Samples) -> None:
    began = time.perf_counter()
    save = ckpt.save(step, state)
    returned = time.perf_counter()
    nbytes = save.committed.result().nbytes
    durable = time.perf_counter()
    ckpt.wait()
    samples["stall_s"].append(returned - began)
    samples["durable_s"].append(durable - began)
    samples["file_bytes"].append(nbytes)
    for part in ("stall", "wait", "freeze", "copy", "checksum", "write", "sync", "commit", "durable"):
        samples[f"stats_{part}_s"].append(getattr(save.stats, part))


def first_save(options: Options, *, reserve: bool) -> Samples:
    """Measure the first save of this process, and then a plain copy of the same state."""
    state = options.training().state()
    with Checkpointer(options.directory, keep=LastN(1)) as ckpt:
        samples = {}
        options.settle()
        bring_in_memory(states.bytes_of(state))
        if reserve:
            began = time.perf_counter()
            ckpt.reserve(state)
            samples["reserve_s"] = [time.perf_counter() - began]
        samples["stall_s"] = [_stall(ckpt, 1, state)]
        ckpt.wait()
    copy = PlainCopy(state)
    options.settle()
    copies = sorted(copy.run() for _ in range(3))
    return samples | {"copy_s": [copies[1]]}


def many_tensors(options: Options, count: int = 10_000) -> Samples:
    """Save `count` tensors, when only their values changed, and when numbers changed as well."""
    torch.set_num_threads(1)
    with torch.device(options.device):
        state = states.many_tensors(count)
    tensors = list(state["model"].values())

    def values(_: int) -> None:
        torch._foreach_add_(tensors, 1.0)
        options.synchronize()

    def numbers(step: int) -> None:
        values(step)
        state["step"] = step
        for group in state["optimizer"]["param_groups"]:
            group["lr"] = 1e-3 / (1 + step)

    with Checkpointer(options.directory, keep=LastN(1)) as ckpt:
        for step in range(WARMING):
            ckpt.save(step, state)
        ckpt.wait()
        first, second = WARMING, WARMING + options.repeat
        only_values = [_after(ckpt, values, step, state) for step in range(first, second)]
        # Two cases, each warmed up: the first save of a case meets the last state of the other.
        _after(ckpt, numbers, second, state)
        also_numbers = [
            _after(ckpt, numbers, step, state) for step in range(second + 1, second + 1 + options.repeat)
        ]
    return {"values_s": only_values, "numbers_s": also_numbers, "tensors": [float(len(tensors))]}


def small(options: Options) -> Samples:
    """Save a state of 1 MB."""
    torch.set_num_threads(1)
    state = states.small()

    def change(step: int) -> None:
        state["step"] = step

    with Checkpointer(options.directory, keep=LastN(1)) as ckpt:
        for step in range(WARMING):
            _after(ckpt, change, step, state)
        stalls = [_after(ckpt, change, step, state) for step in range(WARMING, WARMING + options.repeat)]
    return {"stall_s": stalls, "state_bytes": [states.bytes_of(state)]}


def _after(ckpt: Checkpointer, change: Callable[[int], None], step: int, state: Any) -> float:
    """Return the stall of a save of a changed state, when no other save is under way."""
    change(step)
    ckpt.wait()
    return _stall(ckpt, step, state)


def _stall(ckpt: Checkpointer, step: int, state: Any) -> float:
    began = time.perf_counter()
    save: Save = ckpt.save(step, state)
    seconds = time.perf_counter() - began
    save.committed.result()
    return seconds
