"""Measure what saves of many ranks cost the training threads, and how soon they are durable."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

import torch.distributed as dist

from bare import Bare
from harness import order
from peers.ranks import PEERS, REPLICATED, Ours
from sharded_model import BareCopy, bytes_of, shares
from sharded_setting import WARMING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from peers.base import Peer
    from sharded_model import RankTraining
    from sharded_setting import Samples, Setting, Started

STATS = ("wait", "agreement", "freeze", "copy", "checksum", "write", "sync", "commit", "durable")


def sharded(setting: Setting) -> Samples:
    """Save a model of FSDP2 in all ways, by turns with a bare copy and bare writes of this rank's bytes."""
    live = setting.training()
    tensors = live.tensors()
    nbytes, copy = bytes_of(tensors), BareCopy(tensors)
    samples: Samples = defaultdict(list)
    with Bare(setting.options.directory, nbytes) as bare:
        bare.write(setting.bare_path, nbytes)
        limits = {
            "copy": copy.run,
            "write": lambda: bare.write(setting.bare_path, nbytes).seconds,
        }
        _by_turns(setting, PEERS, live, limits, samples)
        samples["direct"].append(bare.direct)
    samples["bytes"].append(nbytes)
    samples["tensors"].append(len(tensors))
    return samples


def replicated(setting: Setting) -> Samples:
    """Save a model of DDP, by turns with a bare copy of all of it on rank 0 and of a part on each rank."""
    live = setting.training("ddp")
    tensors = live.tensors()
    part = BareCopy(shares(tensors, dist.get_world_size())[dist.get_rank()])
    whole = BareCopy(tensors if setting.leads else [])
    samples: Samples = defaultdict(list)
    limits = {"copy_part": part.run, "copy_whole": whole.run}
    _by_turns(setting, REPLICATED, live, limits, samples)
    samples["bytes"].append(bytes_of(tensors))
    samples["tensors"].append(len(tensors))
    return samples


def _by_turns(
    setting: Setting,
    classes: Mapping[str, type[Peer]],
    live: RankTraining,
    limits: Mapping[str, Callable[[], float]],
    samples: Samples,
) -> None:
    """Save in all ways and measure all limits, in another order each time; the first turns are dropped."""
    with setting.started(classes, live) as peers:
        for turn in range(WARMING + setting.options.repeat):
            if turn == WARMING:
                _keep_first_stalls(samples)
            for way in order([*peers, *limits], turn):
                setting.settle()
                if way in limits:
                    samples[f"{way}_s"].append(limits[way]())
                else:
                    _save(setting, peers[way], str(turn), samples)


def _save(setting: Setting, started: Started, name: str, samples: Samples) -> None:
    """Save once, and wait until the checkpoint is complete."""
    peer, state = started
    began = time.perf_counter()
    peer.save(state, name)
    returned = time.perf_counter()
    peer.wait()
    ended = time.perf_counter()
    samples[f"{peer.key}_began"].append(began)
    samples[f"{peer.key}_ended"].append(ended)
    samples[f"{peer.key}_stall_s"].append(returned - began)
    setting.remove(peer, name)
    if isinstance(peer, Ours):
        for part in STATS:
            samples[f"{peer.key}_stats_{part}_s"].append(getattr(peer.last.stats, part))


def _keep_first_stalls(samples: Samples) -> None:
    """Drop what was measured, but for the stall of the first save of each way."""
    dropped = {name: samples.pop(name) for name in list(samples)}
    for name, values in dropped.items():
        if name.endswith("_stall_s"):
            samples[f"{name.removesuffix('_stall_s')}_first_s"] = values[:1]
