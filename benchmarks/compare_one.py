"""Measure one way to save, in this process, and print what was found as JSON.

`compare.py` starts it for one measurement at a time, so that none finds what another one has warmed up.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import states
from asyncckpt._bench.place import sync
from asyncckpt._bench.training import PlainCopy, steps_for, steps_while, training_step
from bare import Bare, bring_in_memory
from harness import Options, forget_cached
from peers import PEERS
from peers.fsync_notes import Notes
from same import difference, sharing
from tree_memory import TreeMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from peers.base import Peer

FRESH = 2  # times the state: what peers take that keep nothing
BURST = 5  # saves, one right after the other
KEPT = 1 << 20  # bytes of each of the many checkpoints in a directory


class Setting(NamedTuple):
    """What is measured, and how.

    Attributes:
        options: where to write and how often to save.
        peer: its key.
        state: its name, see `states.named`.
        notes: which files were synced.
        trace: whether every step around the last save is told.
    """

    options: Options
    peer: str
    state: str
    notes: Notes
    trace: bool

    def make_state(self) -> Any:
        """Make the state, on the GPU if there is one."""
        return states.named(self.state, quick=self.options.quick)

    @contextmanager
    def started(self, state: Any) -> Iterator[Peer]:
        """Have the peer ready to save `state`."""
        peer = PEERS[self.peer](self.options.directory)
        peer.start(state)
        try:
            yield peer
        finally:
            peer.close()

    def bring_in_memory(self, state: Any) -> None:
        """Have the memory at hand that a save or a load of `state` may ask for."""
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        bring_in_memory(min(FRESH * states.bytes_of(state), available // 2))


class Waiting(threading.Thread):
    """Waits for a peer's save while the training goes on."""

    def __init__(self, peer: Peer) -> None:
        super().__init__()
        self._wait = peer.wait
        self._error: BaseException | None = None
        self._ended = 0.0
        self.start()

    def run(self) -> None:
        """Wait, and note when it is over."""
        try:
            self._wait()
        except BaseException as error:  # noqa: BLE001 - raised again by `end`
            self._error = error
        self._ended = time.perf_counter()

    def end(self) -> float:
        """Return when the save was complete, or raise what it failed with."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._ended


def saves(setting: Setting) -> dict[str, Any]:
    """Save beside a training loop: once to warm up, then `repeat` times, then once with memory at hand."""
    state = setting.make_state()
    copy = PlainCopy(state)
    step = training_step(states.device())
    samples: defaultdict[str, list[Any]] = defaultdict(list)
    alone = steps_for(step, 0.1 if setting.options.quick else 1.0)
    with setting.started(state) as peer:
        for turn in range(setting.options.repeat + 1):
            alone, found = _save_in_loop(setting, peer, state, step, alone)
            for name, value in found.items():
                samples[name if turn else f"first_{name}"].append(value)
            samples["copy_s"].append(copy.run())
        setting.bring_in_memory(state)
        _, found = _save_in_loop(setting, peer, state, step, alone)
        samples["at_hand_durable_s"].append(found["durable_s"])
    trace = samples.pop("steps_ms")[-1]
    del samples["first_steps_ms"]
    samples["state_bytes"].append(states.bytes_of(state))
    samples["tensors"].append(len(states.distinct_tensors(state)))
    return {**samples, **({"trace": [trace]} if setting.trace else {})}


def _save_in_loop(
    setting: Setting, peer: Peer, state: Any, step: Callable[[], object], before: list[float]
) -> tuple[list[float], dict[str, Any]]:
    """Save once while the loop goes on; returns the undisturbed steps after it, and what was found."""
    name = "checkpoint"
    setting.options.settle()
    setting.notes.forget()
    began = time.perf_counter()
    peer.save(state, name)
    stall = time.perf_counter() - began
    waiting = Waiting(peer)
    steps = steps_while(step, waiting.is_alive)
    ended = time.perf_counter()
    complete = waiting.end()
    files = _files(peer.path(name))
    synced = setting.notes.synced(peer.path(name))
    later = 0.0 if synced else _sync(files)
    nbytes = sum(file.stat().st_size for file in files)
    peer.remove(name)
    setting.options.settle()
    after = steps_for(step, 0.1 if setting.options.quick else 1.0)
    alone = mean([*before, *after])
    return after, {
        "stall_s": stall,
        "complete_s": complete - began,
        "durable_s": complete - began + later,
        "synced": float(synced),
        # What the same steps would have taken without the save is not lost.
        "lost_s": ended - began - len(steps) * alone,
        "step_s": mean(steps),
        "longest_step_s": max(steps),
        "alone_step_s": alone,
        "file_bytes": float(nbytes),
        "steps_ms": {
            "before": _milliseconds(before[-200:]),
            "stall": _milliseconds([stall])[0],
            "beside": _milliseconds(steps),
            "after": _milliseconds(after[:200]),
        },
    }


def bare(setting: Setting) -> dict[str, Any]:
    """Write as many bytes as the state has beside the same loop, in a process that does nothing else."""
    state = setting.make_state()
    nbytes = states.bytes_of(state)
    step = training_step(states.device())
    samples: defaultdict[str, list[float]] = defaultdict(list)
    path = setting.options.directory / "bare"
    copy = PlainCopy(state)
    with Bare(setting.options.directory, min(nbytes, 1 << 30)) as process:
        samples["direct"].append(float(process.direct))
        process.write(path, nbytes)
        for _ in range(setting.options.repeat):
            setting.options.settle()
            samples["copy_s"].append(copy.run())
            setting.options.settle()
            samples["write_alone_s"].append(process.write(path, nbytes).seconds)
            setting.options.settle()
            process.begin_write(path, nbytes)
            samples["step_s"].append(mean(steps_while(step, process.writing)))
            samples["write_s"].append(process.end_write(path).seconds)
            samples["alone_step_s"].append(mean(steps_for(step, 0.1 if setting.options.quick else 1.0)))
    samples["state_bytes"].append(float(nbytes))
    samples["tensors"].append(float(len(states.distinct_tensors(state))))
    return samples


def memory(setting: Setting) -> dict[str, Any]:
    """Find the most memory that saves take over what the live state takes, children included."""
    state = setting.make_state()
    samples = {"state_bytes": [float(states.bytes_of(state))]}
    import_module(PEERS[setting.peer].module)  # code is no memory of a save
    with TreeMemory() as watch:
        live, live_on_gpu = watch.read().now, _gpu_live()
        with setting.started(state) as peer:
            for _ in range(2):
                setting.options.settle()
                peer.save(state, "checkpoint")
                peer.wait()
                peer.remove("checkpoint")
        samples["peak_bytes"] = [float(watch.read().peak - live)]
    samples["gpu_peak_bytes"] = [_gpu_peak() - live_on_gpu]
    return samples


def loads(setting: Setting) -> dict[str, Any]:
    """Save, change the state at once, and load: how long that takes, and whether it is what was saved."""
    state = setting.make_state()
    samples: defaultdict[str, list[Any]] = defaultdict(list)
    with setting.started(state) as peer:
        peer.save(state, "checkpoint")
        _change(state)
        peer.wait()
        nbytes = states.bytes_of(state)
        samples["state_bytes"].append(float(nbytes))
        expected = setting.make_state()
        for _ in range(setting.options.repeat):
            files = _files(peer.path("checkpoint"))
            for file in files:
                forget_cached(file)
            setting.bring_in_memory(state)
            setting.options.settle()
            began = time.perf_counter()
            found = peer.load("checkpoint", expected)
            samples["load_s"].append(time.perf_counter() - began)
            samples["difference"].append(difference(expected, found))
            samples["ties_kept"].append(sharing(expected) <= sharing(found))
            del found
    return samples


def burst(setting: Setting) -> dict[str, Any]:
    """Save several times without a pause: how long each call takes, and all of it, and the most memory."""
    state = setting.make_state()
    samples: dict[str, Any] = {"state_bytes": [float(states.bytes_of(state))]}
    import_module(PEERS[setting.peer].module)
    with TreeMemory() as watch:
        live = watch.read().now
        with setting.started(state) as peer:
            peer.save(state, "first")
            peer.wait()
            peer.remove("first")
            setting.options.settle()
            watch.read()
            began = time.perf_counter()
            samples["stall_s"] = [_stall(peer, state, f"checkpoint-{turn}") for turn in range(BURST)]
            peer.wait()
            samples["all_complete_s"] = [time.perf_counter() - began]
            samples["peak_bytes"] = [float(watch.read().peak - live)]
            missing = [turn for turn in range(BURST) if not peer.path(f"checkpoint-{turn}").exists()]
    if missing:
        raise RuntimeError(f"of {BURST} saves, {len(missing)} left no checkpoint")
    return samples


def _stall(peer: Peer, state: Any, name: str) -> float:
    began = time.perf_counter()
    peer.save(state, name)
    return time.perf_counter() - began


def kept(setting: Setting) -> dict[str, Any]:
    """Save beside as many checkpoints as the name of the state says, which the peer has written before."""
    count = int(setting.state.partition(":")[2])
    state = states.named(f"bytes:{KEPT}")
    samples: defaultdict[str, list[float]] = defaultdict(list)
    with setting.started(state) as peer:
        for turn in range(count):
            peer.save(state, f"kept-{turn}")
            peer.wait()
        for _ in range(5 * setting.options.repeat):
            setting.options.settle()
            began = time.perf_counter()
            samples["stall_s"].append(_stall(peer, state, "checkpoint"))
            peer.wait()
            samples["complete_s"].append(time.perf_counter() - began)
            peer.remove("checkpoint")
    return samples


MEASUREMENTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "saves": saves,
    "bare": bare,
    "memory": memory,
    "loads": loads,
    "burst": burst,
    "kept": kept,
}


def _files(path: Path) -> Sequence[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _sync(files: Sequence[Path]) -> float:
    """Sync files and their directories; returns seconds."""
    began = time.perf_counter()
    for path in [*files, *{file.parent for file in files}]:
        sync(path)
    return time.perf_counter() - began


def _change(state: Any) -> None:
    """Change every tensor and every number in place, as a training does."""
    for tensor in states.distinct_tensors(state):
        tensor.detach().zero_()
    if isinstance(state, dict) and "step" in state:
        state["step"] = -1


def _gpu_live() -> float:
    """Return the GPU memory that is taken now, and let its peak count from here on."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    return float(torch.cuda.memory_allocated())


def _gpu_peak() -> float:
    return float(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0.0


def _milliseconds(seconds: Sequence[float]) -> list[float]:
    return [round(value * 1e3, 2) for value in seconds]


def main() -> None:
    """Measure what the command line names; what fails is part of the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("notes", type=Path, help="the folder of the notes about fsync")
    parser.add_argument("kinds", nargs="+", choices=MEASUREMENTS)
    parser.add_argument("--peer", choices=PEERS, default="torch_save")
    parser.add_argument("--state", required=True)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--trace", action="store_true")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    for kind in arguments.kinds:
        folder = arguments.directory / kind
        folder.mkdir()
        options = Options(folder, arguments.repeat, arguments.quick)
        notes = Notes(arguments.notes)
        setting = Setting(options, arguments.peer, arguments.state, notes, arguments.trace)
        try:
            results.append({"samples": MEASUREMENTS[kind](setting)})
        except BaseException as error:  # noqa: BLE001 - shown in the table
            traceback.print_exc()
            results.append({"error": f"{type(error).__name__}: {error}"})
    sys.stdout.write("\n" + json.dumps(results) + "\n")
    sys.stdout.flush()
    # A peer's threads or processes that do not end must not hold the result back.
    os._exit(0)


if __name__ == "__main__":
    main()
