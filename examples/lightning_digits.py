"""Train a small network on scikit-learn's digits with Lightning; run it again, and it goes on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from asyncckpt.lightning import ModelCheckpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

VALIDATION = 297  # of the 1,797 images


class Digits(lightning.LightningModule):
    """Classifies images of 8 by 8 pixels."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: Sequence[Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: Sequence[Tensor], _: int) -> None:
        """Log the accuracy, which decides what is kept."""
        images, labels = batch
        accuracy = (self.net(images).argmax(1) == labels).float().mean()
        self.log("val_acc", accuracy, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam, whose state is most of a checkpoint."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def digits() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return the training and the validation batches."""
    found = load_digits()
    images = torch.tensor(found.data / 16, dtype=torch.float32)
    data = TensorDataset(images, torch.tensor(found.target))
    validation, training = torch.utils.data.random_split(
        data, [VALIDATION, len(data) - VALIDATION], torch.Generator().manual_seed(0)
    )
    return DataLoader(training, batch_size=64, shuffle=True), DataLoader(validation, batch_size=VALIDATION)


def main() -> None:
    """Train for some more epochs, from the last checkpoint if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", default="runs/digits", help="where the checkpoints are")
    parser.add_argument("--epochs", type=int, default=10, help="in all")
    options = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    checkpoints = ModelCheckpoint(
        options.dir, monitor="val_acc", mode="max", save_top_k=2, save_last="link", save_best="link"
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        callbacks=[checkpoints],
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Digits(), *digits(), ckpt_path="last")
    best = Digits.load_from_checkpoint(checkpoints.best_model_path)
    trainer.validate(best, digits()[1])


if __name__ == "__main__":
    main()
