"""Loggers hear of a checkpoint once it is on disk, on the training thread, and of what it cost."""

from __future__ import annotations

import csv
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger

from asyncckpt import SaveError
from asyncckpt._saving.engine import get_engine
from asyncckpt.lightning import ModelCheckpoint
from asyncckpt.testing import FaultyStore, Gate, SlowStore
from trainers import QUIET, AtTheEnd, Model, StoreIO, trainer

if TYPE_CHECKING:
    from asyncckpt.stores.base import Store

pytestmark = [pytest.mark.filterwarnings(f) for f in QUIET]


class Listener(Logger):
    """Notes what there is whenever it is told of a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[list[str]] = []
        self.best_is_there: list[bool] = []
        self.threads: set[int] = set()
        self.ended: list[str] = []

    name = "listener"
    version = "0"

    def log_metrics(self, *_: Any, **__: Any) -> None:
        pass

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def finalize(self, status: str) -> None:
        self.ended.append(status)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        assert not self.ended
        folder = Path(checkpoint_callback.dirpath)
        self.told.append(sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")))
        self.best_is_there.append(Path(checkpoint_callback.best_model_path).exists())
        self.threads.add(threading.get_ident())


class Batches(Callback):
    """Does something at the end of some batches, before the checkpoint callbacks are called."""

    def __init__(self, **what: Any) -> None:
        self.what = what

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.what.get(f"at_{trainer.global_step}", lambda: None)()


def checkpoints(path: Path, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(path / "run", "{step}", every_n_train_steps=1, save_top_k=-1, **arguments)


def let_through(gate: Gate) -> None:
    """Let everything that is pending end."""
    gate.open()
    get_engine().drain()


def fit(*callbacks: Any, **arguments: Any) -> None:
    trainer(*callbacks, **({"max_steps": 3, "limit_val_batches": 0} | arguments)).fit(Model())


@pytest.mark.parametrize("save_last", [None, True, "link"])
def test_loggers_are_told_once_for_each_save_on_the_training_thread(tmp_path: Path, save_last: Any) -> None:
    loggers = [Listener(), Listener()]
    fit(checkpoints(tmp_path, save_last=save_last), logger=loggers)
    for logger in loggers:
        assert len(logger.told) == (6 if save_last is True else 3)
        assert logger.threads == {threading.get_ident()}
        assert logger.ended == ["success"]
        assert "step=3.ckpt" in logger.told[-1]


def test_they_are_told_only_after_the_commit(tmp_path: Path) -> None:
    gate = Gate()
    logger = Listener()
    seen = []

    def look() -> None:
        seen.append(len(logger.told))

    def let_go() -> None:
        look()
        let_through(gate)

    io = StoreIO(partial(SlowStore, gates={"commit": gate}), max_in_flight=9)
    at = Batches(at_2=look, at_3=let_go, at_4=let_go)
    fit(at, checkpoints(tmp_path), plugins=[io], logger=logger, max_steps=4)
    assert seen == [0, 0, 2]
    assert logger.told[0] == ["step=1.ckpt", "step=2.ckpt"]
    assert len(logger.told) == 4
    assert all(logger.best_is_there)


def test_what_a_logger_reads_as_the_best_is_there(tmp_path: Path) -> None:
    gate = Gate()
    logger = Listener()

    def let_one_through() -> None:
        gate.wait_for_arrival(1)
        gate.open()
        gate.close()
        gate.wait_for_arrival(2)

    io = StoreIO(partial(SlowStore, gates={"commit": gate}), max_in_flight=9)
    at = Batches(at_3=let_one_through)
    fit(at, AtTheEnd(gate.open), checkpoints(tmp_path), plugins=[io], logger=logger)
    assert len(logger.told) == 3
    assert logger.best_is_there == [True] * 3


@pytest.mark.parametrize("at", [1, 2, 3])
def test_they_are_not_told_of_a_save_that_failed(tmp_path: Path, at: int) -> None:
    gate = Gate()
    logger = Listener()

    def wrap(store: Store) -> Store:
        faulty = FaultyStore(store)
        faulty.fail("commit", OSError("the disk is full"), at=at)
        return SlowStore(faulty, gates={"commit": gate})

    with pytest.raises(SaveError):
        fit(
            AtTheEnd(partial(let_through, gate)),
            checkpoints(tmp_path),
            plugins=[StoreIO(wrap, max_in_flight=9)],
            logger=logger,
        )
    kept = [f"step={step}.ckpt" for step in (1, 2, 3) if step != at]
    assert logger.told == [kept, kept]
    assert logger.ended == ["failed"]


def test_those_that_are_there_are_told_of_before_an_exception_ends_the_run(tmp_path: Path) -> None:
    logger = Listener()

    def fail() -> None:
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError):
        fit(Batches(at_3=fail), checkpoints(tmp_path, save_on_exception=True), logger=logger)
    assert len(logger.told) == 3
    assert logger.told[-1] == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]


@pytest.mark.parametrize("save_last", [None, True])
def test_the_cost_of_each_save_is_logged_if_asked_for(tmp_path: Path, *, save_last: bool | None) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    fit(checkpoints(tmp_path, log_cost=True, save_last=save_last), logger=logger)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("asyncckpt/nbytes")]
    sizes = {step: (tmp_path / "run" / f"step={step}.ckpt").stat().st_size for step in (1, 2, 3)}
    for step, size in sizes.items():
        of_step = [row for row in rows if row["step"] == str(step)]
        assert float(of_step[0]["asyncckpt/nbytes"]) == size
        assert 0 < float(of_step[0]["asyncckpt/stall"]) < float(of_step[0]["asyncckpt/durable"])


def test_the_cost_is_not_logged_unless_asked_for(tmp_path: Path) -> None:
    fit(checkpoints(tmp_path), logger=CSVLogger(tmp_path, name="", version=""))
    assert "asyncckpt" not in "".join(file.read_text() for file in tmp_path.glob("*.csv"))
