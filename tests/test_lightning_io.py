"""AsyncCheckpointIO: under a Trainer and Fabric, before other CheckpointIOs, and what is in its files."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

import fsspec
import lightning
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint as StockCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import AsyncCheckpointIO as StockAsyncIO
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from torch import nn

from asyncckpt import BusyError, CorruptCheckpointError, SaveError
from asyncckpt._saving.engine import get_engine
from asyncckpt._saving.saver import _savers
from asyncckpt.lightning import AsyncCheckpointIO, ModelCheckpoint
from asyncckpt.testing import FaultyStore, Gate, SlowStore
from sameness import assert_same
from support import assert_waits, flip, payload_offset, torch_round_trip
from trainers import QUIET, Model, StoreIO, batches, is_ours, trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.filterwarnings(f) for f in QUIET]

FULL = OSError(28, "No space left on device")


class Rich(Model):
    """A module that puts all that Lightning knows of into its checkpoints, and something of its own."""

    def __init__(self, losses: tuple[float, ...] = (3.0, 1.0, 2.0), width: int = 5) -> None:
        super().__init__(losses)
        self.save_hyperparameters()
        self.extra = nn.Linear(width, width)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"set": {1, 2}, "view": self.layer.weight[0], "nothing": None}


class Data(lightning.LightningDataModule):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.size = size
        self.save_hyperparameters()
        self.served = 0

    def train_dataloader(self) -> Any:
        self.served += 1
        return batches(self.size)

    def val_dataloader(self) -> Any:
        return batches(1)

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.served = state_dict["served"]


class Look(lightning.Callback):
    """Sees what the Trainer has while it trains, and may end that."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.ios: list[Any] = []
        self.epochs: list[int] = []

    def on_train_epoch_start(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        self.ios.append(trainer.strategy.checkpoint_io)
        self.epochs.append(trainer.current_epoch)
        if self.error is not None and trainer.current_epoch == 1:
            raise self.error


class OwnIO(CheckpointIO):
    """Somebody's own: it makes the same files, tells what it was asked for, and waits at its gate."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[tuple[str, str]] = []
        self.threads: set[int] = set()
        self.states: list[Any] = []
        self.options: list[Any] = []
        self.fails: dict[tuple[str, str], OSError] = {}

    def _note(self, call: str, path: Any) -> None:
        assert self.gate.wait(30)
        self.threads.add(threading.get_ident())
        self.calls.append((call, Path(path).name))
        if self.calls[-1] in self.fails:
            raise self.fails[self.calls[-1]]

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self._note("save", path)
        self.states.append(copy.deepcopy(checkpoint))
        self.options.append(storage_options)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> Any:
        return torch.load(path, map_location, weights_only=weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        self._note("remove", path)
        Path(path).unlink()


class Stamping(_WrappingCheckpointIO):
    """Somebody's own wrapper of whatever is in it."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint({**checkpoint, "stamp": 7}, path, storage_options)


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate that nothing waits at any more when the test is over, whatever came of it."""
    gate = Gate()
    yield gate
    gate.open()
    get_engine().drain()


def faulty(at: int) -> StoreIO:
    def wrap(store: Any) -> FaultyStore:
        double = FaultyStore(store)
        double.fail("commit", FULL, at=at)
        return double

    return StoreIO(wrap)


def held(gate: Gate, **arguments: Any) -> StoreIO:
    return StoreIO(lambda store: SlowStore(store, gates={"commit": gate}), **arguments)


def fabric_of(io: Any) -> Fabric:
    return Fabric(plugins=[io], accelerator="cpu", devices=1)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def in_thread(func: Callable[[], object]) -> tuple[threading.Thread, Queue[object]]:
    """Call a function elsewhere; what it returns is put into the queue."""
    queue: Queue[object] = Queue()
    thread = threading.Thread(target=lambda: queue.put(func()))
    thread.start()
    return thread, queue


# A Trainer


def rich_run(directory: Path, callback: Any, *, epochs: int = 3, path: Any = None, **arguments: Any) -> Any:
    torch.manual_seed(0)
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    plugins = [precision, *arguments.pop("plugins", [])]
    run = trainer(callback, plugins=plugins, max_epochs=epochs, **arguments)
    run.fit(Rich(), Data(), ckpt_path=path, weights_only=False)
    return {name: torch.load(directory / name, weights_only=False) for name in names(directory)}


def test_files_and_contents_are_those_of_stock_lightning(tmp_path: Path) -> None:
    """All three run in one directory, as its name is in the files."""
    directory = tmp_path / "run"
    arguments: Any = {"dirpath": directory, "monitor": "val_loss", "save_top_k": 2, "save_last": True}
    stock = rich_run(directory, StockCheckpoint(**arguments))
    assert {"MixedPrecision", "Data", "hyper_parameters", "datamodule_hyper_parameters", "mine"} < set(
        stock["last.ckpt"]
    )
    assert not is_ours(directory / "last.ckpt")
    directory.rename(tmp_path / "stock")
    for number, (callback, plugins) in enumerate(
        (
            (StockCheckpoint(**arguments), [AsyncCheckpointIO()]),
            (ModelCheckpoint(**arguments), [AsyncCheckpointIO()]),
            (ModelCheckpoint(**arguments), []),
        )
    ):
        found = rich_run(directory, callback, plugins=plugins)
        assert_same(found, stock)
        assert all(is_ours(directory / name) for name in found)
        directory.rename(tmp_path / str(number))


@pytest.mark.parametrize("callback", [StockCheckpoint, ModelCheckpoint])
def test_a_plugin_that_is_given_is_used_and_stays(tmp_path: Path, callback: Any) -> None:
    io, look = held(Gate(opened=True)), Look()
    run = trainer(callback(dirpath=tmp_path), look, plugins=[io], max_epochs=2)
    run.fit(Model())
    assert look.ios == [io, io]
    assert run.strategy.checkpoint_io is io
    assert list(io.stores) == [str(tmp_path)]
    run.fit_loop.max_epochs = 3
    run.fit(Model(), ckpt_path=tmp_path / "epoch=1-step=8.ckpt")
    assert names(tmp_path) == ["epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt"]  # resumed from: it stays


@pytest.mark.parametrize("error", [None, RuntimeError("mine")])
@pytest.mark.parametrize("given", [TorchCheckpointIO, StockAsyncIO, OwnIO, Stamping])
def test_what_a_trainer_had_is_given_back_after_fit(
    tmp_path: Path, given: type[CheckpointIO], error: BaseException | None
) -> None:
    original, look = given(), Look(error)
    first = ModelCheckpoint(dirpath=tmp_path / "a")
    second = ModelCheckpoint(dirpath=tmp_path / "b", monitor="epoch", mode="max", save_last=True)
    run = trainer(first, second, look, plugins=[original], max_epochs=2)
    if error is None:
        run.fit(Model())
    else:
        with pytest.raises(RuntimeError) as raised:
            run.fit(Model())
        assert raised.value is error
    assert [type(io) for io in look.ios] == [AsyncCheckpointIO] * 2
    assert look.ios[0] is look.ios[1]
    assert run.strategy.checkpoint_io is original
    newest = "epoch=1-step=8.ckpt" if error is None else "epoch=0-step=4.ckpt"
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == ([newest], [newest, "last.ckpt"])
    if given in {TorchCheckpointIO, StockAsyncIO}:
        assert is_ours(tmp_path / "a" / newest)
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert not is_ours(tmp_path / "after.ckpt")


def test_the_plugin_alone_is_told_of_a_failure_at_the_end_of_fit(tmp_path: Path) -> None:
    run = trainer(StockCheckpoint(dirpath=tmp_path), plugins=[faulty(at=3)])
    with pytest.raises(SaveError, match="epoch=2-step=12") as raised:
        run.fit(Model())
    assert raised.value.__cause__ is not None
    mine = RuntimeError("mine")
    run = trainer(StockCheckpoint(dirpath=tmp_path / "b"), Look(mine), plugins=[faulty(at=1)])
    with pytest.raises(RuntimeError) as other:
        run.fit(Model())
    assert other.value is mine
    assert names(tmp_path / "b") == []


def test_with_the_plugin_alone_a_save_after_fit_is_there_after_wait(tmp_path: Path, gate: Gate) -> None:
    io = held(gate)
    run = trainer(plugins=[io], enable_checkpointing=False, max_epochs=1)
    run.fit(Model())
    run.save_checkpoint(tmp_path / "a.ckpt")
    gate.wait_for_arrival()
    assert not (tmp_path / "a.ckpt").exists()
    gate.open()
    io.wait(timeout=30)
    assert is_ours(tmp_path / "a.ckpt")


def test_a_save_that_slurm_requeues_behind_is_complete_with_the_plugin_alone(tmp_path: Path) -> None:
    io = StoreIO(lambda store: SlowStore(store, delays={"commit": 0.2}))
    io.save_checkpoint({"x": torch.ones(3)}, tmp_path / "hpc_ckpt_1.ckpt")
    assert is_ours(tmp_path / "hpc_ckpt_1.ckpt")
    io.wait()


@pytest.mark.parametrize("plugins", [[], [AsyncCheckpointIO]])
def test_no_saver_takes_part_after_fit(tmp_path: Path, plugins: list[Any]) -> None:
    before = set(_savers)
    run = trainer(ModelCheckpoint(tmp_path, save_last=True), plugins=[plugin() for plugin in plugins])
    run.fit(Model())
    assert set(_savers) <= before


# Fabric


def test_fabric_saves_in_the_background_and_its_loads_wait(tmp_path: Path, gate: Gate) -> None:
    io = held(gate)
    fabric = fabric_of(io)
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    model, wrapped = fabric.setup(layer, optimizer)
    before = layer.weight.detach().clone()
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": wrapped, "step": 3})
    gate.wait_for_arrival()
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(BusyError):
        io.wait(timeout=0.01)
    assert not (tmp_path / "a.ckpt").exists()
    thread, loaded = in_thread(lambda: fabric.load(tmp_path / "a.ckpt", {"model": model}))
    assert_waits(loaded.qsize)
    gate.open()
    rest = loaded.get(timeout=30)
    thread.join()
    assert isinstance(rest, dict)
    assert rest["step"] == 3
    assert torch.equal(layer.weight, before)
    io.wait(timeout=30)
    with pytest.raises(FileNotFoundError):
        fabric.load(tmp_path / "absent.ckpt")


def test_the_end_of_the_context_waits(tmp_path: Path, gate: Gate) -> None:
    def save() -> list[str]:
        with held(gate) as io:
            fabric_of(io).save(tmp_path / "a.ckpt", {"x": torch.ones(3)})
        return names(tmp_path)

    thread, found = in_thread(save)
    gate.wait_for_arrival()
    assert_waits(found.qsize)
    gate.open()
    assert found.get(timeout=30) == ["a.ckpt"]
    thread.join()


def test_the_end_of_the_context_raises_what_failed_unless_the_user_raises(tmp_path: Path) -> None:
    state: dict[str, Any] = {"x": torch.ones(3)}
    mine = RuntimeError("mine")
    with pytest.raises(SaveError, match="No space left") as raised, faulty(at=1) as io:
        fabric_of(io).save(tmp_path / "a.ckpt", state)
    assert raised.value.__cause__ is not None
    with pytest.raises(RuntimeError) as other, faulty(at=1) as io:  # noqa: PT012 - it ends with the context
        fabric_of(io).save(tmp_path / "a.ckpt", state)
        raise mine
    assert other.value is mine
    if sys.version_info >= (3, 11):
        assert ["No space left" in note for note in mine.__notes__] == [True]
    assert names(tmp_path) == []


def python(script: str, *arguments: str) -> str:
    """Run a program in a process of its own; its warnings are Lightning's."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_pending_at_the_end_of_the_program_is_finished(tmp_path: Path) -> None:
    script = """
        import os, sys
        import torch
        from lightning.fabric import Fabric
        from asyncckpt.lightning import AsyncCheckpointIO
        from asyncckpt.testing import SlowStore

        class IO(AsyncCheckpointIO):
            def _open_store(self, directory):
                return SlowStore(super()._open_store(directory), delays={"commit": 0.5})

        fabric = Fabric(plugins=[IO()], accelerator="cpu", devices=1)
        fabric.save(sys.argv[1] + "/a.ckpt", {"x": torch.ones(3)})
        fabric.save(sys.argv[1] + "/b.ckpt", {"x": torch.ones(3)})
        print(os.path.exists(sys.argv[1] + "/a.ckpt"))
    """
    assert python(script, str(tmp_path)).endswith("False\n")
    assert names(tmp_path) == ["a.ckpt", "b.ckpt"]
    assert torch.load(tmp_path / "b.ckpt")["x"].tolist() == [1.0] * 3


def test_no_more_snapshots_than_max_in_flight_are_in_memory(tmp_path: Path, gate: Gate) -> None:
    state = {"x": torch.ones(1 << 18)}
    get_engine().drain()
    for limit in (1, 2):
        gate.close()
        io = held(gate, max_in_flight=limit)
        for number in range(limit):
            io.save_checkpoint(state, tmp_path / f"{number}.ckpt")
        thread, saved = in_thread(lambda io=io: io.save_checkpoint(state, tmp_path / "more.ckpt"))  # type: ignore[misc]
        assert_waits(saved.qsize)
        assert get_engine().arena.statistics().leases == limit
        gate.open()
        saved.get(timeout=30)
        thread.join()
        io.wait()
        assert get_engine().arena.statistics().leases == 0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda io: pickle.loads(pickle.dumps(io))])
def test_a_copy_of_a_plugin_has_nothing_pending(
    tmp_path: Path, gate: Gate, again: Callable[[Any], Any]
) -> None:
    before, io = held(gate), AsyncCheckpointIO(TorchCheckpointIO(), max_in_flight=1)
    before.save_checkpoint({"x": torch.ones(3)}, tmp_path / "held.ckpt")
    io.save_checkpoint({"x": torch.ones(3)}, tmp_path / "a.ckpt")
    io.remove_checkpoint(tmp_path / "old.ckpt")
    copied = again(io)
    copied.wait(timeout=0)
    assert type(copied.checkpoint_io) is TorchCheckpointIO
    copied.save_checkpoint({"x": torch.zeros(3)}, tmp_path / "b.ckpt")
    thread, saved = in_thread(lambda: copied.save_checkpoint({"x": torch.zeros(3)}, tmp_path / "c.ckpt"))
    assert_waits(saved.qsize)
    gate.open()
    saved.get(timeout=30)
    thread.join()
    for each in (before, io, copied):
        each.wait()
    assert names(tmp_path) == ["a.ckpt", "b.ckpt", "c.ckpt", "held.ckpt"]


# Other CheckpointIOs


def test_another_io_gets_the_state_of_that_instant_in_the_background(tmp_path: Path) -> None:
    own, layer = OwnIO(), nn.Linear(3, 3)
    own.gate.clear()
    expected = copy.deepcopy(layer.state_dict())
    state: dict[str, Any] = {
        "model": layer.state_dict(),
        "view": layer.weight.detach().T[0],
        "list": [1, {"a": None}],
    }
    with AsyncCheckpointIO(own, max_in_flight=3) as io:
        io.save_checkpoint(state, tmp_path / "a.ckpt", storage_options={"level": 3})
        io.save_checkpoint(state, tmp_path / "b.ckpt")
        io.remove_checkpoint(tmp_path / "a.ckpt")
        io.save_checkpoint({"x": 1}, tmp_path / "c.ckpt")
        with torch.no_grad():
            layer.weight.zero_()
        state["list"].append("later")
        assert own.calls == []
        own.gate.set()
    assert own.calls == [("save", "a.ckpt"), ("save", "b.ckpt"), ("remove", "a.ckpt"), ("save", "c.ckpt")]
    assert threading.get_ident() not in own.threads
    assert own.options == [{"level": 3}, None, None]
    assert names(tmp_path) == ["b.ckpt", "c.ckpt"]
    view = {"view": expected["weight"].T[0], "list": [1, {"a": None}]}
    assert_same(own.states[0], torch_round_trip({"model": expected, **view}))
    assert_same(io.load_checkpoint(tmp_path / "b.ckpt", weights_only=True), own.states[1])


@pytest.mark.parametrize("error", [FULL, TimeoutError()])
@pytest.mark.parametrize(
    ("call", "told"), [("save", "epoch=1-step=8.ckpt failed"), ("remove", "epoch=0-step=4.ckpt")]
)
def test_what_fails_in_another_io_is_told(tmp_path: Path, call: str, told: str, error: OSError) -> None:
    """Also if the error itself says nothing."""
    own = OwnIO()
    own.fails[call, {"save": "epoch=1-step=8.ckpt", "remove": "epoch=0-step=4.ckpt"}[call]] = error
    run = trainer(ModelCheckpoint(dirpath=tmp_path), plugins=[own], max_epochs=2)
    with pytest.raises(SaveError) as raised:
        run.fit(Model())
    assert raised.value.__cause__ is error
    assert names(tmp_path)[0] == "epoch=0-step=4.ckpt"
    assert told in str(raised.value)


def test_a_removal_that_fails_is_told_by_the_plugin_alone(tmp_path: Path) -> None:
    own = OwnIO()
    own.fails["remove", "a.ckpt"] = FULL
    io = AsyncCheckpointIO(own)
    io.remove_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(SaveError, match=r"a\.ckpt could not be removed") as raised:
        io.wait()
    assert raised.value.__cause__ is FULL
    io.wait()


def test_wrappers_work_around_ours_and_within_it(tmp_path: Path) -> None:
    for number, plugin in enumerate(
        (AsyncCheckpointIO(Stamping()), Stamping(AsyncCheckpointIO()), Stamping())
    ):
        look, directory = Look(), tmp_path / str(number)
        callback = ModelCheckpoint(dirpath=directory, save_last=True, monitor="epoch", mode="max")
        run = trainer(callback, look, plugins=[plugin])
        run.fit(Model())
        assert names(directory) == ["epoch=2-step=12.ckpt", "last.ckpt"]
        assert [torch.load(directory / name)["stamp"] for name in names(directory)] == [7, 7]
        assert is_ours(directory / "last.ckpt") == (number == 1)
        assert run.strategy.checkpoint_io is plugin
        assert (look.ios[0] is plugin) == (number < 2)


def test_storage_options_are_refused_by_our_writer_and_given_to_others(tmp_path: Path) -> None:
    own = OwnIO()
    run = trainer(ModelCheckpoint(dirpath=tmp_path), plugins=[AsyncCheckpointIO(own)], max_epochs=1)
    run.fit(Model())
    run.save_checkpoint(tmp_path / "a.ckpt", storage_options={"level": 3})
    assert own.options == [None, {"level": 3}]
    run = trainer(plugins=[AsyncCheckpointIO()], enable_checkpointing=False, max_epochs=1)
    run.fit(Model())
    with pytest.raises(TypeError, match="storage_options"):
        run.save_checkpoint(tmp_path / "b.ckpt", storage_options={"level": 3})
    assert not (tmp_path / "b.ckpt").exists()


# Remote paths


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[str]:
    yield f"memory:/{tmp_path}"
    fsspec.filesystem("memory").rm(str(tmp_path), recursive=True)


def remote_names(url: str) -> list[str]:
    fs, path = fsspec.url_to_fs(url)
    return sorted(Path(found).name for found in fs.ls(path, detail=False))


def test_remote_directories_hold_what_local_ones_do(remote: str) -> None:
    url = f"{remote}/a"
    arguments: Any = {"dirpath": url, "monitor": "val_loss", "save_last": True, "save_best": True}
    callback = ModelCheckpoint(**arguments)
    trainer(callback).fit(Model([3.0, 1.0, 2.0]))
    assert remote_names(url) == ["best.ckpt", "epoch=1-step=8.ckpt", "last.ckpt"]
    assert callback.best_model_path == f"{url}/epoch=1-step=8.ckpt"
    assert callback.last_model_path == f"{url}/last.ckpt"
    io = AsyncCheckpointIO()
    assert [io.load_checkpoint(f"{url}/{n}")["global_step"] for n in remote_names(url)] == [8, 8, 8]
    callback, look = ModelCheckpoint(**arguments), Look()
    trainer(callback, look, max_epochs=5).fit(Model([2.0, 1.5, 0.0]), ckpt_path=f"{url}/last.ckpt")
    assert look.epochs == [2, 3, 4]
    assert remote_names(url) == ["best.ckpt", "epoch=4-step=20.ckpt", "last.ckpt"]
    assert io.load_checkpoint(f"{url}/best.ckpt")["global_step"] == 20


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("name", ["epoch=1-step=8.ckpt", "last.ckpt"])
def test_nothing_is_removed_from_another_remote_directory(remote: str, name: str) -> None:
    kept = ["epoch=1-step=8.ckpt", "last.ckpt"]
    trainer(ModelCheckpoint(dirpath=f"{remote}/a", save_last=True), max_epochs=2).fit(Model())
    for there in ("ab", "a/b"):
        callback = ModelCheckpoint(dirpath=f"{remote}/{there}/")
        trainer(callback, max_epochs=4).fit(Model(), ckpt_path=f"{remote}/a/{name}")
        assert remote_names(f"{remote}/{there}") == ["epoch=3-step=16.ckpt"]
    assert remote_names(f"{remote}/a") == ["b", *kept]
    callback = ModelCheckpoint(dirpath=f"{remote}/a")
    trainer(callback, max_epochs=4).fit(Model(), ckpt_path=f"{remote}/a/{kept[0]}")
    assert remote_names(f"{remote}/a") == ["b", kept[0], "epoch=3-step=16.ckpt", kept[1]]


@pytest.mark.parametrize("argument", ["save_last", "save_best"])
def test_remote_directories_have_no_links(argument: str) -> None:
    arguments: Any = {"dirpath": "memory://asyncckpt/links", argument: "link"}
    callback = ModelCheckpoint(**arguments)
    with pytest.raises(ValueError, match=f"{argument}='link'.*only supported for local"):
        trainer(callback, max_epochs=1).fit(Model())


# Contents


@pytest.mark.parametrize(("which", "epoch"), [("path", 1), ("best", 1), ("last", 2), ("hpc", 2)])
def test_fit_resumes_from(tmp_path: Path, which: str, epoch: int) -> None:
    look = Look()
    callback = ModelCheckpoint(dirpath=tmp_path / "a", monitor="val_loss", save_top_k=2, save_last=True)
    run = trainer(callback, look, max_epochs=2, default_root_dir=tmp_path)
    run.fit(Model([1.0, 2.0]))
    if which == "hpc":
        run.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    run.fit_loop.max_epochs = 3
    run.fit(Model([3.0]), ckpt_path=callback.best_model_path if which == "path" else which)
    assert look.epochs[2] == epoch


def test_a_resumed_training_is_bit_for_bit_the_one_that_was_not_interrupted(tmp_path: Path) -> None:
    def callback(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path / name, save_last=True)

    whole = rich_run(tmp_path / "whole", callback("whole"), epochs=4)["last.ckpt"]
    rich_run(tmp_path / "parts", callback("parts"), epochs=2)
    parts = rich_run(tmp_path / "parts", callback("parts"), epochs=4, path="last")["last.ckpt"]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "MixedPrecision", "global_step"):
        assert_same(parts[key], whole[key])
    loaded = Rich.load_from_checkpoint(tmp_path / "parts" / "last.ckpt", weights_only=False)
    assert_same(loaded.state_dict(), whole["state_dict"])
    assert (loaded.losses, loaded.extra.in_features) == ([3.0, 1.0, 2.0], 5)


def boring(callback: Any, epochs: int, path: Any = None) -> Any:
    run = trainer(callback, max_epochs=epochs, limit_train_batches=2, limit_val_batches=1)
    run.fit(BoringModel(), ckpt_path=path)
    return callback


def test_files_go_from_stock_lightning_to_ours_and_back(tmp_path: Path) -> None:
    """Back in a process that has no asyncckpt."""
    arguments: Any = {"monitor": "epoch", "mode": "max", "save_top_k": 2, "save_last": True}
    boring(StockCheckpoint(tmp_path, **arguments), 2)
    ours = boring(ModelCheckpoint(tmp_path, **arguments), 3, "last")
    kept = ["epoch=1-step=4.ckpt", "epoch=2-step=6.ckpt"]
    assert [Path(path).name for path in ours.best_k_models] == kept
    assert names(tmp_path) == [*kept, "last.ckpt"]
    script = """
        import json, os, sys
        sys.modules["asyncckpt"] = None
        import lightning, torch
        from lightning.pytorch.callbacks import ModelCheckpoint
        from lightning.pytorch.demos.boring_classes import BoringModel

        directory, arguments = sys.argv[1], json.loads(sys.argv[2])
        last = torch.load(os.path.join(directory, "last.ckpt"), weights_only=True)
        loaded = BoringModel.load_from_checkpoint(os.path.join(directory, "last.ckpt"))
        assert torch.equal(loaded.layer.weight, last["state_dict"]["layer.weight"])
        callback = ModelCheckpoint(directory, **arguments)
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, logger=False, max_epochs=4, limit_train_batches=2,
            limit_val_batches=1, callbacks=[callback], enable_progress_bar=False, enable_model_summary=False,
        )
        trainer.fit(BoringModel(), ckpt_path="last")
        found = [last["global_step"], trainer.global_step, sorted(callback.best_k_models)]
        print("\\n" + json.dumps(found))
    """
    found = json.loads(python(script, str(tmp_path), json.dumps(arguments)).splitlines()[-1])
    kept = ["epoch=2-step=6.ckpt", "epoch=3-step=8.ckpt"]
    assert found == [6, 8, [str(tmp_path / name) for name in kept]]
    assert names(tmp_path) == [*kept, "last.ckpt"]


def test_fit_refuses_a_file_with_a_flipped_bit(tmp_path: Path) -> None:
    callback = boring(ModelCheckpoint(tmp_path, save_last=True), 1)
    path = tmp_path / "last.ckpt"
    flip(path, payload_offset(path, "data/0") + 3)
    with pytest.raises(CorruptCheckpointError, match=r"last\.ckpt.*data/0"):
        trainer(callback, max_epochs=2).fit(BoringModel(), ckpt_path="last")
