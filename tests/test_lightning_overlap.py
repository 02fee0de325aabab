"""Overlapped saves of a Trainer and of Fabric: the files are those of stock Lightning."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import lightning
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint as StockCheckpoint
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from asyncckpt import SaveError, TornSnapshotError
from asyncckpt._saving.engine import wait_for_pending
from asyncckpt._saving.saver import Saver
from asyncckpt._saving.trial import Trial
from asyncckpt._snapshot import fences
from asyncckpt.lightning import AsyncCheckpointIO, ModelCheckpoint
from sameness import assert_same
from trainers import QUIET, Model, delay_copies, trainer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from asyncckpt import Save

pytestmark = [pytest.mark.filterwarnings(f) for f in (*QUIET, "ignore:.*no pre-optimization state was saved")]

SLOW = pytest.mark.slow
EACH_STEP: dict[str, Any] = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}


@pytest.fixture(autouse=True)
def saves(monkeypatch: pytest.MonkeyPatch) -> list[Save]:
    """All saves of a test, none of which is blocking for a trial; their copies go on only while it waits."""
    made: list[Save] = []
    save = Saver.save

    def noting(self: Saver, *args: Any, **arguments: Any) -> Save:
        made.append(save(self, *args, **arguments))
        return made[-1]

    monkeypatch.setattr(Saver, "save", noting)
    monkeypatch.setattr(Trial, "why_blocking", lambda _: "")
    delay_copies(monkeypatch.setattr)
    return made


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert fences.pending() == ()


class Wide(Model):
    """Has tensors that are large enough to be deferred, and buffers that each forward pass changes."""

    layer: Any

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(4, 3000), nn.BatchNorm1d(3000), nn.Linear(3000, 4))

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        super().validation_step(batch, index)
        wait_for_pending()  # what is not fenced is copied now

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Fused(Wide):
    """Its optimizer raises no version counter."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


class Searching(Wide):
    """Calls its closure several times a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)


class Overriding(Wide):
    """Steps in a hook of its own, then clips."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        del epoch, batch_idx
        optimizer.step(closure=optimizer_closure)
        for parameter in self.parameters():
            parameter.data.clamp_(-0.1, 0.1)


class Perturbing(torch.optim.Optimizer):
    """Changes the parameters before it calls its closure, like SAM."""

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.data.add_(0.01)
        loss = closure()
        for parameter in parameters:
            parameter.data.sub_(0.01 + 0.1 * parameter.grad)
        return loss


class Perturbed(Wide):
    def configure_optimizers(self) -> Any:
        return Perturbing(self.parameters(), {})


class Alternating(Wide):
    """Steps two optimizers by turns, by itself, and clips the weights of one through `.data`."""

    keeps_models = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first, _, last = self.layer.children()
        return [torch.optim.SGD(first.parameters(), 0.1, 0.9), torch.optim.RMSprop(last.parameters())]

    def training_step(self, batch: list[Tensor], index: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()[index % 2]  # type: ignore[index]
        loss = super().training_step(batch, index)
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.keeps_models:
            weights = {name: tensor.detach().clone() for name, tensor in self.layer.state_dict().items()}
            self.saved_models = {index: weights}
        optimizer.step()
        for parameter in self.layer[0].parameters():
            parameter.data.clamp_(-0.2, 0.2)


class Keeping(Alternating):
    """Has the weights before its steps saved, which Lightning loads into the module meanwhile."""

    keeps_models = True


class Swapping(lightning.Callback):
    """Evaluates other weights, through `.data` so that no version counter rises."""

    def __init__(self, before: str, after: str) -> None:
        setattr(self, before, lambda _, module: self.negate(module))
        setattr(self, after, lambda _, module: self.negate(module))

    def negate(self, module: lightning.LightningModule) -> None:
        for parameter in module.parameters():
            parameter.data.neg_()
        wait_for_pending()


class Ending(Wide):
    """Swaps in a hook that comes after those of callbacks."""

    def on_validation_end(self) -> None:
        for parameter in self.parameters():
            parameter.data.neg_()


def scaling() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))


def run(directory: Path, callback: Any, module: Wide, *callbacks: Any, **arguments: Any) -> dict[str, Any]:
    """Train, and return what the files hold; all runs of a test have one directory: its name is in them."""
    trainer(*callbacks, callback, **arguments).fit(module)
    found = {path.name: torch.load(path, weights_only=False) for path in directory.iterdir()}
    for path in list(directory.iterdir()):
        path.unlink()
    assert found
    return found


def ema() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.5)


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)


def around(what: str) -> Swapping:
    return Swapping(f"on_validation_{what}start", f"on_validation_{what}end")


def between_epochs() -> Swapping:
    return Swapping("on_train_epoch_end", "on_train_epoch_start")


EPOCHS: dict[str, Any] = {"save_top_k": -1, "save_on_train_epoch_end": True}
VALIDATIONS: dict[str, Any] = {"save_top_k": -1, "save_on_train_epoch_end": False}


@pytest.mark.parametrize(
    ("module", "saving", "callbacks", "arguments"),
    [
        pytest.param(Wide, EACH_STEP, [], {}, id="automatic"),
        pytest.param(Wide, EACH_STEP | {"save_last": True}, [], {}, id="last"),
        pytest.param(Wide, EACH_STEP | {"save_weights_only": True}, [], {}, id="weights only", marks=SLOW),
        pytest.param(Fused, EACH_STEP, [], {}, id="fused"),
        pytest.param(Searching, EACH_STEP, [], {"max_epochs": 1}, id="LBFGS"),
        pytest.param(Overriding, EACH_STEP, [], {}, id="optimizer_step"),
        pytest.param(Perturbed, EACH_STEP, [], {}, id="change before the closure"),
        pytest.param(Alternating, EACH_STEP, [], {}, id="manual, two optimizers"),
        pytest.param(Keeping, EACH_STEP, [], {}, id="manual, weights before the step"),
        pytest.param(Wide, EACH_STEP, [], {"accumulate_grad_batches": 2}, id="accumulation"),
        pytest.param(Wide, EACH_STEP, [], {"gradient_clip_val": 0.1}, id="gradient clipping", marks=SLOW),
        pytest.param(Wide, EACH_STEP, [], {"precision": "bf16-mixed"}, id="bf16", marks=SLOW),
        pytest.param(Wide, EACH_STEP, [], {"plugins": scaling}, id="gradient scaler"),
        pytest.param(Wide, EACH_STEP, [ema], {"val_check_interval": 2}, id="EMA"),
        pytest.param(Wide, EACH_STEP, [around("")], {"val_check_interval": 2}, id="swap around validations"),
        pytest.param(Wide, EACH_STEP, [around("epoch_")], {}, id="swap in validation epochs"),
        pytest.param(Wide, EPOCHS, [swa], {}, id="SWA"),
        pytest.param(Wide, EPOCHS, [between_epochs], {}, id="swap between epochs"),
        pytest.param(Wide, VALIDATIONS, [between_epochs], {}, id="swap between epochs, saved before"),
        pytest.param(Ending, VALIDATIONS, [], {}, id="swap in the module's hook"),
    ],
)
def test_files_are_those_of_stock_lightning(  # noqa: PLR0913, PLR0917 - the cases, and what all need
    tmp_path: Path, saves: list[Save], module: Any, saving: Any, callbacks: list[Any], arguments: Any
) -> None:
    found = []
    kinds: tuple[tuple[Any, dict[str, Any]], ...]
    kinds = (StockCheckpoint, {}), (ModelCheckpoint, {"overlap": True})
    for kind, own in kinds:
        others = [copy.deepcopy(c) if isinstance(c, lightning.Callback) else c() for c in callbacks]
        plugins = {name: make() for name, make in arguments.items() if name == "plugins"}
        callback = kind(tmp_path, **saving, **own)
        found.append(run(tmp_path, callback, module(), *others, **(arguments | plugins)))
    assert_same(found[1], found[0])
    assert [(save.stats.overlapped, save.stats.reason) for save in saves] == [(True, "")] * len(saves)


def test_the_plugin_alone_overlaps_the_saves_of_the_stock_callback(tmp_path: Path, saves: list[Save]) -> None:
    stock = run(tmp_path, StockCheckpoint(tmp_path, **EACH_STEP), Wide())
    io = AsyncCheckpointIO(overlap=True, guard="checksum", device_memory=0)
    assert_same(run(tmp_path, StockCheckpoint(tmp_path, **EACH_STEP), Wide(), plugins=[io]), stock)
    assert [save.stats.overlapped for save in saves] == [True] * 12


def test_the_plugin_alone_does_not_overlap_where_nothing_fences_averaged_weights(
    tmp_path: Path, saves: list[Save]
) -> None:
    stock = run(tmp_path, StockCheckpoint(tmp_path, save_top_k=-1), Wide(), ema())
    plugins = [AsyncCheckpointIO(overlap=True)]
    assert_same(
        run(tmp_path, StockCheckpoint(tmp_path, save_top_k=-1), Wide(), ema(), plugins=plugins), stock
    )
    reasons = {(save.stats.overlapped, save.stats.reason.partition(" changes")[0]) for save in saves}
    assert reasons == {(False, "Lightning's WeightAveraging")}


def test_a_save_of_the_users_is_not_overlapped_while_averaged_weights_are_in_the_module(
    tmp_path: Path, saves: list[Save]
) -> None:
    class Saving(lightning.Callback):
        def on_validation_epoch_end(self, trainer: Any, _: Any) -> None:
            if not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    stock = run(tmp_path, StockCheckpoint(tmp_path, **EPOCHS), Wide(), Saving(), ema())
    callback = ModelCheckpoint(tmp_path, **EPOCHS, overlap=True)
    assert_same(run(tmp_path, callback, Wide(), Saving(), ema()), stock)
    assert [save.stats.overlapped for save in saves] == [False, True] * 3


class OwnIO(TorchCheckpointIO):
    """Somebody's own."""


def test_another_io_is_given_overlapped_snapshots(tmp_path: Path, saves: list[Save]) -> None:
    stock = run(tmp_path, StockCheckpoint(tmp_path, **EACH_STEP), Wide())
    callback = ModelCheckpoint(tmp_path, **EACH_STEP, overlap=True)
    assert_same(run(tmp_path, callback, Wide(), plugins=[OwnIO()]), stock)
    assert {save.stats.overlapped for save in saves} == {True}


@pytest.mark.parametrize("order", [1, -1])
def test_all_saves_of_a_trainer_are_overlapped_if_one_callback_asks(
    tmp_path: Path, saves: list[Save], order: int
) -> None:
    io = AsyncCheckpointIO(guard="checksum")
    callbacks = [
        ModelCheckpoint(tmp_path / "a", every_n_train_steps=1, overlap=True),
        ModelCheckpoint(tmp_path / "b", every_n_train_steps=2),
    ]
    trainer(*callbacks[::order], plugins=[io], max_epochs=1).fit(Wide())
    assert {save.stats.overlapped for save in saves} == {True}
    assert io.overlaps
    assert [pickle.loads(pickle.dumps(each)).overlap for each in callbacks] == [True, False]
    assert copy.deepcopy(io).overlaps


def test_a_fabric_saves_until_the_next_step(tmp_path: Path, saves: list[Save]) -> None:
    with AsyncCheckpointIO(overlap=True) as io:
        fabric = Fabric(accelerator="cpu", devices=1, plugins=[io])
        module = nn.Linear(300, 300)
        model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters()))
        expected = []
        for step in range(4):
            fabric.backward(model(torch.ones(2, 300)).square().mean())
            optimizer.step()
            fabric.save(tmp_path / str(step), {"model": model, "optimizer": optimizer})
            expected.append(copy.deepcopy(module.state_dict()))
        io.fence()
        with torch.no_grad():
            module.weight.zero_()
    assert [save.stats.overlapped for save in saves] == [True] * 4
    assert_same([torch.load(tmp_path / str(step))["model"] for step in range(4)], expected)


class Halving(lightning.Callback):
    """Changes a parameter while gradients are computed, after a fence if it is told so."""

    def __init__(self, *, fences: bool) -> None:
        self.fences = fences

    def on_before_optimizer_step(self, trainer: Any, module: Any, _: Any) -> None:
        if self.fences:
            trainer.checkpoint_callback.fence()
        with torch.no_grad():
            module.layer[0].weight.mul_(0.5)


def test_changes_without_a_fence_fail_the_save_and_name_the_tensor(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, **EACH_STEP, overlap=True)
    with pytest.raises(SaveError, match=r"step=1.ckpt failed: .*layer\.0\.weight.* was changed") as caught:
        trainer(callback, Halving(fences=False)).fit(Wide())
    assert isinstance(caught.value.__cause__, TornSnapshotError)
    assert "step=1.ckpt" not in {path.name for path in tmp_path.iterdir()}


def test_changes_after_a_fence_are_safe(tmp_path: Path, saves: list[Save]) -> None:
    stock = run(tmp_path, StockCheckpoint(tmp_path, **EACH_STEP), Wide(), Halving(fences=False))
    callback = ModelCheckpoint(tmp_path, **EACH_STEP, overlap=True)
    assert_same(run(tmp_path, callback, Wide(), Halving(fences=True)), stock)
    assert {save.stats.overlapped for save in saves} == {True}


def test_saves_outside_of_the_loop_and_before_a_requeue_are_blocking(
    tmp_path: Path, saves: list[Save]
) -> None:
    class Requeued(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")

    callback = ModelCheckpoint(tmp_path, every_n_train_steps=1, overlap=True)
    ended = trainer(callback, Requeued(), max_epochs=1, limit_train_batches=1, plugins=[AsyncCheckpointIO()])
    ended.fit(Wide())
    ended.save_checkpoint(tmp_path / "after.ckpt")
    blocking = (False, "the save was to be complete when it returned")
    assert [(s.stats.overlapped, s.stats.reason) for s in saves] == [blocking, (True, ""), blocking]


class StopError(Exception):
    pass


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_an_exception_beside_a_copy_loses_nothing_and_leaves_the_trainer_as_it_was(
    tmp_path: Path, error: type[BaseException], saves: list[Save]
) -> None:
    class Stopping(Wide):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            if index == 2:
                expected.update(copy.deepcopy(self.state_dict()))
                raise error
            return super().training_step(batch, index)

    expected: dict[str, Tensor] = {}
    callback = ModelCheckpoint(tmp_path, **EACH_STEP, overlap=True, save_on_exception=True)
    stopped = trainer(callback)
    before = list(stopped.callbacks)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        stopped.fit(Stopping())
    assert [save.stats.overlapped for save in saves] == [True] * 2
    assert_same(dict(torch.load(tmp_path / "step=2.ckpt")["state_dict"]), expected)
    assert stopped.callbacks == before


def test_the_trainer_has_its_own_callbacks_after_a_fit(tmp_path: Path) -> None:
    class Counting(lightning.Callback):
        def on_train_start(self, trainer: Any, _: Any) -> None:
            counts.append(len(trainer.callbacks))

    counts: list[int] = []
    callbacks = [ModelCheckpoint(tmp_path, every_n_epochs=n, overlap=True) for n in (1, 2)]
    for overlaps in (True, False):
        for callback in callbacks:
            callback.overlap = overlaps
        trained = trainer(*callbacks, Counting(), max_epochs=1)
        before = list(trained.callbacks)
        trained.fit(Wide())
        assert trained.callbacks == before
    assert counts == [len(before) + 1, len(before)]


def test_the_cost_of_a_fence_is_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callback = ModelCheckpoint(tmp_path, **EACH_STEP, overlap=True, log_cost=True)
    trainer(callback, logger=logger, max_epochs=1).fit(Wide())
    assert "asyncckpt/fence" in logger.experiment.metrics_keys
    logger = CSVLogger(tmp_path)
    trainer(ModelCheckpoint(tmp_path, log_cost=True), logger=logger, max_epochs=1).fit(Wide())
    assert "asyncckpt/fence" not in logger.experiment.metrics_keys


@pytest.mark.parametrize(("name", "value"), [("overlap", 1), ("guard", "crc"), ("device_memory", -1)])
def test_bad_arguments_are_errors(name: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        AsyncCheckpointIO(**{name: value})  # type: ignore[arg-type]
