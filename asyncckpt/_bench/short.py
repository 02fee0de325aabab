"""The short form: what a save costs with torch.save and with asyncckpt, beside the limits of the disk."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from asyncckpt._bench import bare
from asyncckpt._bench.states import bytes_of, device, distinct_tensors
from asyncckpt._bench.training import PlainCopy, steps_for, steps_while, training_step
from asyncckpt.schedule import Budget

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._bench.place import Place

    Samples = defaultdict[str, list[float]]

# Of the time of a training, what saves may take at most.
SHARE = 0.01
_ALONE = 1.0  # seconds of undisturbed steps around each save
_WARM = 1 << 30  # bytes that the bare writes are made from
_FILES = 4  # as large as the state that are on the disk at once, at most: two of asyncckpt, two of torch.save


def measure(state: Any, place: Place, repeat: int, report: Callable[[str], object]) -> dict[str, Any]:
    """Measure by turns; returns medians in seconds, and how often to save so that SHARE holds.

    Args:
        state: what is saved.
        place: where to.
        repeat: how often, after a first save of either that is counted apart.
        report: called with what comes next.

    Raises:
        StoreError: the disk is too full, or fails.
    """
    nbytes = bytes_of(state)
    place.require(_FILES * nbytes)
    samples: Samples = defaultdict(list)
    _measure_saves(state, place, repeat, report, samples)
    report("the limits")
    copy = PlainCopy(state)
    for _ in range(repeat):
        place.settle()
        samples["copy_s"].append(copy.run())
    del copy
    if place.is_local:
        path, data = Path(place.url, "bare"), bare.filled(min(nbytes, _WARM))
        flags = bare.direct_flag(path.parent)
        for _ in range(repeat):
            place.settle()
            samples["write_s"].append(bare.write(path, nbytes, data, flags))
            path.unlink()
    middle = {name: median(values) for name, values in samples.items()}
    return {
        "state_bytes": nbytes,
        "tensors": len(distinct_tensors(state)),
        "torch.save": _costs(middle, "torch"),
        "asyncckpt": _costs(middle, "ours"),
        "limits": {name: middle[name] for name in ("copy_s", "write_s") if name in middle},
        "samples": dict(samples),
    }


def _measure_saves(
    state: Any, place: Place, repeat: int, report: Callable[[str], object], samples: Samples
) -> None:
    """Save in both ways beside a training, and note what that costs it."""
    step = training_step(device())
    alone = steps_for(step, _ALONE)

    def torch_save(_: int) -> Callable[[], bool]:
        place.torch_save(state, "torch.pt")
        return lambda: False

    with place.checkpointer() as checkpointer:

        def save(turn: int) -> Callable[[], bool]:
            committed = checkpointer.save(turn, state).committed
            return lambda: not committed.done()

        for turn in range(repeat + 1):
            report(f"save {turn} of {repeat}" if turn else "the first saves")
            for name, way in (("torch", torch_save), ("ours", save)):
                place.settle()
                began = time.perf_counter()
                is_pending = way(turn)
                stall = time.perf_counter() - began
                steps = steps_while(step, is_pending)
                ended = time.perf_counter()
                before, alone = alone, steps_for(step, _ALONE)
                key = name if turn else f"first_{name}"
                samples[f"{key}_stall_s"].append(stall)
                samples[f"{key}_durable_s"].append(ended - began)
                # What the same steps would have taken without the save is not lost.
                samples[f"{key}_lost_s"].append(ended - began - len(steps) * mean([*before, *alone]))
            checkpointer.wait()


def _costs(middle: dict[str, float], way: str) -> dict[str, float]:
    lost, durable = middle[f"{way}_lost_s"], middle[f"{way}_durable_s"]
    return {
        "first_stall_s": middle[f"first_{way}_stall_s"],
        "stall_s": middle[f"{way}_stall_s"],
        "lost_s": lost,
        "durable_s": durable,
        "interval_s": Budget(SHARE).interval(lost, durable),
    }
