"""Measure what saves of many ranks do to the training beside them: step times, memory."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from functools import partial
from importlib import import_module
from statistics import mean, median
from typing import TYPE_CHECKING

import torch

from asyncckpt._bench.training import steps_for, steps_while
from bare import Bare
from compare_one import Waiting
from harness import order
from peers.ranks import PEERS
from sharded_model import bytes_of
from sharded_setting import WARMING
from tree_memory import TreeMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from sharded_model import RankTraining
    from sharded_setting import Samples, Setting, Started

# Seconds of a step: calls of the host thread, and the wait for the device.
_BUSY, _AWAY = 5e-4, 1.5e-3
_SAVES = 2


def steps(setting: Setting) -> Samples:
    """Take training steps beside saves in all ways, and beside bare writes, of all ranks at once."""
    live = setting.training()
    nbytes = bytes_of(live.tensors())
    samples: Samples = defaultdict(list)
    step = host_step()
    asynchronous = {key: peer for key, peer in PEERS.items() if not peer.blocks}
    alone_for = partial(steps_for, step, 0.1 if setting.options.quick else 1.0)
    with Bare(setting.options.directory, nbytes) as bare, setting.started(asynchronous, live) as peers:
        bare.write(setting.bare_path, nbytes)

        def beside_writes() -> tuple[list[float], float]:
            began = time.perf_counter()
            bare.begin_write(setting.bare_path, nbytes)
            found = steps_while(step, bare.writing)
            ended = time.perf_counter()
            bare.end_write(setting.bare_path)
            return found, ended - began

        for turn in range(WARMING + setting.options.repeat):
            if turn == WARMING:
                samples.clear()
            for way in order([*peers, "bare"], turn):
                setting.settle()
                before = alone_for()
                setting.settle()
                found, took = (
                    beside_writes() if way == "bare" else _beside(setting, step, peers[way], str(turn))
                )
                setting.settle()
                alone = mean([*before, *alone_for()])
                samples[f"{way}_alone_s"].append(alone)
                samples[f"{way}_step_s"].append(mean(found))
                samples[f"{way}_longest_s"].append(max(found))
                # What the same steps would have taken without the save is not lost.
                samples[f"{way}_lost_s"].append(took - len(found) * alone)
    return samples


def host_step() -> Callable[[], None]:
    """Return a training step as the host thread of a GPU job takes it.

    Short calls, each of which yields the interpreter, and then a wait for the device. Without the wait the
    steps of several ranks would take all cores of a small machine, also those that a job has for its writer.
    """
    a, b, c = (torch.rand(96, 96) for _ in range(3))

    def multiply(calls: int) -> None:
        for _ in range(calls):
            torch.mm(a, b, out=c)

    single = median(steps_for(partial(multiply, 1), 0.3))
    calls = max(1, round(_BUSY / single))

    def step() -> None:
        multiply(calls)
        time.sleep(_AWAY)

    return step


def _beside(
    setting: Setting, step: Callable[[], None], started: Started, name: str
) -> tuple[list[float], float]:
    """Save once while steps are taken; returns these, and the time from the call until all was complete."""
    peer, state = started
    began = time.perf_counter()
    peer.save(state, name)
    waiting = Waiting(peer)
    found = steps_while(step, waiting.is_alive)
    ended = time.perf_counter()
    waiting.end()
    setting.remove(peer, name)
    return found, ended - began


def memory(setting: Setting) -> Samples:
    """Find the most memory of all ranks together over what the live states take, children included."""
    (key,) = setting.keys
    live = setting.training()
    samples: Samples = defaultdict(list, bytes=[bytes_of(live.tensors())])
    for module in (PEERS[key].module, "torch.distributed.checkpoint.state_dict"):
        import_module(module)  # code is no memory of a save
    setting.barrier()
    if not setting.leads:
        _save_some(setting, key, live)
        return samples
    # The process that has started all ranks.
    with TreeMemory(os.getppid()) as watch:
        before = watch.read().now
        _save_some(setting, key, live)
        samples["peak_bytes"].append(watch.read().peak - before)
    return samples


def _save_some(setting: Setting, key: str, live: RankTraining) -> None:
    with setting.started({key: PEERS[key]}, live) as peers:
        peer, state = peers[key]
        for turn in range(_SAVES):
            setting.settle()
            peer.save(state, str(turn))
            peer.wait()
            setting.remove(peer, str(turn))
