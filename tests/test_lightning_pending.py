"""What is saved in the background is never missed: not on disk, not by names, links, deletes or loads."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, LearningRateFinder, Timer
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.tuner.tuning import Tuner

from asyncckpt import SaveError
from asyncckpt._saving.engine import get_engine
from asyncckpt.lightning import ModelCheckpoint, ModelCheckpointWithLinkBest
from asyncckpt.testing import FaultyStore, Gate, SlowStore
from asyncckpt.testing.doubles import WrapperStore
from sameness import assert_same
from support import assert_waits
from trainers import QUIET, Model, StoreIO, batches, trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from asyncckpt.stores.base import Store

pytestmark = [
    *[pytest.mark.filterwarnings(f) for f in QUIET],
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]

VAL: dict[str, Any] = {"monitor": "val_loss"}
FLAT, NESTED = "{epoch}", "runs/{epoch}/model"


class Watched(WrapperStore):
    """Lets a test look at the directory before each operation that changes it, and counts those."""

    def __init__(self, inner: Store, look: Callable[[], object], calls: Counter[str]) -> None:
        super().__init__(inner)
        self.look, self.calls = look, calls

    async def before(self, operation: str, subject: str) -> None:
        del subject
        self.calls[operation] += 1
        if operation in {"draft", "commit", "remove", "link", "copy"}:
            self.look()


class WatchedIO(StoreIO):
    def __init__(self, look: Callable[[], object] = lambda: None) -> None:
        self.calls: Counter[str] = Counter()
        slow = {"commit": 0.01}  # so that training is ahead of the disk
        super().__init__(lambda store: SlowStore(Watched(store, look, self.calls), delays=slow))


class GatedIO(StoreIO):
    """Commits wait at a gate, which opens once somebody has been loading for a while."""

    def __init__(self, gate: Gate, **arguments: Any) -> None:
        super().__init__(lambda store: SlowStore(store, gates={"commit": gate}), **arguments)
        self.gate = gate
        self.early: list[bool] = []

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.early.append(not Path(path).exists())
        threading.Timer(0.2, self.gate.open).start()
        return super().load_checkpoint(path, *args, **kwargs)


class Evaluated(Model):
    def test_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.training_step(batch, index)

    def test_dataloader(self) -> Any:
        return batches(1)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    rescue = threading.Timer(20, gate.open)  # of a broken run, which would wait for ever
    rescue.start()
    yield gate
    rescue.cancel()
    gate.open()


@pytest.fixture(autouse=True)
def nothing_stays_pending() -> Iterator[None]:
    yield
    get_engine().drain()
    assert get_engine().arena.statistics().leases == 0


def at(hook: str, func: Callable[[Any], object]) -> LambdaCallback:
    """Return a callback, whose turn comes before that of the checkpoints."""
    return LambdaCallback(**{hook: lambda trainer, *_, **__: func(trainer)})


def after_validation(epoch: int, func: Callable[[Any], object]) -> LambdaCallback:
    """Return a callback with a turn between what an epoch saved and the wait at the end of the last one."""
    return at("on_train_epoch_end", lambda run: func(run) if run.current_epoch == epoch else None)


def load(path: str | Path) -> Any:
    return torch.load(path, weights_only=False)


def files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*.ckpt"))


@pytest.mark.parametrize("filename", [None, "same", "{epoch}/{step}"])
def test_there_is_a_complete_checkpoint_at_every_moment(tmp_path: Path, filename: str | None) -> None:
    complete = []
    io = WatchedIO(
        lambda: complete.append([load(tmp_path / name)["global_step"] for name in files(tmp_path)])
    )
    checkpoint = ModelCheckpoint(tmp_path, filename, every_n_train_steps=1)
    trainer(checkpoint, plugins=[io], max_epochs=-1, max_steps=50).fit(Model())
    first = complete.index([1])
    assert all(complete[first:])
    assert not any(complete[:first])
    assert max(map(len, complete)) <= 1 + 2
    assert io.calls["draft"] == 50
    assert [tmp_path / name for name in files(tmp_path)] == [Path(checkpoint.best_model_path)]
    assert load(checkpoint.best_model_path)["global_step"] == 50


def test_a_delete_waits_for_the_commit_of_what_replaces_it(tmp_path: Path, gate: Gate) -> None:
    seen: list[Any] = []

    def hold_back(run: Any) -> None:
        if run.current_epoch == 1:
            get_engine().drain()
            gate.close()

    def look(run: Any) -> None:
        gate.wait_for_arrival(2)
        exist = [checkpoint.file_exists(str(tmp_path / f"epoch={i}.ckpt"), run) for i in range(3)]
        seen.append((files(tmp_path), exist))
        gate.open()

    gate.open()
    checkpoint = ModelCheckpoint(tmp_path, FLAT, save_on_train_epoch_end=False)
    callbacks = (at("on_train_epoch_start", hold_back), after_validation(1, look), checkpoint)
    trainer(*callbacks, plugins=[GatedIO(gate)], max_epochs=2).fit(Model())
    assert seen == [(["epoch=0.ckpt"], [False, True, False])]
    assert files(tmp_path) == ["epoch=1.ckpt"]


def test_names_count_the_files_that_are_pending(tmp_path: Path, gate: Gate) -> None:
    seen: list[Any] = []

    def ask(run: Any) -> None:
        gate.wait_for_arrival()
        names = ("same.ckpt", "same-v1.ckpt", "same-v2.ckpt", "same-v3.ckpt")
        seen.append([checkpoint.file_exists(str(tmp_path / name), run) for name in names])
        seen.append(files(tmp_path))
        gate.open()

    checkpoint = ModelCheckpoint(tmp_path, "same", save_top_k=3, save_on_train_epoch_end=False, **VAL)
    io = GatedIO(gate, max_in_flight=3)
    trainer(after_validation(2, ask), checkpoint, plugins=[io]).fit(Model((3.0, 2.0, 1.0)))
    assert seen == [[True, True, True, False], []]
    assert files(tmp_path) == ["same-v1.ckpt", "same-v2.ckpt", "same.ckpt"]
    assert sorted(checkpoint.best_k_models) == [str(tmp_path / name) for name in files(tmp_path)]
    assert [load(tmp_path / f"same{v}.ckpt")["epoch"] for v in ("", "-v1", "-v2")] == [0, 1, 2]


@pytest.mark.parametrize("filename", [FLAT, NESTED])
@pytest.mark.parametrize("save_best", ["link", True])
def test_last_and_best_lead_to_whole_files_at_every_moment(
    tmp_path: Path, filename: str, save_best: Any
) -> None:
    seen: dict[str, list[int]] = {"last": [], "best": []}

    def look() -> None:
        for name, epochs in seen.items():
            path = tmp_path / f"{name}.ckpt"
            if path.is_symlink() or path.exists():
                epoch = load(path)["epoch"]
                if epoch not in epochs[-1:]:
                    epochs.append(epoch)

    arguments: dict[str, Any] = {"save_last": "link", "save_best": save_best, "save_top_k": 2, **VAL}
    checkpoint = ModelCheckpoint(tmp_path, filename, **arguments)
    losses = (3.0, 1.0, 2.0, 4.0, 0.5, 0.7)
    trainer(checkpoint, plugins=[WatchedIO(look)], max_epochs=6).fit(Model(losses))
    look()
    assert seen == {"last": [0, 1, 2, 4, 5], "best": [0, 1, 4]}
    top = [str(Path(filename.format(epoch=f"epoch={epoch}") + ".ckpt")) for epoch in (4, 5)]
    assert files(tmp_path) == sorted(["best.ckpt", "last.ckpt", *top])
    assert str((tmp_path / "last.ckpt").readlink()) == top[1]
    assert (tmp_path / "best.ckpt").samefile(checkpoint.best_model_path)
    assert (tmp_path / "best.ckpt").is_symlink() == (save_best == "link")
    if save_best == "link":
        assert str((tmp_path / "best.ckpt").readlink()) == top[0]


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_link_that_cannot_be_moved_keeps_its_file(tmp_path: Path, name: str) -> None:
    def failing(store: Store) -> Store:
        faulty = FaultyStore(store)
        faulty.fail("link", OSError("disk full"), at=2, times=None)
        return faulty

    link: dict[str, Any] = {f"save_{name}": "link"}
    checkpoint = ModelCheckpoint(tmp_path, FLAT, **link, **VAL)
    with pytest.raises(SaveError, match="disk full"):
        trainer(checkpoint, plugins=[StoreIO(failing)], max_epochs=2).fit(Model((2.0, 1.0)))
    assert load(tmp_path / f"{name}.ckpt")["epoch"] == 0


@pytest.mark.parametrize("name", ["last", "best"])
def test_links_may_have_a_directory_of_their_own(tmp_path: Path, name: str) -> None:
    class Apart(ModelCheckpoint):
        CHECKPOINT_NAME_LAST = CHECKPOINT_NAME_BEST = "links/{epoch}/it"

    link: dict[str, Any] = {f"save_{name}": "link"}
    trainer(Apart(tmp_path, NESTED, **link, **VAL), max_epochs=1).fit(Model())
    assert files(tmp_path) == ["links/epoch=0/it.ckpt", "runs/epoch=0/model.ckpt"]
    assert load(tmp_path / "links/epoch=0/it.ckpt")["epoch"] == 0


@pytest.mark.parametrize("filename", [FLAT, NESTED])
def test_last_is_a_second_name_of_what_was_saved_at_the_same_step(tmp_path: Path, filename: str) -> None:
    io = WatchedIO()
    checkpoint = ModelCheckpoint(tmp_path, filename, save_last=True, save_top_k=-1)
    run = trainer(checkpoint, plugins=[io])
    model = Model()
    run.fit(model)
    assert (io.calls["draft"], io.calls["copy"]) == (3 + 1, 2)  # the first last has a name to tell
    assert (tmp_path / "last.ckpt").samefile(checkpoint.best_model_path)
    state = load(tmp_path / "last.ckpt")
    assert (state["epoch"], state["global_step"]) == (2, 12)
    assert_same(state["state_dict"], model.state_dict())
    assert state["callbacks"][checkpoint.state_key]["last_model_path"] == str(tmp_path / "last.ckpt")


class Patched(ModelCheckpoint):
    """Changes the weights for the last checkpoint, as averages of them would."""

    def _save_last_checkpoint(self, trainer: Any, monitor_candidates: Any) -> None:
        weights = trainer.lightning_module.layer.weight
        kept = weights.data.clone()
        weights.data.zero_()
        super()._save_last_checkpoint(trainer, monitor_candidates)
        weights.data.copy_(kept)


def test_last_is_written_in_full_if_a_subclass_changes_the_weights_for_it(tmp_path: Path) -> None:
    trainer(Patched(tmp_path, FLAT, save_last=True, save_top_k=-1)).fit(Model())
    weights = {name: load(tmp_path / name)["state_dict"]["layer.weight"] for name in files(tmp_path)}
    assert [name for name, weight in weights.items() if not weight.any()] == ["last.ckpt"]


def test_last_is_written_in_full_if_the_trainer_is_patched(tmp_path: Path) -> None:
    run, saved = trainer(ModelCheckpoint(tmp_path, FLAT, save_last=True, save_top_k=-1)), []
    save = run.save_checkpoint

    def noting(path: str, *arguments: Any) -> None:
        saved.append(Path(path).name)
        save(path, *arguments)

    run.save_checkpoint = noting
    run.fit(Model())
    names = ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]
    assert saved == [name for top in names for name in (top, "last.ckpt")]


class Counting(Model):
    """Counts its checkpoints in a buffer."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint
        self.count.add_(1)


def test_what_a_hook_changes_between_the_two_saves_is_in_last(tmp_path: Path) -> None:
    trainer(ModelCheckpoint(tmp_path, FLAT, save_last=True, save_top_k=-1)).fit(Counting())
    counts = {name: load(tmp_path / name)["state_dict"]["count"].tolist() for name in files(tmp_path)}
    expected = {"epoch=0.ckpt": 1, "epoch=1.ckpt": 3, "epoch=2.ckpt": 5, "last.ckpt": 6}
    assert counts == {name: [count] * 3 for name, count in expected.items()}


class Told:
    """Mixed into what has a state in a checkpoint: that is another one each time it is asked for."""

    asked = 0

    def state_dict(self) -> dict[str, Any]:
        self.asked += 1
        return {"asked": self.asked}


class ToldCallback(Told, lightning.Callback):
    """A callback with a state."""


class Data(lightning.LightningDataModule):
    """A datamodule without a state."""

    def train_dataloader(self) -> Any:
        return batches(4)

    def val_dataloader(self) -> Any:
        return batches(1)


class ToldData(Told, Data):
    """A datamodule with a state."""


@pytest.mark.parametrize("owner", ["callback", "datamodule"])
def test_last_has_the_state_that_a_callback_or_a_datamodule_has_for_it(tmp_path: Path, owner: str) -> None:
    told = ToldCallback() if owner == "callback" else ToldData()
    callbacks = [told] if owner == "callback" else []
    datamodule = told if owner == "datamodule" else None
    io = WatchedIO()
    run = trainer(*callbacks, ModelCheckpoint(tmp_path, FLAT, save_last=True, save_top_k=-1), plugins=[io])
    run.fit(Model(), datamodule=datamodule)
    states = {name: load(tmp_path / name) for name in files(tmp_path)}
    asked = {n: (s | s["callbacks"])[type(told).__qualname__]["asked"] for n, s in states.items()}
    assert asked == {"epoch=0.ckpt": 1, "epoch=1.ckpt": 3, "epoch=2.ckpt": 5, "last.ckpt": 6}
    assert io.calls["copy"] == 0


def test_last_is_a_second_name_beside_lightnings_own_callbacks_and_a_plain_datamodule(tmp_path: Path) -> None:
    io = WatchedIO()
    stock = [EarlyStopping("val_loss", patience=9), Timer()]
    checkpoint = ModelCheckpoint(tmp_path, FLAT, save_last=True, save_top_k=-1)
    trainer(*stock, checkpoint, plugins=[io]).fit(Model(), datamodule=Data())
    assert io.calls["copy"] == 2
    assert (tmp_path / "last.ckpt").samefile(checkpoint.best_model_path)


class WithAverages(ModelCheckpoint):
    """Saves averaged weights beside each checkpoint, which it puts in through `.data`, as many do."""

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        weights = trainer.lightning_module.layer.weight
        kept = weights.data.clone()
        weights.data.copy_(torch.zeros_like(kept))
        super()._save_checkpoint(trainer, filepath.replace(".ckpt", "-average.ckpt"))
        weights.data.copy_(kept)


def test_weights_that_a_subclass_swaps_between_two_saves_come_out_right(tmp_path: Path) -> None:
    checkpoint = WithAverages(tmp_path, FLAT, save_last=True, save_top_k=-1)
    trainer(checkpoint, max_epochs=2).fit(Model())
    weights = {name: load(tmp_path / name)["state_dict"]["layer.weight"] for name in files(tmp_path)}
    swapped = {name for name, weight in weights.items() if not weight.any()}
    assert swapped == {name for name in weights if "average" in name}


@pytest.mark.parametrize("hook", ["on_fit_start", "on_fit_end", "teardown", "on_train_batch_end"])
def test_a_save_outside_of_the_loop_is_complete_when_it_returns(tmp_path: Path, hook: str) -> None:
    complete = []

    def save(run: Any) -> None:
        if run.global_step in {0, 8}:
            run.save_checkpoint(tmp_path / "saved.ckpt")
            complete.append((tmp_path / "saved.ckpt").exists())

    io = StoreIO(lambda store: SlowStore(store, delays={"commit": 0.2}))
    run = trainer(at(hook, save), ModelCheckpoint(tmp_path), plugins=[io], max_epochs=2)
    run.fit(Model())
    assert complete == [hook != "on_train_batch_end"]
    assert load(tmp_path / "saved.ckpt")["global_step"] == (0 if hook == "on_fit_start" else 8)


def test_a_save_after_fit_waits_for_the_disk(tmp_path: Path, gate: Gate) -> None:
    gate.open()
    run = trainer(ModelCheckpoint(tmp_path), plugins=[GatedIO(gate)], max_epochs=1)
    run.fit(Model())
    gate.close()
    saving = threading.Thread(target=run.save_checkpoint, args=(tmp_path / "own.ckpt",))
    saving.start()
    gate.wait_for_arrival(2)
    assert_waits(lambda: not saving.is_alive())
    gate.open()
    saving.join(60)
    assert load(tmp_path / "own.ckpt")["global_step"] == 4


def test_after_fit_everything_is_on_disk_and_the_trainer_as_it_was(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=2, save_last=True, save_best=True, **VAL)
    run = trainer(checkpoint)
    run.fit(Model((2.0, 1.0, 3.0)))
    assert all(Path(path).is_file() for path in (*checkpoint.best_k_models, checkpoint.last_model_path))
    assert (tmp_path / "best.ckpt").samefile(checkpoint.best_model_path)
    assert type(run.strategy.checkpoint_io) is TorchCheckpointIO
    run.save_checkpoint(tmp_path / "own.ckpt")
    assert load(tmp_path / "own.ckpt")["global_step"] == 12


def test_the_best_can_be_tested_right_after_fit(tmp_path: Path) -> None:
    model = Evaluated((2.0, 1.0, 3.0))
    run = trainer(ModelCheckpoint(tmp_path, FLAT, **VAL))
    run.fit(model)
    run.test(model, ckpt_path="best", verbose=False)
    assert_same(model.state_dict(), load(tmp_path / "epoch=1.ckpt")["state_dict"])


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_what_is_pending_can_be_gone_on_from(tmp_path: Path, gate: Gate, stage: str) -> None:
    trainer(ModelCheckpoint(tmp_path, "made"), max_epochs=1).fit(Evaluated())
    io = GatedIO(gate)
    io.save_checkpoint(load(tmp_path / "made.ckpt"), tmp_path / "pending.ckpt")
    model = Evaluated()
    run = trainer(ModelCheckpoint(tmp_path / "next"), plugins=[io], max_epochs=1)
    getattr(run, stage)(model, ckpt_path=str(tmp_path / "pending.ckpt"))
    assert io.early == [True]
    assert_same(model.state_dict(), load(tmp_path / "made.ckpt")["state_dict"])


def test_a_load_within_the_loop_waits_for_the_save(tmp_path: Path, gate: Gate) -> None:
    loaded = []

    def save_and_load(run: Any) -> None:
        if run.global_step == 2:
            run.save_checkpoint(tmp_path / "own.ckpt")
            loaded.append(run.strategy.load_checkpoint(tmp_path / "own.ckpt", weights_only=False))

    io = GatedIO(gate)
    arguments: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": False}
    trainer(at("on_train_batch_end", save_and_load), plugins=[io], **arguments).fit(Model())
    assert io.early == [True]
    assert loaded[0]["global_step"] == 2


class Tuning(LearningRateFinder):
    """Looks for a learning rate in the middle of training."""

    def on_fit_start(self, *_: Any) -> None: ...

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}
            self.lr_find(trainer, pl_module)
            assert_same(dict(pl_module.state_dict()), self.before)


def test_the_tuner_works_before_training(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"default_root_dir": tmp_path / "root", "max_epochs": 3}
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    model, run = Model(), trainer(checkpoint, **arguments)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = Tuner(run).lr_find(model, num_training=5, early_stop_threshold=None, update_attr=False)
    assert found is not None
    assert len(found.results["loss"]) == 5
    assert_same(dict(model.state_dict()), before)
    assert (files(tmp_path), type(run.strategy.checkpoint_io)) == ([], TorchCheckpointIO)
    run.fit(model)
    assert load(tmp_path / "last.ckpt")["global_step"] == 12


def test_the_tuner_works_within_training(tmp_path: Path, gate: Gate) -> None:
    io = GatedIO(gate)
    tuning = Tuning(num_training_steps=5, early_stop_threshold=None, update_attr=False)
    run = trainer(tuning, plugins=[io], default_root_dir=tmp_path, enable_checkpointing=False)
    run.fit(Model())
    assert io.early == [True]
    assert tuning.optimal_lr is not None
    assert files(tmp_path) == []


def test_with_link_best_links_the_best_and_has_a_key_of_its_own(tmp_path: Path) -> None:
    checkpoint = ModelCheckpointWithLinkBest(True, tmp_path, FLAT, save_top_k=2, **VAL)  # noqa: FBT003
    assert checkpoint.state_key.startswith("ModelCheckpointWithLinkBest{")
    trainer(checkpoint).fit(Model((2.0, 1.0, 3.0)))
    assert str((tmp_path / "best.ckpt").readlink()) == "epoch=1.ckpt"
    assert checkpoint.state_key in load(tmp_path / "best.ckpt")["callbacks"]


@pytest.mark.parametrize("first_best", ["link", None])
def test_best_is_the_best_of_a_resumed_run_too(tmp_path: Path, first_best: Any) -> None:
    arguments: dict[str, Any] = {"filename": FLAT, "save_top_k": 2, "save_last": True, **VAL}
    trainer(ModelCheckpoint(tmp_path, save_best=first_best, **arguments), max_epochs=2).fit(Model((1.0, 3.0)))
    for losses, epochs, best in (((2.0,), 3, 0), ((0.5,), 4, 3)):
        checkpoint = ModelCheckpoint(tmp_path, save_best="link", **arguments)
        run = trainer(checkpoint, max_epochs=epochs)
        run.fit(Model(losses), ckpt_path=str(tmp_path / "last.ckpt"))
        assert str((tmp_path / "best.ckpt").readlink()) == f"epoch={best}.ckpt"


def test_a_best_file_that_was_taken_away_does_not_stop_a_resumed_run(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"save_top_k": 3, "save_best": "link", "save_last": True, **VAL}
    trainer(ModelCheckpoint(tmp_path, FLAT, **arguments), max_epochs=2).fit(Model((1.0, 3.0)))
    (tmp_path / "epoch=0.ckpt").unlink()
    (tmp_path / "best.ckpt").unlink()
    run = trainer(ModelCheckpoint(tmp_path, FLAT, **arguments), max_epochs=4)
    with pytest.warns(UserWarning, match=r"epoch=0\.ckpt is gone, so there is no link"):
        run.fit(Model((2.0,)), ckpt_path=str(tmp_path / "last.ckpt"))
    assert run.current_epoch == 4
    assert not (tmp_path / "best.ckpt").is_symlink()


def test_best_and_last_are_copies_in_a_store_without_links() -> None:
    directory = "memory://pending"
    checkpoint = ModelCheckpoint(directory, FLAT, save_last=True, save_best=True, **VAL)
    trainer(checkpoint, max_epochs=4).fit(Model((2.0, 1.0, 0.5, 3.0)))
    memory = fsspec.filesystem("memory")
    names = [path.rpartition("/")[2] for path in sorted(memory.find(directory))]
    assert names == ["best.ckpt", "epoch=2.ckpt", "last.ckpt"]
    epochs = [torch.load(memory.open(f"{directory}/{name}"), weights_only=False)["epoch"] for name in names]
    assert epochs == [2, 2, 2]
    with pytest.raises(ValueError, match="save_best='link'"):
        trainer(ModelCheckpoint(directory, save_best="link")).fit(Model())
