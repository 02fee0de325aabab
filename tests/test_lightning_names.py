"""The Lightning callback is taken for Lightning's own: its name, arguments, refusals, state and copies."""

from __future__ import annotations

import copy
import inspect
import pickle
import pydoc
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any, get_type_hints
from unittest import mock

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.callbacks import ModelCheckpoint as Stock

from asyncckpt.lightning import ModelCheckpoint as Ours
from asyncckpt.lightning import ModelCheckpointWithLinkBest
from asyncckpt.testing import Gate, SlowStore
from sameness import assert_same
from trainers import QUIET, Model, StoreIO, trainer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.filterwarnings(f) for f in QUIET]

ARGUMENTS: dict[str, Any] = {
    "dirpath": "somewhere/../else",
    "filename": "{epoch}",
    "monitor": "val_loss",
    "verbose": True,
    "save_last": "link",
    "save_top_k": 3,
    "save_on_exception": True,
    "save_weights_only": True,
    "mode": "max",
    "auto_insert_metric_name": False,
    "every_n_train_steps": 0,
    "train_time_interval": None,
    "every_n_epochs": 2,
    "save_on_train_epoch_end": True,
    "enable_version_counter": False,
}
KEYS = [
    "monitor",
    "best_model_score",
    "best_model_path",
    "current_score",
    "dirpath",
    "best_k_models",
    "kth_best_model_path",
    "kth_value",
    "last_model_path",
]


def attributes(callback: Stock) -> dict[str, Any]:
    """Return what Lightning's callback keeps, but for the file system."""
    names = set(vars(Stock())) - {"_fs", "_last_time_checked"}
    return {name: getattr(callback, name) for name in sorted(names)}


def trained(kind: type[Stock], directory: Path, losses: tuple[float, ...] = (0.5, 0.7)) -> Stock:
    callback = kind(directory, monitor="val_loss", save_top_k=2, save_last=True)
    trainer(callback, max_epochs=len(losses)).fit(Model(losses))
    return callback


def raised(kind: type[Stock], *arguments: Any, **named: Any) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - it is what is compared
        kind(*arguments, **named)
    return caught.type, str(caught.value)


# Being the same thing


def test_it_is_a_model_checkpoint_of_the_same_name() -> None:
    assert issubclass(Ours, Stock)
    assert Ours.__qualname__ == Ours.__name__ == "ModelCheckpoint"
    assert Ours.__module__ == "asyncckpt.lightning"
    assert "save_best" in (inspect.getdoc(Ours) or "")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        ARGUMENTS,
        {"every_n_train_steps": 7},
        {"train_time_interval": timedelta(minutes=1)},
        {"save_best": True, "log_cost": True},
    ],
)
def test_its_state_has_the_key_of_the_stock_callback(arguments: dict[str, Any]) -> None:
    stock = {name: value for name, value in arguments.items() if name in ARGUMENTS}
    assert Ours(**arguments).state_key == Stock(**stock).state_key


def test_one_with_a_link_to_the_best_has_a_key_of_its_own() -> None:
    callback = ModelCheckpointWithLinkBest(True, "somewhere")  # noqa: FBT003 - save_best is its first
    assert callback.state_key.startswith("ModelCheckpointWithLinkBest{")
    assert callback.save_best == "link"
    assert str(callback.dirpath).endswith("/somewhere")


def test_trainers_take_it_for_their_checkpoint_callback_and_call_it_last(tmp_path: Path) -> None:
    ours, stopping = Ours(tmp_path), EarlyStopping("val_loss")
    a_trainer = trainer(ours, stopping, Callback())
    assert a_trainer.callbacks[-1] is ours
    assert a_trainer.checkpoint_callback is ours
    assert a_trainer.checkpoint_callbacks == [ours]


def test_it_works_beside_the_stock_callback(tmp_path: Path) -> None:
    ours = Ours(tmp_path, "ours-{epoch}", monitor="val_loss")
    stock = Stock(tmp_path, "stock-{epoch}")
    trainer(ours, stock, max_epochs=2).fit(Model((0.5, 0.7)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours-epoch=0.ckpt", "stock-epoch=1.ckpt"]
    state = torch.load(stock.best_model_path, weights_only=False)["callbacks"]
    assert state[ours.state_key]["best_model_path"] == ours.best_model_path


def test_two_of_one_key_are_refused_whichever_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ModelCheckpoint`"):
        trainer(Ours(tmp_path), Stock(tmp_path))


# Arguments


def test_it_takes_the_same_arguments_in_the_same_order() -> None:
    assert list(inspect.signature(Stock).parameters) == list(ARGUMENTS)
    values = ARGUMENTS.values()
    assert_same(attributes(Ours(*values)), attributes(Stock(*values)))
    assert_same(attributes(Ours(**ARGUMENTS)), attributes(Stock(**ARGUMENTS)))
    assert_same(attributes(Ours()), attributes(Stock()))


def test_its_signature_is_that_of_the_stock_callback_and_ours_by_keyword() -> None:
    ours, stock = inspect.signature(Ours).parameters, inspect.signature(Stock).parameters
    assert list(ours) == [*stock, "save_best", "log_cost", "overlap"]
    assert [ours[name].default for name in stock] == [parameter.default for parameter in stock.values()]
    assert [ours[name].kind for name in stock] == [parameter.kind for parameter in stock.values()]
    hints, expected = get_type_hints(Ours.__init__), get_type_hints(Stock.__init__)
    assert {name: hints[name] for name in expected} == expected
    assert hints["log_cost"] is bool
    assert "link" in str(hints["save_best"])
    assert ours["save_last"].annotation == stock["save_last"].annotation
    assert "save_top_k: int = 1" in pydoc.render_doc(Ours)


def test_links_are_made_without_an_instance_as_in_the_stock_callback(tmp_path: Path) -> None:
    assert isinstance(inspect.getattr_static(Ours, "_link_checkpoint"), staticmethod)
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").mkdir()
    Ours._link_checkpoint(mock.Mock(), str(tmp_path / "file"), str(tmp_path / "link"))
    assert str((tmp_path / "link").readlink()) == "file"


@pytest.mark.parametrize("arguments", [{}, {"save_best": "link", "log_cost": True, "monitor": "loss"}])
def test_a_pickled_copy_equals_the_callback_before_use(arguments: dict[str, Any], tmp_path: Path) -> None:
    callback = Ours(tmp_path, **arguments)
    assert vars(pickle.loads(pickle.dumps(callback))) == vars(callback)


@pytest.mark.parametrize("name", ["ModelCheckpoint", "ModelCheckpointWithLinkBest"])
def test_a_command_line_knows_all_of_its_arguments(name: str, tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Stock, "checkpoint")
    line = [f"--checkpoint=asyncckpt.lightning.{name}"]
    given = ARGUMENTS | {"dirpath": str(tmp_path), "save_best": True}
    line += [f"--checkpoint.{key}={'null' if value is None else value}" for key, value in given.items()]
    found = parser.instantiate(parser.parse_args(line)).checkpoint
    assert type(found).__name__ == name
    assert_same(attributes(found), attributes(Stock(**(ARGUMENTS | {"dirpath": str(tmp_path)}))))
    assert found.save_best == ("link" if name.endswith("Best") else True)
    with pytest.raises(Exception, match="save_top_k"):
        parser.parse_args([line[0], "--checkpoint.save_top_k=many"])


@pytest.mark.parametrize(
    "arguments",
    [
        {"save_top_k": -2},
        {"every_n_train_steps": -1},
        {"every_n_epochs": -1},
        {"every_n_train_steps": 1, "every_n_epochs": 1},
        {"every_n_train_steps": 1, "train_time_interval": timedelta(0)},
        {"every_n_epochs": 1, "train_time_interval": timedelta(0)},
        {"save_top_k": 2},
        {"mode": "best"},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_in_the_same_words(arguments: dict[str, Any]) -> None:
    found = raised(Ours, **arguments)
    assert found == raised(Stock, **arguments)
    assert found[0] is MisconfigurationException


def test_an_unknown_argument_is_a_type_error() -> None:
    assert raised(Ours, save_top=1) == raised(Stock, save_top=1)
    assert raised(Ours, *ARGUMENTS.values(), 1) == raised(Stock, *ARGUMENTS.values(), 1)


@pytest.mark.parametrize("value", ["copy", 2, [], "Link"])
def test_save_best_is_none_a_bool_or_link(value: Any) -> None:
    with pytest.raises(ValueError, match="save_best must be None, True, False or"):
        Ours(save_best=value)


def test_links_to_the_best_are_refused_where_there_are_none() -> None:
    callback = Ours("memory://nowhere", save_best="link")
    with pytest.raises(ValueError, match=r"save_best='link'.*`dirpath=memory://nowhere`"):
        trainer(callback).fit(Model())


# State


def test_its_state_has_nine_keys(tmp_path: Path) -> None:
    callback = Ours(tmp_path, monitor="val_loss", save_best="link", log_cost=True)
    assert list(callback.state_dict()) == KEYS
    trainer(callback, max_epochs=1).fit(Model())
    assert list(callback.state_dict()) == KEYS


@pytest.mark.parametrize("kinds", [(Stock, Ours), (Ours, Stock)], ids=["to ours", "from ours"])
def test_the_state_of_either_is_loaded_by_the_other(
    kinds: tuple[type[Stock], type[Stock]], tmp_path: Path
) -> None:
    state = trained(kinds[0], tmp_path).state_dict()
    callback = kinds[1](tmp_path, monitor="val_loss")
    callback.load_state_dict(state)
    assert_same(callback.state_dict() | {"current_score": None}, state | {"current_score": None})


def test_in_another_directory_only_the_best_path_is_loaded_and_a_warning_says_so(tmp_path: Path) -> None:
    state = trained(Ours, tmp_path / "one").state_dict()
    found = []
    for kind in (Ours, Stock):
        callback = kind(tmp_path / "other", monitor="val_loss")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            callback.load_state_dict(state)
        found.append((callback.state_dict(), [(w.category, str(w.message)) for w in warned]))
    assert_same(found[0], found[1])
    assert found[0][0]["best_model_path"] == state["best_model_path"]
    assert found[0][0]["best_k_models"] == {}
    assert len(found[0][1]) == 1


def test_to_yaml_writes_the_scores_that_the_stock_callback_writes(tmp_path: Path) -> None:
    texts = []
    for kind in (Stock, Ours):
        callback = trained(kind, tmp_path / "run")
        callback.to_yaml()
        callback.to_yaml(tmp_path / "given.yaml")
        texts.append((tmp_path / "run" / "best_k_models.yaml").read_text())
        assert (tmp_path / "given.yaml").read_text() == texts[-1]
        (tmp_path / "run").rename(tmp_path / kind.__module__)
    assert texts[0] == texts[1]
    assert "epoch=0-step=4.ckpt: 0.5" in texts[0]


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))],
    ids=["copy", "pickle"],
)
def test_a_copy_made_before_or_after_training_trains_on_its_own(duplicate: Any, tmp_path: Path) -> None:
    original = Ours(tmp_path, monitor="val_loss", save_last=True, save_best="link", log_cost=True)
    before = duplicate(original)
    assert_same(attributes(before), attributes(original))
    trainer(before, max_epochs=1).fit(Model((0.5,)))
    after = duplicate(before)
    assert_same(attributes(after), attributes(before))
    assert (after.save_best, after.log_cost) == ("link", True)
    trainer(after, max_epochs=2).fit(Model((0.4, 0.3)))
    assert after.best_model_path == str(tmp_path / "epoch=1-step=8.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.ckpt",
        "epoch=1-step=8.ckpt",
        "last.ckpt",
    ]
    assert original.best_k_models == {}
    assert before.best_model_path == str(tmp_path / "epoch=0-step=4.ckpt")


def test_a_copy_made_while_a_save_is_pending_has_nothing_to_do_with_it(tmp_path: Path) -> None:
    class Copying(Callback):
        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 1:
                gate.wait_for_arrival()
                try:
                    copies.extend([copy.deepcopy(original), pickle.loads(pickle.dumps(original))])
                finally:
                    gate.open()

    copies: list[Ours] = []
    gate = Gate()
    io = StoreIO(lambda store: SlowStore(store, gates={"commit": gate}))
    original = Ours(tmp_path / "original", monitor="val_loss")
    trainer(original, Copying(), plugins=[io], max_epochs=2).fit(Model((0.5,)))
    for number, copied in enumerate(copies):
        assert copied.best_model_path == str(tmp_path / "original" / "epoch=0-step=4.ckpt")
        copied.dirpath = str(tmp_path / str(number))
        trainer(copied, max_epochs=2).fit(Model((0.4,)))  # its first epoch ends at the step that was saved
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == ["epoch=1-step=8.ckpt"]
    assert [path.name for path in (tmp_path / "original").iterdir()] == ["epoch=0-step=4.ckpt"]
    assert len(copies) == 2


def test_a_subclass_of_it_may_override_what_the_stock_callback_calls(tmp_path: Path) -> None:
    calls: dict[type, list[Any]] = {}

    def overriding(base: Any) -> Stock:
        class Mine(base):  # type: ignore[misc]
            def format_checkpoint_name(self, *args: Any, **kwargs: Any) -> str:
                return str(super().format_checkpoint_name(*args, **kwargs)).replace("epoch", "Epoch")

            def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
                calls.setdefault(base, []).append(("save", filepath))
                super()._save_checkpoint(trainer, filepath)

            def _remove_checkpoint(self, trainer: Any, filepath: str) -> None:
                calls.setdefault(base, []).append(("remove", filepath))
                super()._remove_checkpoint(trainer, filepath)

            def check_monitor_top_k(self, trainer: Any, current: Any = None) -> bool:
                return bool(current < 0.6 and super().check_monitor_top_k(trainer, current))

        mine: Stock = Mine(tmp_path / "run", monitor="val_loss", save_last=True)
        return mine

    found = []
    for base in (Stock, Ours):
        callback = overriding(base)
        trainer(callback).fit(Model((0.5, 0.7, 0.3)))
        found.append((attributes(callback), sorted(path.name for path in (tmp_path / "run").iterdir())))
        (tmp_path / "run").rename(tmp_path / base.__module__)
    assert_same(found[1], found[0])
    assert calls[Ours] == calls[Stock]


def test_a_subclass_of_it_may_save_before_the_first_checkpoint_is_due(tmp_path: Path) -> None:
    def saving_early(base: Any) -> Stock:
        class Mine(base):  # type: ignore[misc]
            def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
                if trainer.global_step == 1:
                    self._save_checkpoint(trainer, str(tmp_path / "run" / "extra.ckpt"))

        mine: Stock = Mine(tmp_path / "run", save_last=True)
        return mine

    found = []
    for base in (Stock, Ours):
        callback = saving_early(base)
        trainer(callback).fit(Model())
        found.append((attributes(callback), sorted(path.name for path in (tmp_path / "run").iterdir())))
        (tmp_path / "run").rename(tmp_path / base.__module__)
    assert_same(found[1], found[0])
    assert "extra.ckpt" in found[1][1]


def test_saves_go_through_the_trainer_where_a_mock_catches_them(tmp_path: Path) -> None:
    found = []
    for kind in (Stock, Ours):
        callback = kind(tmp_path / "run", monitor="val_loss", save_last=True, save_weights_only=True)
        a_trainer = trainer(callback)
        a_trainer.save_checkpoint = mock.Mock()
        a_trainer.fit(Model((0.5, 0.7, 0.3)))
        found.append((a_trainer.save_checkpoint.call_args_list, attributes(callback)))
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == 4
    assert_same(found[1][1], found[0][1])
    assert not (tmp_path / "run").exists()
