"""Measure restoring a checkpoint of many ranks against bare reads and against DCP's load."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from bare import Bare, bring_in_memory
from harness import forget_cached, order
from peers.ranks import PEERS
from sharded_model import BareCopy, bytes_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sharded_model import RankTraining
    from sharded_setting import Samples, Setting, Started

_SAVED = "0"


def loads(setting: Setting) -> Samples:
    """Restore the live state by turns in each way, always from the disk and not from the page cache.

    DCP loads a checkpoint of its own and one of ours.
    """
    live = setting.training()
    saved = BareCopy(live.tensors())
    samples: Samples = defaultdict(list)
    classes = {key: PEERS[key] for key in ("dcp_save", "ours")}
    with setting._replace(keys=list(classes)).started(classes, live) as peers:
        for peer, state in peers.values():
            peer.save(state, _SAVED)
            peer.wait()
        folders = {key: started.peer.path(_SAVED) for key, started in peers.items()}
        ours, of_dcp = folders["ours"], folders["dcp_save"]
        file = ours / f"__{dist.get_rank()}_0.distcp"
        with Bare(setting.options.directory, file.stat().st_size) as bare:
            ways: dict[str, tuple[Path, Callable[[], float]]] = {
                "bare": (ours, lambda: bare.read(file, fresh=False).seconds),
                "ours": (ours, lambda: _seconds(setting, peers["ours"], _SAVED)),
                "dcp": (of_dcp, lambda: _seconds(setting, peers["dcp_save"], of_dcp.name)),
                "dcp_of_ours": (ours, lambda: _seconds(setting, peers["dcp_save"], ours.name)),
            }
            for turn in range(1 + setting.options.repeat):
                if turn == 1:
                    samples.clear()
                for way in order(list(ways), turn):
                    folder, measured = ways[way]
                    for tensor in live.tensors():
                        tensor.zero_()
                    _drop_cached(setting, folder, saved)
                    samples[f"{way}_s"].append(measured())
                    if way != "bare":
                        _check(saved, live)
        setting.remove(peers["dcp_save"].peer, _SAVED)
    samples["bytes"].append(bytes_of(live.tensors()))
    return samples


def _seconds(setting: Setting, started: Started, name: str) -> float:
    """Time a load into the live objects."""
    peer, state = started
    began = time.perf_counter()
    peer.load(name, state)
    setting.options.synchronize()
    return time.perf_counter() - began


def _drop_cached(setting: Setting, folder: Path, saved: BareCopy) -> None:
    """Drop the files of a checkpoint from the page cache, and have the memory at hand that a load takes."""
    bring_in_memory(2 * bytes_of([buffer for buffer, _ in saved.pairs]))
    setting.barrier()
    if setting.leads:
        for file in folder.iterdir():
            forget_cached(file)
    setting.barrier()


def _check(saved: BareCopy, live: RankTraining) -> None:
    """Make sure that what was measured has loaded the state."""
    pairs = zip((buffer for buffer, _ in saved.pairs), live.tensors(), strict=True)
    if not all(torch.equal(expected, found.cpu()) for expected, found in pairs):
        raise RuntimeError("what was loaded is not what was saved")
