"""Folders restored into live states of one process, and found among the checkpoints of a series."""

from __future__ import annotations

import copy
import errno
import gc
import shutil
from contextlib import asynccontextmanager
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch import nn

import asyncckpt
from asyncckpt import (
    Checkpointer,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StateMismatchError,
    StoreError,
)
from asyncckpt._loading.folder import open_folder
from asyncckpt._loading.folder_index import cover_problem
from asyncckpt._loading.folder_restore import FolderPlan
from asyncckpt._saving.engine import get_engine
from asyncckpt.stores import LocalStore
from folders import DATA, change_metadata, save_by_stock, save_described, some_state
from sameness import assert_same
from support import flip

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from asyncckpt.stores.base import OpenFile, StoredFile


def restored(path: Path, live: Any, **options: Any) -> Any:
    with Checkpointer(path.parent, create=False) as checkpointer:
        checkpointer.restore(live, path, **options)
    return live


def test_raw_states_get_everything_in_place(tmp_path: Path) -> None:
    live = some_state(2)
    weight, groups, item = live["model"]["weight"], live["opt"]["param_groups"], live["list"][1]
    restored(save_by_stock(tmp_path / "saved", some_state(1)), live)
    assert_same(live, some_state(1))  # the keys of the optimizer's state are numbers still
    assert live["model"]["weight"] is weight
    assert live["opt"]["param_groups"] is groups
    assert live["list"][1] is item


def test_objects_get_their_states_and_values_reach_the_live_dict(tmp_path: Path) -> None:
    def program(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * seed, momentum=0.9)
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=seed)
        nested = {"scheduler": scheduler, "epoch": seed, 3: {"best": seed / 2}, "none": {}}
        return {"model": model, "optimizer": optimizer, "nested": nested, "seen": [seed]}

    def states(program: dict[str, Any]) -> dict[str, Any]:
        nested = program["nested"]
        return program | {
            "model": program["model"].state_dict(),
            "optimizer": program["optimizer"].state_dict(),
            "nested": nested | {"scheduler": nested["scheduler"].state_dict()},
        }

    saved, live = program(1), program(2)
    nested = live["nested"]
    # As asyncckpt collects it: the optimizer's state by the names of its parameters.
    from asyncckpt._sharding.states import collect_sharded  # noqa: PLC0415 - imports DCP

    restored(save_by_stock(tmp_path / "saved", collect_sharded(saved)[0]), live)
    assert_same(states(live), states(saved))
    assert live["nested"] is nested


def test_dtypes_are_converted_as_for_files(tmp_path: Path) -> None:
    path = save_by_stock(tmp_path / "saved", {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)})
    live = {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(2, dtype=torch.float64)}
    restored(path, live)
    assert live["a"].equal(torch.arange(6).reshape(2, 3).bfloat16())
    assert live["b"].equal(torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([True, False]),
        torch.tensor([1, 2, 40000], dtype=torch.uint16),
        torch.randn(3, 2).to(torch.float8_e4m3fn),
        torch.randn(3, dtype=torch.complex64),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 3).t(),
        torch.randn(6)[::2],
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.ones(1, 3).expand(4, 3),
        torch.randn(3, dtype=torch.complex64).conj(),
    ],
)
def test_tensors_of_every_kind(tmp_path: Path, tensor: torch.Tensor) -> None:
    path = save_by_stock(tmp_path / "saved", {"t": tensor, "in a tuple": (tensor, 1)})
    for found in (asyncckpt.load(path), restored(path, {"t": torch.zeros_like(tensor), "in a tuple": ()})):
        assert found["t"].dtype is tensor.dtype
        assert found["t"].shape == tensor.shape
        assert torch.equal(found["t"].to(torch.complex64), tensor.to(torch.complex64))


def test_what_does_not_fit_is_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    path = save_by_stock(tmp_path / "saved", some_state())
    live = some_state(2)
    live["model"]["weight"] = torch.zeros(4, 3)
    live["large"] = torch.zeros(300, 200, device="meta")
    live["model"]["more"] = torch.zeros(1)
    live["list"] = live["list"][:2]
    del live["empty"]
    live["count"] = 1
    live["step"] = torch.zeros(2)
    live["history"] = {"a": torch.zeros(1)}
    expected = copy.deepcopy(live)
    with pytest.raises(StateMismatchError) as raised:
        restored(path, live)
    lines = str(raised.value).splitlines()[1:]
    entries = ("list", "large", "step", "history", "count", "empty")
    wanted = [
        *(f'state["{entry}"]' for entry in entries),
        'state["model"]["more"]',
        'state["model"]["weight"]',
    ]
    assert sorted(line.partition(":")[0].strip() for line in lines) == sorted(wanted)
    del live["large"], expected["large"]
    assert_same(live, expected)


def test_restore_in_part_reads_nothing_else(tmp_path: Path) -> None:
    path = save_by_stock(tmp_path / "saved", some_state() | {"object": PurePosixPath("x")})
    live = {"model": some_state(2)["model"], "more": 1}
    with pytest.warns(
        UserWarning, match=r'(?s)left as they are: state\["more"\].*not taken: .*state\["object"\]'
    ):
        restored(path, live, strict=False)  # weights_only would refuse the object
    assert_same(live, {"model": some_state(1)["model"], "more": 1})


def test_map_keys_for_dicts_of_tensors(tmp_path: Path) -> None:
    saved = {"model": {f"module.{key}": value for key, value in some_state()["model"].items()}}
    path = save_by_stock(tmp_path / "saved", saved)
    live = {"model": some_state(2)["model"]}
    with pytest.raises(StateMismatchError, match="map_keys"):
        restored(path, live)
    restored(path, live, map_keys=lambda key: key.removeprefix("module."))
    assert_same(live, {"model": some_state(1)["model"]})


def test_restore_leaves_nothing_to_the_collection_of_garbage(tmp_path: Path) -> None:
    path = save_by_stock(tmp_path / "saved", {"a": torch.ones(2)})
    gc.collect()
    gc.disable()
    try:
        restored(path, {"a": torch.zeros(2)})
        assert not [found for found in gc.get_objects() if type(found) is FolderPlan]
    finally:
        gc.enable()


def test_rank_states(tmp_path: Path) -> None:
    saved = {"a": torch.ones(2), "n": 5, "rank_state": {"0": {"seed": 3, "rng": torch.arange(4)}}}
    path = save_by_stock(tmp_path / "saved", saved)
    rank_state = {"seed": 0, "rng": torch.zeros(4, dtype=torch.int64)}
    for options in ({"rank_state": rank_state}, {}):  # it may be left out
        live = {"a": torch.zeros(2), "n": 0}
        restored(path, live, **options)
        assert_same(live, {"a": torch.ones(2), "n": 5})
    assert_same(rank_state, {"seed": 3, "rng": torch.arange(4)})


def test_rank_states_of_another_number_of_ranks_are_left_alone(tmp_path: Path) -> None:
    saved = {"a": torch.ones(2), "rank_state": {"0": {"seed": 3}, "1": {"seed": 4}}}
    path = save_by_stock(tmp_path / "saved", saved)
    rank_state, live = {"seed": 0}, {"a": torch.zeros(2)}
    with pytest.warns(UserWarning, match="for each of 2 ranks, and is restored on 1; the rank_state is left"):
        restored(path, live, rank_state=rank_state)
    assert rank_state == {"seed": 0}
    assert live["a"].equal(torch.ones(2))


def test_rank_state_that_is_not_in_the_checkpoint_is_left_alone(tmp_path: Path) -> None:
    path = save_by_stock(tmp_path / "saved", {"a": torch.ones(2)})
    rank_state, live = {"seed": 0}, {"a": torch.zeros(2)}
    with pytest.warns(UserWarning, match="saved has no rank_state, which is left as it is"):
        restored(path, live, rank_state=rank_state)
    assert rank_state == {"seed": 0}
    assert live["a"].equal(torch.ones(2))


def test_paths_of_folders_may_end_with_a_slash(tmp_path: Path) -> None:
    path = f"{save_by_stock(tmp_path / 'saved', {'a': 1})}/"
    assert asyncckpt.load(path) == {"a": 1}
    live = {"a": 0}
    with Checkpointer(tmp_path, create=False) as checkpointer:
        assert checkpointer.load(path) == {"a": 1}
        checkpointer.restore(live, path)
    assert live == {"a": 1}


class Disturbed(LocalStore):
    """A directory whose folders cannot be looked at, or whose marks cannot be opened at first."""

    errors: ClassVar[list[OSError]] = []

    async def stat(self, name: str) -> StoredFile:
        if name == ".metadata" and self.errors and isinstance(self.errors[0], StoreError):
            raise self.errors[0]
        return await super().stat(name)

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[OpenFile]:
        if name == ".metadata" and self.errors:
            raise self.errors.pop()
        async with super().open(name) as file:
            yield file

    def folder(self, name: str) -> Disturbed:
        return Disturbed(self.path_of(name))


def test_folder_that_cannot_be_looked_at_is_not_taken_for_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_by_stock(tmp_path / "saved", {"a": 1})
    with Checkpointer(store=Disturbed(str(tmp_path)), create=False) as checkpointer:
        monkeypatch.setattr(Disturbed, "errors", [StoreError(errno.EIO, "the network is down")])
        for call in (checkpointer.load, partial(checkpointer.restore, {"a": 0}, missing_ok=True)):
            with pytest.raises(StoreError, match="the network is down"):
                call(which=path.name)


def test_folder_that_is_replaced_while_its_mark_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_by_stock(tmp_path / "saved", {"a": 1})
    replaced = [FileNotFoundError(errno.ENOENT, "replaced while it was read") for _ in range(2)]
    live = {"a": 0}
    with Checkpointer(store=Disturbed(str(tmp_path)), create=False) as checkpointer:
        monkeypatch.setattr(Disturbed, "errors", replaced)
        checkpointer.restore(live, path.name)
    assert live == {"a": 1}
    assert not Disturbed.errors


@pytest.mark.parametrize("best", [None, 1.5])
def test_entries_that_are_none(tmp_path: Path, best: float | None) -> None:
    path = save_by_stock(tmp_path / "saved", {"best": best, "deep": [torch.ones(1), best]})
    live = {"best": None, "deep": [torch.zeros(1), None]}
    restored(path, live)
    assert_same(live, {"best": best, "deep": [torch.ones(1), best]})


def test_optimizer_with_other_parameter_groups_is_a_mismatch(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    opt = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    opt.step()
    with Checkpointer(tmp_path, sharded=True) as checkpointer:
        checkpointer.save(1, {"model": model, "opt": opt})
    other = nn.Linear(2, 2)
    before = copy.deepcopy(other.state_dict())
    parts: list[dict[str, Any]] = [{"params": [other.weight]}, {"params": [other.bias]}]
    messages = ["only in the checkpoint bias", "1 groups in the checkpoint, 2 in the optimizer"]
    for count, message in enumerate(messages, 1):
        live = {"model": other, "opt": torch.optim.SGD(parts[:count], lr=0.1, momentum=0.9)}
        with pytest.raises(StateMismatchError, match=message):
            restored(tmp_path / "step-00000001", live)
        assert_same(other.state_dict(), before)


def test_map_location(tmp_path: Path) -> None:
    path = save_by_stock(tmp_path / "saved", some_state())
    for place in ("meta", torch.device("meta"), {"cpu": "meta"}):
        loaded = asyncckpt.load(path, map_location=place)
        assert loaded["large"].is_meta
        assert loaded["large"].shape == (300, 200)
    seen = []

    def keep(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        seen.append((storage.nbytes(), location))
        return storage

    assert_same(asyncckpt.load(path, map_location=keep), asyncckpt.load(path))
    assert (300 * 200 * 4, "cpu") in seen


def test_folders_of_a_series_are_found(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_described(tmp_path, step, {"a": torch.full((2,), float(step))}, metrics={"loss": abs(step - 2)})
    save_by_stock(tmp_path / "foreign", {"a": torch.zeros(2)})
    with Checkpointer(tmp_path, create=False) as checkpointer:
        found = checkpointer.checkpoints()
        assert [(c.step, c.path) for c in found] == [(s, str(tmp_path / f"step-{s:08d}")) for s in (1, 2, 3)]
        assert all(c.nbytes > 1000 for c in found)
        assert checkpointer.latest() == found[2]
        best = checkpointer.best("loss")
        assert best == found[1]
        live = {"a": torch.zeros(2)}
        assert checkpointer.restore(live) == found[2]
        assert live["a"].equal(torch.full((2,), 3.0))
        assert checkpointer.load(1)["a"].equal(torch.ones(2))
        assert checkpointer.load("foreign")["a"].equal(torch.zeros(2))
        checkpointer.verify(2)
        with pytest.raises(CheckpointNotFoundError, match="foreign"):
            checkpointer.load(9)
        shutil.copytree(tmp_path / "step-00000001", tmp_path / "copy")
        assert checkpointer.checkpoints() == found


def test_files_and_folders_are_one_series(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": 1})
        checkpointer.wait()
        save_described(tmp_path, 2, {"a": 2}, sequence=2)
        assert [c.step for c in checkpointer.checkpoints()] == [1, 2]
        assert checkpointer.load() == {"a": 2}
        assert checkpointer.load(1) == {"a": 1}


@pytest.mark.parametrize("name", [DATA, ".metadata"])
def test_fallback_from_a_damaged_folder(tmp_path: Path, name: str) -> None:
    for step in (1, 2):
        save_described(tmp_path, step, {"a": torch.full((500,), float(step)), "b": step})
    damaged = tmp_path / "step-00000002" / name
    flip(damaged, damaged.stat().st_size // 2)
    live = {"a": torch.zeros(500), "b": 0}
    with Checkpointer(tmp_path, create=False) as checkpointer:
        with pytest.raises(CorruptCheckpointError, match="fallback=True"):
            checkpointer.restore(live)
        assert_same(live, {"a": torch.zeros(500), "b": 0})
        with pytest.warns(UserWarning, match="step-00000001 is used"):
            checkpoint = checkpointer.restore(live, fallback=True)
        assert checkpoint is not None
        assert checkpoint.step == 1
        assert_same(live, {"a": torch.ones(500), "b": 1})


def test_folder_that_is_replaced_while_it_is_read_is_not_mixed(tmp_path: Path) -> None:
    path = save_by_stock(tmp_path / "saved", {"a": torch.ones(2)})
    call = get_engine().call
    with Checkpointer(tmp_path, create=False) as checkpointer:  # keeps the engine
        folder = call(open_folder, LocalStore(str(tmp_path)), "saved")
        shutil.rmtree(path)
        save_by_stock(path, {"a": torch.zeros(2)})
        with pytest.raises(CheckpointNotFoundError, match="was replaced while it was read"):
            call(folder.read, folder.index.places)
        assert checkpointer.load(path)["a"].equal(torch.zeros(2))
        shutil.rmtree(path)
        with pytest.raises(CheckpointNotFoundError, match="was removed while it was read"):
            call(folder.read, folder.index.places)


def test_old_flat_states_are_nested_by_no_path(tmp_path: Path) -> None:
    path = save_by_stock(tmp_path / "saved", {"a.b": torch.ones(2), "c": 1})

    def change(metadata: Any) -> None:
        metadata.planner_data = None

    change_metadata(path, change)
    assert_same(asyncckpt.load(path), {"a.b": torch.ones(2), "c": 1})


def test_boxes_that_cover_a_tensor() -> None:
    grid = [((i, j), (min(2, 5 - i), min(3, 7 - j))) for i in range(0, 5, 2) for j in range(0, 7, 3)]
    assert cover_problem((5, 7), grid) is None
    assert cover_problem((5, 7), [*grid, ((5, 0), (0, 7))]) is None
    assert cover_problem((), [((), ())]) is None
    assert cover_problem((), [((), ()), ((), ())]) == "have 2 of its 1 elements"
    assert cover_problem((2,), [((0,), (1,)), ((0,), (1,))]) == "overlap"
    assert cover_problem((0, 3), []) is None
