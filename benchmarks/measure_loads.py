"""Measure loading and restoring against bare reads and against torch.load."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt import Checkpointer
from bare import Bare, bring_in_memory
from harness import Options, Samples, forget_cached
from states import tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable


def loads(options: Options) -> Samples:
    """Load one file in each of the ways by turns, always from the disk and not from the page cache.

    To where the state is that was saved.
    """
    live = options.training()
    samples: defaultdict[str, list[float]] = defaultdict(list)
    with Checkpointer(options.directory) as ckpt:
        checkpoint = ckpt.save(1, live.state()).committed.result()
        path = Path(checkpoint.path)
        target = {"model": live.model, "optimizer": live.optimizer, "step": 0}

        def torch_load() -> Any:
            return torch.load(path, map_location=options.device, weights_only=True)

        def load() -> Any:
            return ckpt.load(1, map_location=options.device)

        def seconds(function: Callable[[], Any]) -> float:
            """Time one call; what it returns is dropped only afterwards."""
            began = time.perf_counter()
            result = function()
            options.synchronize()
            ended = time.perf_counter()
            del result
            return ended - began

        def torch_restore() -> None:
            saved = torch_load()
            live.model.load_state_dict(saved["model"])
            live.optimizer.load_state_dict(saved["optimizer"])

        with Bare(options.directory, checkpoint.nbytes) as bare:
            ways: dict[str, Callable[[], Any]] = {
                "bare_fresh_s": lambda: bare.read(path, fresh=True).seconds,
                "load_s": lambda: seconds(load),
                "torch_load_s": lambda: seconds(torch_load),
                "bare_warm_s": lambda: bare.read(path, fresh=False).seconds,
                "restore_s": lambda: seconds(lambda: ckpt.restore(target, 1)),
                "torch_restore_s": lambda: seconds(torch_restore),
            }
            for _ in range(options.repeat):
                for name, measured in ways.items():
                    bring_in_memory(2 * checkpoint.nbytes)  # twice, as torch.load goes through the page cache
                    forget_cached(path)
                    samples[name].append(measured())
        expected = torch_load()
        _check(expected, load())
        for tensor in tensors_of(live.state()):
            tensor.zero_()
        ckpt.restore(target, 1)
        _check(expected, live.state())
    samples["file_bytes"].append(checkpoint.nbytes)
    return samples


def _check(expected: Any, found: Any) -> None:
    """Make sure that what was measured has loaded the state."""
    pairs = zip(tensors_of(expected), tensors_of(found), strict=True)
    if not all(torch.equal(one, other) for one, other in pairs):
        raise RuntimeError("what was loaded is not what was saved")
