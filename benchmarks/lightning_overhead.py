"""Measure what a save costs a Lightning Trainer: stock, stock in the background, and with asyncckpt.

`benchmarks/README.md` says what the columns mean.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections import defaultdict
from functools import wraps
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch.utils.data import DataLoader

import asyncckpt.lightning as ours
import machine
import states
from asyncckpt._bench.place import exit_on_signals
from asyncckpt._bench.training import PlainCopy
from bare import bring_in_memory
from harness import (
    Options,
    forget_peak,
    options,
    order,
    positive,
    run_apart,
    status,
    temporary_directory,
    versions,
)
from report import heading, markdown, seconds, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from harness import Samples

EVERY = 2  # steps: what the hook costs where nothing is saved is measured as well
LIMIT = 1.3  # of the bare copy, for what asyncckpt adds to the dump
MEMORY = 3  # times the state: what stock Lightning takes at most, made ready for everybody


class Way(NamedTuple):
    """One way to save from a Trainer.

    Attributes:
        what: names it in the table.
        callback: the class that decides when.
        io: the plugin that writes, if it is not the Trainer's own.
        target: the most that the stall without the dump may be, in bare copies.
    """

    what: str
    callback: type[ModelCheckpoint]
    io: type[Any] | None
    target: float | None = None


WAYS = {
    "stock": Way("ModelCheckpoint", ModelCheckpoint, None),
    "stock_async": Way("ModelCheckpoint + AsyncCheckpointIO", ModelCheckpoint, AsyncCheckpointIO),
    "callback": Way("asyncckpt ModelCheckpoint", ours.ModelCheckpoint, None, LIMIT),
    "plugin": Way(
        "ModelCheckpoint + asyncckpt AsyncCheckpointIO", ModelCheckpoint, ours.AsyncCheckpointIO, LIMIT
    ),
}


class Module(lightning.LightningModule):
    """Holds the whole state; its training changes one small parameter and takes no time."""

    def __init__(self, training: states.Training) -> None:
        super().__init__()
        self.model = training.model
        self._optimizer = training.optimizer

    def training_step(self, *_: Any) -> torch.Tensor:
        """Return a loss that has one small gradient."""
        return self.model.get_parameter("transformer.ln_f.bias").sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that has taken steps."""
        return self._optimizer


class Timer:
    """Measures the calls of a function."""

    def __init__(self) -> None:
        self.began = 0.0
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, with its last call measured."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds = time.perf_counter() - self.began

        return timed


class Syncs:
    """Notes which files were synced, whoever calls for it."""

    def __init__(self) -> None:
        self.inodes: set[int] = set()
        self.fsync = os.fsync
        os.fsync = self._noting(os.fsync)  # type: ignore[assignment]
        os.fdatasync = self._noting(os.fdatasync)  # type: ignore[assignment]

    def _noting(self, sync: Callable[[Any], None]) -> Callable[[Any], None]:
        def noted(fd: Any) -> None:
            sync(fd)
            self.inodes.add(os.fstat(fd).st_ino)

        return noted

    def sync(self, path: Path) -> None:
        """Sync a file, or a directory, without a note."""
        fd = os.open(path, os.O_RDONLY)
        self.fsync(fd)
        os.close(fd)


class Watch(lightning.Callback):
    """Prepares each save, and waits for its end, in the steps around it; measures the save itself.

    Attributes:
        samples: of the warm saves; those of the first one have `first_` before their names.
        copy: the bare copy, made once the first save is over.
    """

    def __init__(self, options: Options, checkpoint: ModelCheckpoint, state: Mapping[str, Any]) -> None:
        self.samples: defaultdict[str, list[float]] = defaultdict(list)
        self.copy: PlainCopy | None = None
        self._options = options
        self._checkpoint = checkpoint
        self._state = state
        self._syncs = Syncs()
        self._hook, self._dump = Timer(), Timer()
        self._live = 0.0

    def on_train_start(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        """Put timers around the hook that saves and around what is Lightning's own in it."""
        checkpoint, connector = self._checkpoint, trainer._checkpoint_connector
        checkpoint.on_train_batch_end = self._hook.around(  # type: ignore[method-assign]
            checkpoint.on_train_batch_end
        )
        connector.dump_checkpoint = self._dump.around(  # type: ignore[method-assign]
            connector.dump_checkpoint
        )

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Deal with the save of the step before, and with that of this one."""
        steps = trainer.global_step
        if steps and steps % EVERY == 0:
            self._note(Path(self._checkpoint.best_model_path))
        elif steps:
            self.samples["idle_s"].append(self._hook.seconds)
        if (steps + 1) % EVERY == 0:
            self._prepare()

    def _prepare(self) -> None:
        bring_in_memory(MEMORY * states.bytes_of(self._state))
        if self.copy is not None:
            self._options.settle()
            self.samples["copy_s"].append(self.copy.run())
        self._options.settle()
        self._syncs.inodes.clear()
        if self.copy is None:
            self._live = status("VmRSS")
        forget_peak()

    def _note(self, path: Path) -> None:
        while not path.exists():
            time.sleep(1e-3)
        complete = time.perf_counter()
        found = path.stat()
        synced = found.st_ino in self._syncs.inodes
        self._syncs.sync(path)
        self._syncs.sync(path.parent)
        durable = time.perf_counter()
        while list(path.parent.iterdir()) != [path]:
            time.sleep(1e-3)
        if path.stat().st_size != found.st_size:
            raise RuntimeError(f"{path} was not complete when it had its name")
        noted = {
            "stall_s": self._hook.seconds,
            "dump_s": self._dump.seconds,
            "complete_s": complete - self._hook.began,
            "durable_s": durable - self._hook.began,
            "synced": float(synced),
            "peak_bytes": status("VmHWM") - self._live,
            "file_bytes": float(found.st_size),
        }
        for name, value in noted.items():
            self.samples[name if self.copy is not None else f"first_{name}"].append(value)
        if self.copy is None:
            before = status("VmRSS")
            self.copy = PlainCopy(self._state)
            self._live += status("VmRSS") - before


def measure(way: Way, options: Options) -> Samples:
    """Let a Trainer save in one way: once to warm up, then `options.repeat` times."""
    training = options.training()
    state = training.state()
    checkpoint = way.callback(
        dirpath=options.directory, filename="{step}", save_top_k=1, every_n_train_steps=EVERY
    )
    watch = Watch(options, checkpoint, state)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[watch, checkpoint],
        plugins=[] if way.io is None else [way.io()],
        max_steps=EVERY * (options.repeat + 1) + 1,  # one more, for what is noted in the step after a save
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    steps: list[int] = list(range(trainer.max_steps))
    trainer.fit(Module(training), DataLoader(steps))  # type: ignore[arg-type] # a list is a data set
    assert watch.copy is not None
    samples = watch.samples
    samples["threads"].append(torch.get_num_threads())
    torch.set_num_threads(1)
    for _ in range(options.repeat):
        samples["copy_by_one_thread_s"].append(watch.copy.run())
    samples["state_bytes"].append(states.bytes_of(state))
    samples["tensors"].append(len(states.distinct_tensors(state)))
    return samples


def measure_apart(key: str, directory: Path, saves: int, size: str) -> Samples:
    """Measure one way in a process and a directory of its own."""
    began = time.perf_counter()
    with temporary_directory(directory) as folder:
        # What stock Lightning stages there is then renamed, not copied.
        staging, files = folder / "tmp", folder / "checkpoints"
        staging.mkdir()
        files.mkdir()
        arguments = ["--dir", str(files), "--saves", str(saves), "--size", size, "--measure", key]
        samples: Samples = run_apart(__file__, *arguments, TMPDIR=str(staging))
    print(f"{WAYS[key].what}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return samples


def row(key: str, samples: Samples) -> dict[str, Any]:
    """Return what the samples of one way show."""
    way = WAYS[key]
    own = [stall - dump for stall, dump in zip(samples["stall_s"], samples["dump_s"], strict=True)]
    pairs = [a / b for a, b in zip(own, samples["copy_s"], strict=True)]
    ratio = median(own) / median(samples["copy_s"])
    medians = {name: median(values) for name, values in samples.items()}
    return medians | {
        "key": key,
        "what": way.what,
        "own_s": median(own),
        "ratio": ratio,
        "ratio_low": min(pairs),
        "ratio_high": max(pairs),
        "ratio_one_thread": median(own) / median(samples["copy_by_one_thread_s"]),
        "target": way.target,
        "met": None if way.target is None else ratio <= way.target,
        "synced": min(samples["synced"]) == 1,
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "way to save": lambda r: r["what"],
    "stall, first": lambda r: seconds(r["first_stall_s"]),
    "stall, warm": lambda r: seconds(r["stall_s"]),
    "of that, dump": lambda r: seconds(r["dump_s"]),
    "stall less dump": lambda r: seconds(r["own_s"]),
    "÷ bare copy (least … greatest)": lambda r: (
        f"{r['ratio']:.2f} ({r['ratio_low']:.2f} … {r['ratio_high']:.2f}){verdict(r)}"
    ),
    "÷ copy by one thread": lambda r: f"{r['ratio_one_thread']:.2f}",
    "file complete after": lambda r: seconds(r["complete_s"]),
    "synced by then": lambda r: "yes" if r["synced"] else "no",
    "durable after": lambda r: seconds(r["durable_s"]),
    "peak memory over the live state": lambda r: f"{r['peak_bytes'] / 1e9:.2f} GB",
    "file": lambda r: f"{r['file_bytes'] / 1e9:.2f} GB",
}


def draw(data: Mapping[str, Any]) -> str:
    """Return what is shown of a run, in Markdown, whose data are those that go into the JSON."""
    state, how = data["state"], data["options"]
    copies = (
        f"{span(data, 'copy_s')} by {state['threads']} threads, {span(data, 'copy_by_one_thread_s')} by one"
    )
    rows = [[cell(row) for cell in COLUMNS.values()] for row in data["rows"]]
    lines = [
        *heading(data),
        "",
        *markdown(list(COLUMNS), rows),
        "",
        f"Bare copy into warm buffers: {copies}.",
        f"Medians of {how['repeat']} processes for each way, with {how['saves']} warm saves each.",
    ]
    if how["size"] == "small":
        lines.append("A small state: it shows that the measuring works, not what is reached.")
    return "\n".join(lines)


def span(data: Mapping[str, Any], name: str) -> str:
    """Return the median of what was measured in all processes, with the least and the greatest."""
    values = [value for samples in data["samples"].values() for value in samples[name]]
    return f"{seconds(median(values))} ({seconds(min(values))} … {seconds(max(values))})"


def verdict(found: Mapping[str, Any]) -> str:
    """Return whether the target is met, where there is one."""
    if found["target"] is None:
        return ""
    return f" {'met' if found['met'] else 'MISSED'}: ≤ {found['target']:g}"


def compare(ways: Sequence[str], directory: Path, repeat: int, saves: int, size: str) -> dict[str, Any]:
    """Measure some ways by turns, each repetition in another order."""
    began = time.perf_counter()
    described = machine.describe(directory)
    samples: dict[str, dict[str, list[float]]] = {key: {} for key in ways}
    for turn in range(repeat):
        for key in order(ways, turn):
            for name, values in measure_apart(key, directory, saves, size).items():
                samples[key].setdefault(name, []).extend(values)
    some = samples[ways[0]]
    return {
        "machine": described | {"load_after": machine.load()},
        "versions": versions("lightning"),
        "options": {"repeat": repeat, "saves": saves, "size": size, "dir": str(directory)},
        "state": {
            "name": "a small GPT-2 + Adam" if size == "small" else "GPT-2 124 M + Adam",
            "bytes": int(some["state_bytes"][0]),
            "tensors": int(some["tensors"][0]),
            "threads": int(some["threads"][0]),
        },
        "seconds": time.perf_counter() - began,
        "rows": [row(key, found) for key, found in samples.items()],
        "samples": samples,
    }


def main() -> None:
    """Measure, print the table, and write the JSON if that is asked for."""
    parser = options(__doc__, repeat=3)
    parser.add_argument("--saves", type=positive, default=4, help="warm saves in each (default: %(default)s)")
    parser.add_argument(
        "--size", choices=["gpt2", "small"], default="gpt2", help="of the state (default: %(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=WAYS, metavar="WAY", help=f"some ways to save: {', '.join(WAYS)}"
    )
    parser.add_argument("--measure", choices=WAYS, help="measure one way, in this process; prints samples")
    arguments = parser.parse_args()
    if arguments.measure is not None:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")  # about the speed of data loading and the like
        how = Options(arguments.dir.resolve(), arguments.saves, arguments.size == "small")
        print(json.dumps(measure(WAYS[arguments.measure], how)))
        return
    exit_on_signals()
    ways = [key for key in WAYS if key in (arguments.only or WAYS)]
    data = compare(ways, arguments.dir, arguments.repeat, arguments.saves, arguments.size)
    write_json(arguments.json, data)
    print(draw(data))


if __name__ == "__main__":
    main()
