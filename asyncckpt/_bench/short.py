"""The short form: what a save costs with torch.save and with asyncckpt, beside the limits of the disk."""

from __future__ import annotations

import time
from collections import defaultdict
from functools import partial
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from asyncckpt._bench.limits import Bare, PlainCopy
from asyncckpt._bench.loop import Loop, training_step
from asyncckpt._bench.states import bytes_of, device, distinct_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt._bench.place import Place
    from asyncckpt.checkpointer import Checkpointer

# Of the time of a training, what saves may take at most.
SHARE = 0.01
_ALONE = 1.0  # seconds of undisturbed steps around each save
_WARM = 1 << 30  # bytes that the bare process writes from
_FILES = 4  # as large as the state that are on the disk at once, at most: two of asyncckpt, two of torch.save


class Short:
    """One short measurement.

    Args:
        state: what is saved.
        place: where to.

    Attributes:
        samples: name -> seconds; those of torch.save begin with `torch_`, those of asyncckpt with `ours_`.
    """

    def __init__(self, state: Any, place: Place) -> None:
        self.samples: defaultdict[str, list[float]] = defaultdict(list)
        self.nbytes = bytes_of(state)
        self.tensors = len(distinct_tensors(state))
        self._state = state
        self._place = place
        self._loop = Loop(training_step(device()))
        self._alone: list[float] = []

    def run(self, repeat: int, tell: Callable[[str], object]) -> None:
        """Measure by turns.

        Args:
            repeat: how often, after a first save of either that is counted apart.
            tell: told what comes next.

        Raises:
            StoreError: the disk is too full, or fails.
        """
        place = self._place
        place.require(_FILES * self.nbytes)
        self._alone = self._loop.run(_ALONE)
        with place.checkpointer() as checkpointer:
            for turn in range(repeat + 1):
                tell(f"save {turn} of {repeat}" if turn else "the first saves")
                first = "" if turn else "first_"
                self._measure(f"{first}torch", self._torch_save)
                self._measure(f"{first}ours", partial(self._save, checkpointer, turn))
                checkpointer.wait()
        tell("the limits")
        copy = PlainCopy(self._state)
        for _ in range(repeat):
            place.settle()
            self.samples["copy_s"].append(copy.run())
        del copy
        if place.is_local:
            self._write(repeat)

    def result(self) -> dict[str, Any]:
        """Return medians, and how often may be saved so that saves take a hundredth of the time."""
        middle = {name: median(values) for name, values in self.samples.items()}

        def way(name: str) -> dict[str, float]:
            lost, durable = middle[f"{name}_lost_s"], middle[f"{name}_durable_s"]
            return {
                "first_stall_s": middle[f"first_{name}_stall_s"],
                "stall_s": middle[f"{name}_stall_s"],
                "lost_s": lost,
                "durable_s": durable,
                # A save that comes before the last one is written waits for it.
                "interval_s": max(lost / SHARE, durable),
            }

        return {
            "state_bytes": self.nbytes,
            "tensors": self.tensors,
            "torch.save": way("torch"),
            "asyncckpt": way("ours"),
            "limits": {name: middle[name] for name in ("copy_s", "write_s") if name in middle},
            "samples": dict(self.samples),
        }

    def _measure(self, way: str, save: Callable[[], Callable[[], bool]]) -> None:
        """Save beside the training; `save` returns what tells whether the checkpoint is durable."""
        self._place.settle()
        began = time.perf_counter()
        is_durable = save()
        stall = time.perf_counter() - began
        steps = self._loop.run_while(lambda: not is_durable())
        ended = time.perf_counter()
        before, self._alone = self._alone, self._loop.run(_ALONE)
        self.samples[f"{way}_stall_s"].append(stall)
        self.samples[f"{way}_durable_s"].append(ended - began)
        # What the same steps would have taken without the save is not lost.
        self.samples[f"{way}_lost_s"].append(ended - began - len(steps) * mean([*before, *self._alone]))

    def _torch_save(self) -> Callable[[], bool]:
        self._place.torch_save(self._state, "torch.pt")
        return lambda: True

    def _save(self, checkpointer: Checkpointer, step: int) -> Callable[[], bool]:
        return checkpointer.save(step, self._state).committed.done

    def _write(self, repeat: int) -> None:
        """Measure bare writes of as many bytes."""
        path = self._place.local("bare")
        with Bare(path.parent, min(self.nbytes, _WARM)) as bare:
            for _ in range(repeat):
                self._place.settle()
                self.samples["write_s"].append(bare.write(path, self.nbytes).seconds)
