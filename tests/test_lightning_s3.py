"""The Lightning callback with its dirpath in a bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("moto")

import torch

from asyncckpt.lightning import ModelCheckpoint
from trainers import QUIET, Model, trainer

if TYPE_CHECKING:
    from object_servers import MotoServer

pytestmark = [pytest.mark.filterwarnings(f) for f in QUIET]


@pytest.fixture(autouse=True)
def bucket(moto: MotoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")


def test_a_run_is_saved_and_resumed_from_a_bucket(moto: MotoServer) -> None:
    directory = "s3://bucket/lightning"

    def callback() -> ModelCheckpoint:
        return ModelCheckpoint(
            directory, "{epoch}", monitor="val_loss", save_top_k=2, save_last=True, save_best=True
        )

    first = callback()
    trainer(first, max_epochs=3).fit(Model([3.0, 1.0, 2.0]))
    there = sorted(key for key in moto.objects("bucket") if key.startswith("lightning/"))
    assert there == [f"lightning/{name}.ckpt" for name in ("best", "epoch=1", "epoch=2", "last")]
    assert first.best_model_path == f"{directory}/epoch=1.ckpt"
    again = trainer(callback(), max_epochs=4)
    model = Model([0.5])
    again.fit(model, ckpt_path="last")
    assert again.current_epoch == 4
    assert "lightning/epoch=3.ckpt" in moto.objects("bucket")
    assert "lightning/epoch=2.ckpt" not in moto.objects("bucket")
    best = again.strategy.checkpoint_io.load_checkpoint(f"{directory}/best.ckpt")
    assert best["epoch"] == 3
    assert torch.equal(best["state_dict"]["layer.weight"], model.layer.weight)
