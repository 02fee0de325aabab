"""A run with asyncckpt's ModelCheckpoint ends, and speaks, as one with Lightning's does."""

from __future__ import annotations

import errno
import logging
import random
import signal
import warnings
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import mock

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from lightning.pytorch.callbacks import ModelCheckpoint as Stock
from lightning.pytorch.callbacks.model_checkpoint import warning_cache
from lightning.pytorch.loggers import CSVLogger

from asyncckpt.lightning import AsyncCheckpointIO
from asyncckpt.lightning import ModelCheckpoint as Ours
from asyncckpt.testing import Gate, SlowStore
from sameness import assert_same
from trainers import QUIET, AtTheEnd, Model, trainer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.fabric.plugins import CheckpointIO

    from asyncckpt.stores.base import Store

pytestmark = [pytest.mark.filterwarnings(f) for f in QUIET]

VAL: dict[str, Any] = {"monitor": "val_loss"}
ALL: dict[str, Any] = {"save_top_k": -1}
LAST: dict[str, Any] = {"save_last": True}
LINK: dict[str, Any] = {"save_last": "link"}
STEPS: dict[str, Any] = {"every_n_train_steps": 3}
FIXED: dict[str, Any] = {"filename": "model"}
UNCOUNTED: dict[str, Any] = {"enable_version_counter": False}
# The last checkpoint of an epoch has the name that a better one had in the epoch before.
SWAPPING: dict[str, Any] = {"filename": "at{epoch}", "auto_insert_metric_name": False}
SWAPPED: dict[str, Any] = {"CHECKPOINT_NAME_LAST": "at{former:.0f}"}
REMOTE = "memory://parity"
LOSSES = (0.5, 0.7, 0.3, 0.9)
LOGGED = ("lightning.pytorch", "lightning.fabric", "asyncckpt")


class Noisy(Model):
    """Learns from random numbers, so that whoever draws one more is found out."""

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return super().training_step([batch[0] + torch.rand(4)], index)


class Logging(Noisy):
    """Logs more in training."""

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        self.log_dict({"train/loss": 0.1 * index, "a.b": 0.25, "epoch_test": 7.0})
        return super().training_step(batch, index)


class Late(Noisy):
    """Has a metric that only its validation logs, in the second epoch."""

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.validations > 1:
            self.log("late", 1.0 / self.validations)


class Swapping(Noisy):
    """Logs the number of the epoch before."""

    def on_train_epoch_end(self) -> None:
        self.log("former", float(self.current_epoch - 1))


class ByHand(Logging):
    """Steps the optimizer itself."""

    keeps_models = False

    def __init__(self, losses: tuple[float, ...]) -> None:
        super().__init__(losses)
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.keeps_models:
            weights = {name: tensor.detach().clone() for name, tensor in self.layer.state_dict().items()}
            self.saved_models = {index: weights}
        optimizer.step()
        return loss


class Keeping(ByHand):
    """Keeps what its weights were before each step."""

    keeps_models = True


class Failing(Noisy):
    """Raises in the middle of an epoch."""

    error: BaseException = ValueError("a bad batch")

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        if self.global_step == 6:
            raise self.error
        return super().training_step(batch, index)


class Interrupted(Failing):
    """Is interrupted in the middle of an epoch."""

    error = KeyboardInterrupt()


class Told(CSVLogger):
    """Counts what it is told of."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.told = 0

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        del checkpoint_callback
        self.told += 1


@dataclass
class Run:
    """Trainings in the working directory, and what each of them left behind.

    Attributes:
        kinds: the callback's class in the first training, and in those after it.
        gate: holds the disk back until training is over, so that all of it finds pending saves only.
    """

    kinds: tuple[type[Stock], type[Stock]]
    gate: Gate = field(default_factory=Gate)
    fits: list[dict[str, Any]] = field(default_factory=list)
    callbacks: list[Stock] = field(default_factory=list)

    def fit(
        self,
        *arguments: dict[str, Any],
        model: Callable[[tuple[float, ...]], Model] = Noisy,
        losses: tuple[float, ...] = LOSSES,
        ckpt_path: str | None = None,
        named: dict[str, Any] | None = None,
        **of_trainer: Any,
    ) -> None:
        """Train with one callback for each of `arguments`; `named` are attributes of its class."""
        torch.manual_seed(len(self.fits))
        random.seed(1)
        base = self.kinds[min(len(self.fits), 1)]
        kind: Any = type("ModelCheckpoint", (base,), named) if named else base
        report: dict[str, Any] = {"error": None, "saved": [], "told": []}
        module = model(losses)
        self.callbacks = []
        with listening() as report["heard"]:
            try:
                self.callbacks = [kind(**{"dirpath": "saved", **given}) for given in arguments]
                self._fit(module, ckpt_path, of_trainer, report)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - it is what is compared
                report["error"] = f"{type(error).__name__}: {error}"
        report["callbacks"] = [attributes(callback) for callback in self.callbacks]
        report["weights"] = module.state_dict()
        report["random"] = torch.rand(1), random.random()
        report["files"] = files()
        self.fits.append(report)

    def _fit(self, module: Model, ckpt_path: str | None, given: dict[str, Any], report: Any) -> None:
        self.gate.close()
        again, again_from, then = (given.pop(name, None) for name in ("again", "again_from", "then"))
        a_trainer = trainer(AtTheEnd(self.gate.open), *self.callbacks, **given)
        save = a_trainer.save_checkpoint

        def noting(path: str, *more: Any) -> None:
            report["saved"].append((path, *more))
            save(path, *more)

        a_trainer.save_checkpoint = noting
        a_trainer.fit(module, ckpt_path=ckpt_path)
        if again:
            self.gate.close()
            a_trainer.fit_loop.max_epochs = again
            a_trainer.fit(module, ckpt_path=again_from)
        if then:
            a_trainer.validate(module, ckpt_path=then, verbose=False)
        report["told"] = [logger.told for logger in a_trainer.loggers]


class Listener(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, heard: list[tuple[str, ...]]) -> None:
        super().__init__(logging.INFO)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append((record.name, record.levelname, record.getMessage()))


@contextmanager
def listening() -> Iterator[list[tuple[str, ...]]]:
    """Collect what is logged and warned of."""
    heard: list[tuple[str, ...]] = []
    handler = Listener(heard)
    warning_cache.clear()
    for name in LOGGED:
        logging.getLogger(name).addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield heard
    finally:
        for name in LOGGED:
            logging.getLogger(name).removeHandler(handler)
        heard += [(w.category.__name__, str(w.message)) for w in warned]


def attributes(callback: Stock) -> dict[str, Any]:
    """Return all that Lightning's callback has, but for the clock and the file system."""
    names = set(vars(Stock())) - {"_fs", "_last_time_checked"}
    return {name: value for name, value in sorted(vars(callback).items()) if name in names}


def files() -> dict[str, Any]:
    """Return each path of the working directory with its mode, and where it leads or what it holds.

    Lightning removes no link whose target it has removed before: those do not count.
    """
    found: dict[str, Any] = {}
    for path in sorted(p for p in Path().rglob("*") if p.exists()):
        content: Any = None
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            is_checkpoint = zipfile.is_zipfile(path)
            content = torch.load(path, weights_only=False) if is_checkpoint else path.read_bytes()
        found[str(path)] = path.lstat().st_mode, content
    memory = MemoryFileSystem()
    for name in memory.find(REMOTE):
        with memory.open(name) as file:
            found[name] = torch.load(file, weights_only=False)
    return found


Script = Callable[[Run], None]


def plain(*arguments: dict[str, Any], **more: Any) -> Script:
    """Return a script of a single training."""
    return lambda run: run.fit(*arguments, **more)


SINGLE: dict[str, Script] = {
    "defaults": plain({}),
    "nothing monitored, all": plain(ALL | LAST),
    "nothing monitored, none": plain({"save_top_k": 0} | LAST),
    "none, and a last of its own, not a link": plain({"save_top_k": 0} | LINK),
    "none at all": plain({"save_top_k": 0}),
    "best": plain(VAL | LAST),
    "best, link": plain(VAL | LINK),
    "best 2": plain(VAL | LAST | {"save_top_k": 2}),
    "best 3, link": plain(VAL | LINK | {"save_top_k": 3}),
    "all, the best told": plain(VAL | ALL | LAST),
    "max": plain(VAL | LAST | {"save_top_k": 2, "mode": "max"}),
    "nan": plain(VAL | LAST | {"save_top_k": 2}, losses=(nan, 0.5, nan, 0.2)),
    "nan, max": plain(VAL | LAST | {"save_top_k": 2, "mode": "max"}, losses=(nan, 0.5, nan, 0.2)),
    "nan only": plain(VAL, losses=(nan,)),
    "equal scores": plain(VAL | LAST | {"save_top_k": 2}, losses=(1.0,)),
    "steps": plain(STEPS | ALL | LAST),
    "steps, link": plain(STEPS | LINK),
    "steps with a metric of the training": plain(
        STEPS | LAST | {"monitor": "train/loss", "save_top_k": 2}, model=Logging
    ),
    "steps, deferred to the validation": plain(STEPS | VAL | LAST | {"save_top_k": 2}),
    "steps, deferred, none ever": plain(STEPS | {"monitor": "nowhere"} | LAST),
    "steps, each seen twice": plain(STEPS | ALL, accumulate_grad_batches=2, max_epochs=2),
    "time": plain({"train_time_interval": timedelta(0)} | ALL | LAST),
    "long time": plain({"train_time_interval": timedelta(days=1)} | LAST),
    "every other epoch": plain({"every_n_epochs": 2} | LAST, max_epochs=5),
    "every other epoch, link": plain({"every_n_epochs": 2} | ALL | LINK, max_epochs=5),
    "never, but last": plain({"every_n_epochs": 9} | LAST),
    "at the end of training epochs": plain(VAL | LAST | {"save_on_train_epoch_end": True}),
    "at the end of validations": plain(VAL | LAST | {"save_on_train_epoch_end": False}),
    "validation every other epoch": plain(VAL | LAST, check_val_every_n_epoch=2, max_epochs=4),
    "validation in the middle": plain(VAL | LAST | {"save_top_k": 2}, val_check_interval=0.5),
    "no validation": plain(LAST, limit_val_batches=0),
    "metric missing": plain({"monitor": "nowhere"}),
    "metric missing without validation": plain({"monitor": "nowhere"} | LAST, limit_val_batches=0),
    "metric late": plain({"monitor": "late"}, model=Late),
    "weights only": plain({"save_weights_only": True} | LAST),
    "verbose": plain(VAL | {"verbose": True, "save_top_k": 1}),
    "verbose, all": plain(VAL | ALL | {"verbose": True, "mode": "max"}),
    "fast_dev_run": plain(VAL | LAST, fast_dev_run=True),
    "no batches": plain(LAST, limit_train_batches=0),
    "no epochs": plain(LAST, max_epochs=0),
    "checkpoints disabled": plain(LAST, enable_checkpointing=False),
    "by hand": plain(STEPS | LAST, model=ByHand),
    "by hand, each epoch": plain(VAL | LAST, model=ByHand),
    "by hand, weights kept": plain(STEPS | ALL | LAST, model=Keeping),
    "by hand, weights kept, best": plain(
        STEPS | LAST | {"monitor": "train/loss", "save_top_k": 2}, model=Keeping
    ),
    "exception": plain(LAST | {"save_on_exception": True}, model=Failing),
    "exception, link": plain(VAL | LINK | {"save_on_exception": True}, model=Failing),
    "exception at a saved step": plain(STEPS | LAST | {"save_on_exception": True}, model=Failing),
    "exception, nothing asked for": plain(LAST, model=Failing),
    "interrupt": plain(LAST | {"save_on_exception": True}, model=Interrupted),
    "several": plain(
        VAL | LAST,
        STEPS | ALL | {"filename": "{step}"},
        {"monitor": "a.b", "mode": "max"} | LINK,
        model=Logging,
    ),
    "several of one name": plain(VAL | LAST | FIXED, FIXED | LAST, STEPS | FIXED | LINK),
    "same twice": plain({}, {}),
    "fixed name": plain(VAL | FIXED | LAST),
    "fixed name, best 3": plain(VAL | FIXED | LAST | {"save_top_k": 3}),
    "fixed name, best 2, max": plain(VAL | FIXED | LAST | {"save_top_k": 2, "mode": "max"}),
    "fixed name, all": plain(FIXED | ALL | LINK),
    "fixed name, newest": plain(FIXED | LINK),
    "fixed name, no counter": plain(VAL | FIXED | UNCOUNTED | LAST | {"save_top_k": 2}),
    "no counter, all": plain(FIXED | UNCOUNTED | ALL | LINK),
    "metrics in the name": plain(
        VAL | {"filename": "{epoch:02d}-{epoch_test}-{val_loss:.2f}-{none}"}, model=Logging
    ),
    "metrics in the name, bare": plain(
        VAL | LINK | {"filename": "e{epoch}-l{train/loss:.1f}-{a.b}", "auto_insert_metric_name": False},
        model=Logging,
    ),
    "slashes in the name": plain(VAL | LINK | {"filename": "{epoch}/{train/loss:.1f}-{a.b}"}, model=Logging),
    "out of the directory": plain(VAL | LAST | {"filename": "../out/{epoch}"}),
    "other characters": plain(
        VAL | LAST | FIXED | {"save_top_k": 2},
        FIXED | {"filename": "{step}"},
        named={
            "CHECKPOINT_JOIN_CHAR": "_",
            "CHECKPOINT_EQUALS_CHAR": ":",
            "FILE_EXTENSION": ".pt",
            "STARTING_VERSION": 7,
        },
    ),
    "last from a template": plain(VAL | LAST, named={"CHECKPOINT_NAME_LAST": "{epoch}-last"}),
    "last from a template, link": plain(
        VAL | LINK | {"save_top_k": 2}, named={"CHECKPOINT_NAME_LAST": "{epoch}-last"}
    ),
    "last in a directory": plain(VAL | LAST, named={"CHECKPOINT_NAME_LAST": "lasts/{epoch}/last"}),
    "last where the others are": plain(VAL | LAST, named={"CHECKPOINT_NAME_LAST": "{epoch}-{step}"}),
    "last where one was just removed": plain(LAST | SWAPPING, model=Swapping, named=SWAPPED),
    "last where one was just removed, no counter": plain(
        LAST | SWAPPING | UNCOUNTED, model=Swapping, named=SWAPPED
    ),
    "directory of the logger": lambda run: run.fit(
        VAL | {"dirpath": None}, logger=[Told("logs", "mine", 3), Told("more")]
    ),
    "directory of the logger, version by name": lambda run: run.fit(
        STEPS | ALL | {"dirpath": None}, logger=[Told(Path("logs").absolute(), "mine", "second")]
    ),
    "directory of the trainer": plain(LINK | {"dirpath": None}, default_root_dir="root"),
    "directory of the trainer, by default": plain(VAL | LAST | {"dirpath": None}),
    "directory from here": plain(VAL | LAST | {"dirpath": ""}),
    "remote directory": plain(VAL | LAST | {"dirpath": REMOTE}),
    "remote directory, link": plain(VAL | LINK | {"dirpath": REMOTE}),
}


def over(made: Callable[[Path], object]) -> Script:
    """Return a script of links that go where something is already."""

    def script(run: Run) -> None:
        Path("saved/there").mkdir(parents=True)
        made(Path("saved/last.ckpt"))
        run.fit(LINK | UNCOUNTED)

    return script


def beside_files(run: Run) -> None:
    for name in ("epoch=0-step=4.ckpt", "epoch=0-step=4-v1.ckpt", "last.ckpt"):
        Path("saved", name).mkdir(parents=True)
    run.fit(VAL | LINK)


def without_links(run: Run) -> None:
    with mock.patch("os.symlink", side_effect=PermissionError(errno.EPERM, "no links here")):
        run.fit(VAL | LINK)


def through_a_link(run: Run) -> None:
    Path("real").mkdir()
    Path("saved").symlink_to("real")
    run.fit(VAL | LINK)


def kept_as_directory(run: Run) -> None:
    run.fit(VAL | LAST, losses=(0.5,), max_epochs=1)
    path = Path("saved/epoch=0-step=4.ckpt")
    path.unlink()
    path.mkdir()
    (path / "shard").touch()
    run.fit(VAL | LAST, losses=(0.4,), max_epochs=2, ckpt_path="last")


def twice(*arguments: dict[str, Any]) -> Script:
    """Return a script of a training that is followed by another one, in the same directory."""

    def script(run: Run) -> None:
        run.fit(*arguments)
        run.fit(*arguments)

    return script


def resumed(*arguments: dict[str, Any], ckpt_path: str, later: Any = None, **more: Any) -> Script:
    """Return a script of a training that another one goes on with; `later` are arguments that differ."""

    def script(run: Run) -> None:
        run.fit(*arguments, max_epochs=2, **more)
        changed = [given | (later or {}) for given in arguments]
        run.fit(*changed, max_epochs=4, ckpt_path=ckpt_path, losses=(0.6, 0.1), **more)

    return script


SEVERAL: dict[str, Script] = {
    "a second time": twice(VAL | LAST),
    "a second time, link": twice(VAL | LINK | {"save_top_k": 2}),
    "best, which a new trainer does not know": resumed(VAL | LAST, ckpt_path="best"),
    "last": resumed(VAL | LAST | {"save_top_k": 2}, ckpt_path="last"),
    "last, link": resumed(VAL | LINK | {"save_top_k": 2}, ckpt_path="last"),
    "last, newest only": resumed(LAST, ckpt_path="last"),
    "last, all": resumed(VAL | ALL | LINK, ckpt_path="last"),
    "last of several": resumed(VAL | LAST, STEPS | LAST, ckpt_path="saved/last-v1.ckpt"),
    "last, but there is none": resumed(VAL, ckpt_path="last"),
    "path, which is not removed": resumed(VAL, ckpt_path="saved/epoch=0-step=4.ckpt"),
    "path, newest only": resumed({}, ckpt_path="saved/epoch=1-step=8.ckpt"),
    "path, other directory": resumed(
        VAL | LAST, ckpt_path="saved/epoch=0-step=4.ckpt", later={"dirpath": "new"}
    ),
    "path, other callback": resumed(
        VAL | LAST, ckpt_path="saved/epoch=0-step=4.ckpt", later={"monitor": "a.b"}, model=Logging
    ),
    "path, missing": resumed(VAL, ckpt_path="saved/nothing.ckpt"),
    "weights only": resumed(VAL | {"save_weights_only": True}, ckpt_path="saved/epoch=0-step=4.ckpt"),
    "directories": kept_as_directory,
}
SINGLE |= {
    "the same trainer again": plain(VAL | LAST | {"save_top_k": 2}, again=4),
    "the same trainer again, steps": plain(STEPS | LINK, again=5),
    "the same trainer again, from its best": plain(VAL | LAST, again=5, again_from="best"),
    "the same trainer again, from its last": plain(VAL | LINK, again=5, again_from="last"),
    "best validated": plain(VAL, then="best"),
    "last validated": plain(VAL | LINK | LAST, then="last"),
    "best validated, none": plain({"save_top_k": 0}, then="best"),
    "last over a directory": over(lambda path: path.mkdir()),
    "last over a file": over(lambda path: path.touch()),
    "last over a link": over(lambda path: path.symlink_to("there")),
    "last over a link to nowhere": over(lambda path: path.symlink_to("nowhere")),
    "beside others' directories": beside_files,
    "without symbolic links": without_links,
    "through a link": through_a_link,
}


class HeldIO(AsyncCheckpointIO):
    """Waits at a gate with all that the disk is to do."""

    gate: ClassVar[Gate]

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        super().__init__(checkpoint_io, max_in_flight=1000)

    def _open_store(self, directory: str) -> Store:
        gates = dict.fromkeys(["commit", "remove", "copy", "link"], self.gate)
        return SlowStore(super()._open_store(directory), gates=gates)


@pytest.fixture(autouse=True)
def cleared() -> Iterator[None]:
    """Undo what a training leaves behind in the process."""
    handler = signal.getsignal(signal.SIGINT)  # Lightning ignores interrupts once it has had one
    yield
    signal.signal(signal.SIGINT, handler)


Compare = Callable[[Script, Run], None]


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Return what asserts that a run ends as one with Lightning's callback in the same directory."""

    def in_turn(script: Script, run: Run) -> None:
        expected = Run((Stock, Stock))
        for each, name in ((expected, "expected"), (run, "found")):
            (tmp_path / "run").mkdir()
            monkeypatch.chdir(tmp_path / "run")
            script(each)
            MemoryFileSystem().store.clear()
            monkeypatch.chdir(tmp_path)
            (tmp_path / "run").rename(tmp_path / name)
        assert not [path for path in (tmp_path / "found").rglob("*") if not path.exists()]
        for found, wanted in zip(run.fits, expected.fits, strict=True):
            assert [*found["files"]] == [*wanted["files"]]
            for part, value in wanted.items():
                if part in {"error", "saved", "heard", "told"}:
                    assert found[part] == value, part
                assert_same({part: found[part]}, {part: value})

    return in_turn


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Return a gate that the disk waits at while a run with that gate trains."""
    gate = Gate()
    monkeypatch.setattr(HeldIO, "gate", gate, raising=False)
    monkeypatch.setattr(Ours, "io_class", HeldIO)
    return gate


@pytest.mark.parametrize("name", SINGLE)
def test_a_training_on_a_disk_that_stands_still_ends_as_with_the_stock_callback(
    name: str, gate: Gate, compare: Compare
) -> None:
    compare(SINGLE[name], Run((Ours, Ours), gate))


@pytest.mark.parametrize("name", [*SINGLE][::6])
def test_a_training_ends_as_with_the_stock_callback(name: str, compare: Compare) -> None:
    compare(SINGLE[name], Run((Ours, Ours)))


@pytest.mark.parametrize("name", SEVERAL)
def test_a_training_goes_on_as_with_the_stock_callback(name: str, gate: Gate, compare: Compare) -> None:
    compare(SEVERAL[name], Run((Ours, Ours), gate))


@pytest.mark.parametrize("kinds", [(Stock, Ours), (Ours, Stock)], ids=["to ours", "from ours"])
@pytest.mark.parametrize("name", ["last", "last, link", "last of several", "path, other directory"])
def test_a_training_goes_on_from_what_the_other_callback_left(
    name: str, kinds: tuple[type[Stock], type[Stock]], gate: Gate, compare: Compare
) -> None:
    compare(SEVERAL[name], Run(kinds, gate))
