"""Measure one way to save from a Lightning Trainer, in this process, and print the samples as JSON.

`lightning_overhead.py` starts it for one way at a time, so that none finds what another one has warmed up.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from collections import defaultdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch.utils.data import DataLoader

import asyncckpt.lightning as ours
import states
from asyncckpt._bench.training import PlainCopy
from bare import bring_in_memory
from harness import Options, forget_peak, status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from harness import Samples

EVERY = 2  # steps: what the hook costs where nothing is saved is measured as well
MEMORY = 3  # times the state: what stock Lightning takes at most, made ready for everybody


class Way(NamedTuple):
    """The class that decides when to save, and the plugin that writes, if it is not the Trainer's own."""

    callback: type[ModelCheckpoint]
    io: type[Any] | None = None


# As in lightning_overhead.py.
WAYS = {
    "stock": Way(ModelCheckpoint),
    "stock_async": Way(ModelCheckpoint, AsyncCheckpointIO),
    "callback": Way(ours.ModelCheckpoint),
    "plugin": Way(ModelCheckpoint, ours.AsyncCheckpointIO),
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


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--saves", type=int, required=True)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # about the speed of data loading and the like
    options = Options(arguments.directory.resolve(), arguments.saves, arguments.small)
    print(json.dumps(measure(WAYS[arguments.way], options)))


if __name__ == "__main__":
    main()
