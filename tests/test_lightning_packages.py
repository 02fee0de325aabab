"""Both packages of Lightning, neither of which needs the other, and the command line of Lightning."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from subprocess import PIPE, Popen
from typing import TYPE_CHECKING, Any

import lightning_fabric
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint as StockCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from torch import Tensor, nn

import asyncckpt.lightning
import asyncckpt.pytorch_lightning
from asyncckpt import SaveError
from asyncckpt.stores.local import LocalStore
from asyncckpt.testing import FaultyStore
from trainers import QUIET, Model, batches, is_ours, trainer

if TYPE_CHECKING:
    from asyncckpt.stores.base import Store

pytestmark = [
    pytest.mark.filterwarnings(f.replace("lightning.fabric", package))
    for f in QUIET
    for package in ("lightning.fabric", "lightning_fabric")
] + [pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")]

ours: Any = asyncckpt.pytorch_lightning


class OtherModel(pytorch_lightning.LightningModule):  # type: ignore[misc] # its types are not looked at
    """What `Model` is, for the other package."""

    def __init__(self, losses: tuple[float, ...] = (1.0,)) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.losses = losses
        self.epochs: list[int] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append(self.current_epoch)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.layer(batch[0]).square().mean()  # type: ignore[no-any-return]

    def on_train_epoch_end(self) -> None:
        self.log("loss", self.losses[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return batches(4)


def other_trainer(*callbacks: Any, **arguments: Any) -> Any:
    return trainer(*callbacks, package=pytorch_lightning, **arguments)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# The other package


def test_the_callback_works_in_the_other_package(tmp_path: Path) -> None:
    arguments: Any = {"dirpath": tmp_path, "monitor": "loss", "save_last": "link"}
    callback = ours.ModelCheckpoint(**arguments, save_best=True, overlap=True)
    run = other_trainer(callback)
    run.fit(OtherModel((3.0, 2.0, 4.0)))
    kept = "epoch=1-step=8.ckpt"
    assert names(tmp_path) == ["best.ckpt", kept, "last.ckpt"]
    assert all(is_ours(tmp_path / name) for name in names(tmp_path))
    assert callback.best_model_path == str(tmp_path / kept)
    assert type(run.strategy.checkpoint_io) is lightning_fabric.plugins.TorchCheckpointIO
    # Its stock callback restores it, and the other way round.
    for kind in (pytorch_lightning.callbacks.ModelCheckpoint, ours.ModelCheckpoint):
        callback, model = kind(**arguments), OtherModel((3.0, 2.0, 4.0, 5.0, 6.0))
        other_trainer(callback, max_epochs=4).fit(model, ckpt_path=tmp_path / kept)
        assert model.epochs == [2, 3]
        assert list(callback.best_k_models) == [str(tmp_path / kept)]
    loaded = OtherModel.load_from_checkpoint(callback.best_model_path)
    assert torch.equal(loaded.layer.weight, torch.load(tmp_path / kept)["state_dict"]["layer.weight"])


@pytest.mark.parametrize("stock", [True, False])
def test_the_plugin_works_in_the_other_package(tmp_path: Path, *, stock: bool) -> None:
    class FaultyIO(ours.AsyncCheckpointIO):  # type: ignore[misc] # of the package whose types are not looked at
        def _open_store(self, directory: str) -> Store:
            store = FaultyStore(LocalStore(directory))
            store.fail(
                "commit", OSError(28, "No space left"), where="epoch=2-step=12.ckpt".__eq__, times=None
            )
            return store

    package = pytorch_lightning.callbacks if stock else ours
    run = other_trainer(package.ModelCheckpoint(dirpath=tmp_path, save_top_k=-1), plugins=[FaultyIO()])
    with pytest.raises(SaveError, match="No space left"):
        run.fit(OtherModel((1.0,) * 3))
    assert names(tmp_path) == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]
    assert type(run.strategy.checkpoint_io) is FaultyIO


def test_fabric_and_the_stock_plugin_of_the_other_package(tmp_path: Path) -> None:
    with ours.AsyncCheckpointIO() as io:
        fabric = lightning_fabric.Fabric(plugins=[io], accelerator="cpu", devices=1)
        fabric.save(tmp_path / "a.ckpt", {"x": torch.ones(3)})
        assert fabric.load(tmp_path / "a.ckpt")["x"].tolist() == [1.0] * 3
    assert is_ours(tmp_path / "a.ckpt")
    stock = pytorch_lightning.plugins.AsyncCheckpointIO()
    run = other_trainer(ours.ModelCheckpointWithLinkBest(True, tmp_path / "b"), plugins=[stock])  # noqa: FBT003
    run.fit(OtherModel((1.0,) * 3))
    assert run.strategy.checkpoint_io is stock
    assert (tmp_path / "b" / "best.ckpt").readlink() == Path("epoch=2-step=12.ckpt")
    assert is_ours(tmp_path / "b" / "best.ckpt")


# Mixed, or missing


def test_the_packages_cannot_be_mixed(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match="works with the Trainer of lightning, not with that of pytorch_lightning"
    ):
        other_trainer(asyncckpt.lightning.ModelCheckpoint(tmp_path, monitor="loss"), max_epochs=1).fit(
            OtherModel()
        )
    with pytest.raises(
        TypeError, match="works with the Trainer of pytorch_lightning, not with that of lightning"
    ):
        trainer(ours.ModelCheckpoint(tmp_path, monitor="loss"), max_epochs=1).fit(Model())
    assert names(tmp_path) == []


def test_neither_module_needs_the_other_package() -> None:
    """In processes of their own, both at once, as an import cannot be taken back."""
    absent = {"lightning": ["pytorch_lightning", "lightning_fabric"], "pytorch_lightning": ["lightning"]}
    programs = {}
    for module, others in absent.items():
        script = f"""if True:
            import sys
            sys.modules.update(dict.fromkeys({others!r}))
            import asyncckpt.{module} as ours
            made = ours.ModelCheckpoint(), ours.ModelCheckpointWithLinkBest(), ours.AsyncCheckpointIO()
            loaded = [name for name in sys.modules if name.partition(".")[0] in {others!r}]
            assert loaded == {others!r}, loaded
        """
        programs[module] = Popen([sys.executable, "-W", "ignore", "-c", script], stderr=PIPE, text=True)
    for module, program in programs.items():
        _, errors = program.communicate(timeout=100)
        assert program.returncode == 0, f"{module}: {errors}"


@pytest.mark.parametrize(
    ("module", "other", "missing"),
    [
        ("lightning", "pytorch_lightning", ["lightning", "lightning.fabric.plugins"]),
        (
            "pytorch_lightning",
            "lightning",
            ["lightning_fabric", "lightning_fabric.plugins", "pytorch_lightning"],
        ),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, other: str, missing: list[str]
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"asyncckpt.{module}")
    monkeypatch.delattr(asyncckpt, module)
    with pytest.raises(ImportError) as raised:
        importlib.import_module(f"asyncckpt.{module}")
    told = str(raised.value)
    assert told.startswith(f"asyncckpt.{module} needs the package {module}:")
    assert "pip install" in told
    assert f"import asyncckpt.{other}" in told
    if module == "lightning":
        assert 'pip install "lightning>=2.6"' in told


# The command line


CONFIG = """
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 2
  limit_train_batches: 2
  limit_val_batches: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {root}
  callbacks:
    - class_path: asyncckpt.lightning.ModelCheckpoint
      init_args:
        dirpath: {root}/a
        filename: "{{epoch}}"
        save_last: link
        save_best: link
        log_cost: true
        every_n_epochs: 1
    - class_path: asyncckpt.lightning.ModelCheckpointWithLinkBest
      init_args:
        save_best: true
        dirpath: {root}/b
        monitor: epoch
        mode: max
        train_time_interval: null
        save_top_k: -1
  plugins:
    - class_path: asyncckpt.lightning.AsyncCheckpointIO
      init_args:
        max_in_flight: 3
"""


@pytest.fixture(autouse=True)
def _no_arguments_but_those_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])


def command_line(*arguments: str) -> Any:
    return LightningCLI(BoringModel, BoringDataModule, args=list(arguments), seed_everything_default=False)


def test_a_configuration_file_makes_the_callbacks(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(CONFIG.format(root=tmp_path))
    cli = command_line("fit", "--config", str(config))
    first, second = cli.trainer.checkpoint_callbacks
    assert type(first) is asyncckpt.lightning.ModelCheckpoint
    assert (first.save_last, first.save_best, first.log_cost, first.save_top_k) == ("link", "link", True, 1)
    assert type(second) is asyncckpt.lightning.ModelCheckpointWithLinkBest
    assert (second.save_best, second.monitor, second.save_top_k) == ("link", "epoch", -1)
    assert cli.trainer.strategy.checkpoint_io._max_in_flight == 3
    assert names(tmp_path / "a") == ["best.ckpt", "epoch=1.ckpt", "last.ckpt"]
    assert names(tmp_path / "b") == ["best.ckpt", "epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt"]
    assert (tmp_path / "b" / "best.ckpt").readlink() == Path("epoch=1-step=4.ckpt")
    # What was run is written beside it, and can be run again.
    written = (tmp_path / "config.yaml").read_text()
    assert "class_path: asyncckpt.lightning.ModelCheckpointWithLinkBest" in written


@pytest.mark.parametrize("name", ["ModelCheckpoint", "ModelCheckpointWithLinkBest"])
def test_help_lists_the_arguments_of_lightning_and_ours(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command_line("fit", f"--trainer.callbacks.help=asyncckpt.lightning.{name}")
    told = capsys.readouterr().out
    stock = [argument for argument in inspect.signature(StockCheckpoint).parameters if argument != "self"]
    for argument in (*stock, "save_best", "log_cost"):
        assert f".{argument} " in told, argument


def test_arguments_of_the_command_line_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    callback = "--trainer.callbacks=asyncckpt.lightning.ModelCheckpoint"
    for wrong in ("save_best=never", "save_top_k=many", "no_such=1"):
        with pytest.raises(SystemExit):
            command_line("fit", callback, f"--trainer.callbacks.{wrong}")
        assert wrong.partition("=")[0] in capsys.readouterr().err
