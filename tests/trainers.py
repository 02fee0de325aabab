"""What tests of the Lightning callbacks need: a small module, quiet trainers, stores that wait or fail."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from asyncckpt._snapshot import lanes
from asyncckpt._trainer.listing import is_last_epoch
from asyncckpt.lightning import AsyncCheckpointIO
from asyncckpt.stores.local import LocalStore
from support import is_waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from asyncckpt.stores.base import Store

# What Lightning says on a small CPU machine, and what its dependencies deprecate; asyncckpt's own count.
QUIET = [
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*LeafSpec.*:DeprecationWarning",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:.*does not have many workers",
]


class Model(lightning.LightningModule):
    """A linear layer whose validation loss is what the test says.

    Args:
        losses: the "val_loss" of each validation in turn; the last one goes on.
    """

    def __init__(self, losses: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.losses = list(losses)
        self.validations = 0

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.layer(batch[0]).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        del batch
        self.log("val_loss", self.losses[min(self.validations, len(self.losses) - 1)])

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validations += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[Any]:
        return batches(4)

    def val_dataloader(self) -> DataLoader[Any]:
        return batches(1)


def batches(count: int) -> DataLoader[Any]:
    """Return a loader of `count` batches."""
    data = torch.arange(count * 2 * 4, dtype=torch.float32).view(-1, 4) / 100
    return DataLoader(TensorDataset(data), batch_size=2)


def trainer(*callbacks: Any, package: Any = lightning, **arguments: Any) -> Any:
    """Return a quiet Trainer on the CPU, of `lightning` or of `pytorch_lightning`."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 3,
    }
    return package.Trainer(callbacks=list(callbacks), **(quiet | arguments))


class AtTheEnd(lightning.Callback):
    """Calls something when the last epoch ends, or a run fails, just before the checkpoint callbacks wait."""

    def __init__(self, func: Callable[[], object]) -> None:
        self.func = func

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if is_last_epoch(trainer):
            self.func()

    def on_exception(self, *_: Any) -> None:
        self.func()


def delay_copies(setattr_: Callable[[object, str, object], object]) -> None:
    """Let copies of host memory in the background go on only while the thread that calls this waits.

    Args:
        setattr_: how to replace an attribute.
    """
    memmove, waiting = lanes.memmove, threading.get_ident()

    def delayed(*arguments: Any) -> None:
        if threading.current_thread().name == "asyncckpt-copy":
            while not is_waiting(sys._current_frames().get(waiting)):
                time.sleep(0.001)
        memmove(*arguments)

    setattr_(lanes, "memmove", delayed)


def is_ours(path: Path) -> bool:
    """Return whether asyncckpt's writer made a file."""
    return AsyncCheckpointIO()._is_ours(path)


class StoreIO(AsyncCheckpointIO):
    """An AsyncCheckpointIO whose stores a test wraps.

    Args:
        wrap: given the store of a directory, returns the one to use; called once for each directory.
        max_in_flight: as in AsyncCheckpointIO.
    """

    def __init__(self, wrap: Callable[[Store], Store], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.stores: dict[str, Store] = {}
        self._wrap = wrap

    def _open_store(self, directory: str) -> Store:
        if directory not in self.stores:
            self.stores[directory] = self._wrap(LocalStore(directory))
        return self.stores[directory]
