"""The on_train_end of other callbacks, which comes before that of the checkpoints, finds their files."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback

from asyncckpt import SaveError
from asyncckpt.lightning import ModelCheckpoint
from asyncckpt.testing import FaultyStore, Gate, SlowStore
from trainers import QUIET, Model, StoreIO, trainer

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.filterwarnings(f) for f in QUIET]


class Reading(lightning.Callback):
    """Reads the best checkpoint, and the last one, when training has ended."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        del pl_module
        paths = trainer.checkpoint_callback.best_model_path, trainer.checkpoint_callback.last_model_path
        first, second = (torch.load(path, weights_only=False)["global_step"] for path in paths)
        self.steps.append((first, second))


class Stopping(lightning.Callback):
    """Asks the trainer to stop at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop |= trainer.global_step >= self.step


def slow_io() -> StoreIO:
    """Return an IO whose commits are slower than training."""
    return StoreIO(lambda store: SlowStore(store, delays={"commit": 0.1}))


@pytest.mark.parametrize(
    ("callbacks", "arguments", "steps"),
    [
        ([], {"max_epochs": 2}, 8),
        ([], {"max_epochs": -1, "max_steps": 4}, 4),
        ([], {"max_epochs": 9, "max_steps": 6}, 6),
        ([EarlyStopping("val_loss", patience=1)], {"max_epochs": 9}, 8),
        ([Stopping(3)], {"max_epochs": 9}, 3),
        ([Stopping(3)], {"max_epochs": 9, "min_epochs": 2}, 8),
        ([Stopping(3)], {"max_epochs": 9, "min_steps": 6}, 6),
    ],
    ids=[
        "epochs",
        "steps",
        "steps in an epoch",
        "early",
        "stop",
        "stop min_epochs",
        "stop min_steps",
    ],
)
def test_the_files_are_there_however_training_ends(
    tmp_path: Path, callbacks: list[Any], arguments: dict[str, Any], steps: int
) -> None:
    reading = Reading()
    saving = ModelCheckpoint(tmp_path, "{step}", save_last=True, every_n_train_steps=1)
    run = trainer(reading, *callbacks, saving, plugins=[slow_io()], **arguments)
    run.fit(Model())
    assert reading.steps == [(steps, steps)]
    assert run.global_step == steps


def test_they_are_there_when_they_are_saved_by_a_metric(tmp_path: Path) -> None:
    reading = Reading()
    saving = ModelCheckpoint(tmp_path, "{epoch}", "val_loss", save_last=True)
    trainer(reading, saving, plugins=[slow_io()]).fit(Model([3.0, 1.0, 2.0]))
    assert reading.steps == [(8, 8)]


def test_training_without_batches_ends_as_before(tmp_path: Path) -> None:
    run = trainer(Reading(), ModelCheckpoint(tmp_path), limit_train_batches=0)
    run.fit(Model())
    assert run.global_step == 0


def test_epochs_before_the_last_do_not_wait(tmp_path: Path) -> None:
    gate, late = Gate(), threading.Event()

    def let_go() -> None:
        late.set()
        gate.open()

    rescue = threading.Timer(20, let_go)  # of a run that waits for ever
    rescue.start()
    opening = LambdaCallback(
        on_train_epoch_start=lambda trainer, _: gate.open() if trainer.current_epoch == 1 else None
    )
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    plugins = [StoreIO(lambda store: SlowStore(store, gates={"commit": gate}))]
    trainer(opening, saving, plugins=plugins, max_epochs=3).fit(Model())
    rescue.cancel()
    assert not late.is_set()


def test_a_checkpoint_of_the_last_epoch_counts_epochs_as_lightnings(tmp_path: Path) -> None:
    def progress(saving: Callable[..., Any], directory: Path) -> Any:
        # The second one saves after the first has waited.
        callbacks = [saving(directory / "a", "{epoch}"), saving(directory / "b", "{epoch}", every_n_epochs=2)]
        trainer(*callbacks, max_epochs=2).fit(Model())
        found = torch.load(callbacks[1].best_model_path, weights_only=False)
        return found["loops"]["fit_loop"]["epoch_progress"]

    stock = lightning.pytorch.callbacks.ModelCheckpoint
    assert progress(ModelCheckpoint, tmp_path / "ours") == progress(stock, tmp_path / "stock")


def test_a_failure_at_the_end_of_the_last_epoch_is_raised_once(tmp_path: Path) -> None:
    def failing(store: Any) -> Any:
        double = FaultyStore(store)
        double.fail("commit", OSError(28, "No space left on device"), where="epoch=1.ckpt".__eq__)
        return double

    reading = Reading()
    saving = ModelCheckpoint(tmp_path, "{epoch}")
    run = trainer(reading, saving, plugins=[StoreIO(failing)], max_epochs=2)
    with pytest.raises(SaveError, match="No space left"):
        run.fit(Model())
    assert Path(saving.best_model_path).name == "epoch=0.ckpt"
    assert Path(saving.best_model_path).exists()
    assert reading.steps == []
