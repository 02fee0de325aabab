"""The two sides that `lightning_scenarios.py` compares, and what it puts between them and the disk.

Started as a program, it saves three times and waits for a signal.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch.utils.data import DataLoader

import asyncckpt.lightning as ours
from asyncckpt._saving.engine import wait_for_pending
from asyncckpt.stores.local import LocalStore
from asyncckpt.testing import FaultyStore, SlowStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

DELAY = 0.1  # seconds that each file waits
SAVES = 6


class SlowTorchIO(TorchCheckpointIO):
    """Waits before it writes a file; the disk is full for one of them."""

    def __init__(self, delay: float, full_for: str) -> None:
        self._delay, self._full_for = delay, full_for

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Wait, then write or fail."""
        time.sleep(self._delay)
        if Path(path).name == self._full_for:
            raise full_disk()
        super().save_checkpoint(checkpoint, path, storage_options)


class SlowAsyncIO(ours.AsyncCheckpointIO):
    """Writes to a store that waits before it writes a file; the disk is full for one of them."""

    def __init__(self, delay: float, full_for: str) -> None:
        super().__init__()
        self._delay, self._full_for = delay, full_for
        self._stores: dict[str, FaultyStore] = {}

    def _open_store(self, directory: str) -> FaultyStore:
        if directory not in self._stores:
            store = FaultyStore(SlowStore(LocalStore(directory), delays={"draft": self._delay}))
            store.fail("write", full_disk(), times=None, where=lambda name: name == self._full_for)
            self._stores[directory] = store
        return self._stores[directory]


def full_disk() -> OSError:
    """Return what a write to a full disk raises."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Side:
    """Lightning as it is.

    Args:
        delay: seconds that each file waits.
        full_for: the name of a file that the disk has no room for.
    """

    key = "stock"
    name = "Lightning's AsyncCheckpointIO"
    callback = ModelCheckpoint

    def __init__(self, delay: float = DELAY, full_for: str = "") -> None:
        self.io: Any = AsyncCheckpointIO(SlowTorchIO(delay, full_for))

    def settle(self) -> None:
        """Wait until nothing is pending; what has failed is not told."""
        if self.io._executor is not None:
            self.io._executor.submit(int).result()

    def fit(
        self,
        *callbacks: lightning.Callback,
        module: lightning.LightningModule | None = None,
        steps: int = SAVES,
        **arguments: Any,
    ) -> None:
        """Train for some steps, which take no time."""
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            callbacks=list(callbacks),
            plugins=[self.io],
            max_steps=steps,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            **({"logger": False} | arguments),
        )
        trainer.fit(module or Module(), DataLoader(list(range(steps))))  # type: ignore[arg-type] # it may be


class Ours(Side):
    """The same programs with two imports changed."""

    key = name = "asyncckpt"
    callback = ours.ModelCheckpoint

    def __init__(self, delay: float = DELAY, full_for: str = "") -> None:
        self.io = SlowAsyncIO(delay, full_for)

    def settle(self) -> None:
        """Wait until nothing is pending; what has failed is not told."""
        wait_for_pending()


SIDES = {side.key: side for side in (Side, Ours)}


class Module(lightning.LightningModule):
    """Its loss falls by one with each step, and nothing else happens.

    Args:
        things: what it puts into the checkpoint besides, itself and no copy of it.
    """

    def __init__(self, **things: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.things = things

    def training_step(self, *_: Any) -> torch.Tensor:
        """Tell the loss."""
        self.log("loss", -float(self.global_step))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one that does nothing."""
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the things."""
        checkpoint.update(self.things)


class Tied(Module):
    """Has a parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(64, 64, bias=False)
        self.outer = torch.nn.Linear(64, 64, bias=False)
        self.outer.weight = self.inner.weight


class Owned:
    """An object of a user's own class."""

    value = 0


@dataclass(frozen=True)
class Frozen:
    """A record of a user's own, with a tensor in it."""

    scale: torch.Tensor


class UserError(Exception):
    """What the user's own code raises."""


class AfterEachStep(lightning.Callback):
    """Calls a function with the Trainer and the number of the step, before a ModelCheckpoint has its turn."""

    def __init__(self, call: Callable[[lightning.Trainer, int], object]) -> None:
        self._call = call

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Call it."""
        self._call(trainer, trainer.global_step)


class Told(Logger):
    """A logger that looks for the checkpoints when it is told of one.

    Attributes:
        times: how often it was told.
        early: how often there was no file at `best_model_path`.
        found: all files that it has found so.
    """

    name = "told"
    version = "0"

    def __init__(self) -> None:
        super().__init__()
        self.times = self.early = 0
        self.found: set[str] = set()

    def log_metrics(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Look where the loggers that upload checkpoints do."""
        best = checkpoint_callback.best_model_path
        self.times += 1
        self.early += not Path(best).is_file()
        self.found |= {path for path in (best, *checkpoint_callback.best_k_models) if Path(path).is_file()}


class Watch:
    """Looks at the checkpoints in a directory again and again, from a thread of its own.

    Attributes:
        most: the most files at once.
        gaps, without_s: how often there was none any more, and for how long in all.
        dangling_s: for how long a link led nowhere.
    """

    def __init__(self, folder: Path) -> None:
        self.most = self.gaps = 0
        self.without_s = self.dangling_s = 0.0
        self._folder = folder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        gap, over, before = False, False, time.perf_counter()
        while not over:
            over = self._over.wait(5e-4)  # and then once more: what is left in the end counts
            # The kinds of the files come with the list: none of them can go in between.
            found = [entry for entry in os.scandir(self._folder) if entry.name.endswith(".ckpt")]
            links = [entry.path for entry in found if entry.is_symlink()]
            files = len(found) - len(links)
            was_gap, gap = gap, self.most > 0 and files == 0
            now = time.perf_counter()
            passed, before = now - before, now
            self.most = max(self.most, files)
            self.gaps += gap and not was_gap
            self.without_s += passed * gap
            self.dangling_s += passed * any(map(leads_nowhere, links))


def leads_nowhere(link: str) -> bool:
    """Return whether a link dangles; one that is replaced meanwhile does not."""
    with suppress(OSError):
        target = Path(link).readlink()
        return not Path(link).exists() and Path(link).readlink() == target
    return False


def files_in(folder: Path) -> list[str]:
    """Return the names of the checkpoints that are there, without links."""
    return sorted(path.name for path in folder.glob("*.ckpt") if not path.is_symlink())


@contextmanager
def start_victim(
    side: type[Side], folder: Path, *flags: str, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Start a program that saves in `folder`; gives it away with three saves pending, and ends it then."""
    with subprocess.Popen(
        [sys.executable, __file__, str(folder), side.key, *flags],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            if not process.stdout.readline():
                raise RuntimeError(f"the program to be stopped ended by itself, with status {process.wait()}")
            yield process
        finally:
            process.kill()


def victim_of_fabric(side: type[Side], folder: Path) -> None:
    """Save three times, tell of it, and wait."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=[side(delay=0.5).io])
    for step in range(1, 4):
        fabric.save(folder / f"{step}.ckpt", {"weight": torch.ones(3)})
    print("saved", flush=True)
    time.sleep(60)


def victim(side: type[Side], folder: Path) -> None:
    """Save three times, tell of it, and train on."""

    def save(trainer: lightning.Trainer, step: int) -> None:
        if step <= 3:
            trainer.save_checkpoint(folder / f"{step}.ckpt")
        elif step == 4:
            print("saved", flush=True)
        else:
            time.sleep(0.01)

    side(delay=0.5).fit(AfterEachStep(save), steps=6000, default_root_dir=folder)


def be_quiet() -> None:
    """Say nothing of what is known: the failures are wanted."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("asyncckpt").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")


def main() -> None:
    """Be the victim."""
    parser = argparse.ArgumentParser(description="Save three times, and wait for a signal.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--fabric", action="store_true", help="in a loop of one's own, not in a Trainer")
    arguments = parser.parse_args()
    be_quiet()
    (victim_of_fabric if arguments.fabric else victim)(SIDES[arguments.side], arguments.directory)


if __name__ == "__main__":
    main()
