"""Several series in one directory; wrong names, damaged and foreign files."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncckpt import (
    BestK,
    Checkpointer,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EveryN,
    KeepAll,
    LastN,
    StoreError,
)
from asyncckpt.layout.description import Description
from asyncckpt.stores.local import LocalStore
from asyncckpt.testing import Gate
from file_operations import FaultyOps
from support import flip, payload_offset

if TYPE_CHECKING:
    from pathlib import Path

    from asyncckpt import Checkpoint


def state_of(value: float) -> dict[str, Any]:
    return {"w": torch.full((9,), float(value))}


def save(ckpt: Checkpointer, step: int, **metrics: float) -> None:
    ckpt.save(step, state_of(step), metrics=metrics).committed.result(30)
    ckpt.wait()


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def steps(ckpt: Checkpointer) -> list[int | None]:
    return [checkpoint.step for checkpoint in ckpt.checkpoints()]


class TestSeries:
    def test_eviction_leaves_other_series_alone(self, tmp_path: Path) -> None:
        best = Checkpointer(tmp_path, filename="best-{step}.pt", keep=KeepAll())
        plain = Checkpointer(tmp_path, filename="{step}.pt", keep=LastN(1))
        for step in (1, 2, 3):
            save(best, step)
            save(plain, step)
        assert names(tmp_path) == ["3.pt", "best-1.pt", "best-2.pt", "best-3.pt"]

    @pytest.mark.parametrize("other", ["{step}-{step}.pt", "{step:03d}.pt", "{loss:.0f}.pt", "{step}.pt.bak"])
    def test_eviction_is_exact_where_names_are_alike(self, tmp_path: Path, other: str) -> None:
        kept = Checkpointer(tmp_path, filename=other)
        evicting = Checkpointer(tmp_path, filename="{step}.pt", keep=LastN(1))
        save(kept, 1, loss=7.0)
        for step in (20, 21, 22):
            save(evicting, step)
        assert steps(kept) == [1]
        assert steps(evicting) == [22]
        assert len(names(tmp_path)) == 2

    def test_files_without_a_template_belong_to_the_series_that_makes_their_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encode = Description.encode
        with monkeypatch.context() as patch:  # as versions did that had no series
            patch.setattr(
                Description, "encode", lambda self: encode(self).replace(b'"filename": ', b'"was": ')
            )
            for name in ("best-{step}.pt", "{step}.pt"):
                for step in (1, 2):
                    save(Checkpointer(tmp_path, filename=name), step)
        with Checkpointer(tmp_path, filename="{step}.pt", keep=LastN(1)) as ckpt:
            assert steps(ckpt) == [1, 2]
            save(ckpt, 3)
        assert names(tmp_path) == ["3.pt", "best-1.pt", "best-2.pt"]

    def test_a_copy_under_another_name_is_never_evicted_or_listed(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, filename="{step}.pt", keep=LastN(1)) as ckpt:
            save(ckpt, 1)
            shutil.copy(tmp_path / "1.pt", tmp_path / "keep.pt")
            save(ckpt, 2)
            save(ckpt, 3)
            assert steps(ckpt) == [3]
            assert ckpt.load("keep.pt")["w"][0] == 1
        assert names(tmp_path) == ["3.pt", "keep.pt"]

    def test_reading_sees_one_series(self, tmp_path: Path) -> None:
        model = Checkpointer(tmp_path, filename="model-{step}.pt", keep=KeepAll() | BestK(1, "loss"))
        ema = Checkpointer(tmp_path, filename="ema-{step}.pt")
        model.save(1, state_of(1), metrics={"loss": 0.5}).committed.result(30)
        ema.save(1, state_of(-1), metrics={"loss": 0.1}).committed.result(30)
        ema.save(2, state_of(-2)).committed.result(30)
        assert [len(ckpt.checkpoints()) for ckpt in (model, ema)] == [1, 2]
        for which in ("latest", "best", 1):
            live = state_of(0)
            found = model.restore(live, which)
            assert found is not None
            assert found.path.endswith("model-1.pt")
            assert live["w"][0] == 1
            assert model.load(which)["w"][0] == 1
        assert model.load("ema-2.pt")["w"][0] == -2
        with pytest.raises(CheckpointNotFoundError, match=r"no step 2 named 'model-\{step\}\.pt'.*ema-2\.pt"):
            model.load(2)

    def test_nothing_to_restore_beside_another_series_is_warned_of(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, filename="old-{step}.pt") as ckpt:
            save(ckpt, 5)
        ckpt = Checkpointer(tmp_path, filename="new-{step}.pt")
        with pytest.warns(
            UserWarning, match=r"nothing is restored: .*also holds old-5\.pt.*filename"
        ) as told:
            assert ckpt.restore(state_of(0), missing_ok=True) is None
        assert told[0].filename == __file__

    def test_nothing_to_restore_in_an_empty_directory_is_not_warned_of(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").touch()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Checkpointer(tmp_path).restore(state_of(0), missing_ok=True) is None

    def test_files_of_torch_save_are_warned_of_and_not_overwritten(self, tmp_path: Path) -> None:
        torch.save(state_of(3), tmp_path / "ckpt_003.pth")
        ckpt = Checkpointer(tmp_path, filename="ckpt_{step:03d}.pth")
        with pytest.warns(UserWarning, match=r"ckpt_003\.pth.*asyncckpt adopt"):
            ckpt.restore(state_of(0), missing_ok=True)
        with pytest.raises(
            CheckpointExistsError, match=r"ckpt_003\.pth is damaged or was not written by asyncckpt"
        ):
            ckpt.save(3, state_of(3)).committed.result(30)


class TestMetrics:
    @pytest.mark.parametrize("given", ["val/loss", "valloss", "Val_Loss", "val-loss"])
    @pytest.mark.parametrize("keep", [BestK(3, "val_loss"), BestK(3, "val_loss") | LastN(2)])
    def test_a_wrong_name_is_refused_with_the_nearest(self, tmp_path: Path, given: str, keep: Any) -> None:
        with Checkpointer(tmp_path, keep=keep) as ckpt:
            with pytest.raises(ValueError, match=rf"'val_loss'.*did you mean '{re.escape(given)}'\?"):
                ckpt.save(1, {}, metrics={given: 1.0, "acc": 2.0})
            save(ckpt, 1, val_loss=1.0)
            assert steps(ckpt) == [1]

    @pytest.mark.parametrize("metrics", [{}, {"acc": 1.0}])
    def test_the_metric_is_required_where_it_alone_decides(
        self, tmp_path: Path, metrics: dict[str, float]
    ) -> None:
        with (
            Checkpointer(tmp_path, keep=BestK(3, "val_loss")) as ckpt,
            pytest.raises(ValueError, match="val_loss"),
        ):
            ckpt.save(1, {}, metrics=metrics)

    def test_the_error_of_a_missing_metric_names_the_nearest(self, tmp_path: Path) -> None:
        with (
            Checkpointer(tmp_path, keep=BestK(3, "val_loss")) as ckpt,
            pytest.raises(ValueError, match="did you mean 'vall_loss'"),
        ):
            ckpt.save(1, {}, metrics={"vall_loss": 1.0})

    @pytest.mark.parametrize(
        ("keep", "given"),
        [
            (BestK(1, "val_acc1", "max") | BestK(1, "val_acc5", "max"), "val_acc1"),
            (BestK(3, "val_loss_ema") | LastN(2), "val_loss"),
            (BestK(3, "val_f1") | LastN(2), "val_f2"),
        ],
    )
    def test_a_different_metric_with_a_similar_name_is_allowed(
        self, tmp_path: Path, keep: Any, given: str
    ) -> None:
        with Checkpointer(tmp_path, keep=keep) as ckpt:
            save(ckpt, 1, **{given: 1.0})
            assert steps(ckpt) == [1]

    def test_one_of_several_metrics_is_enough(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, keep=BestK(1, "loss") | BestK(1, "acc", "max")) as ckpt:
            save(ckpt, 1, loss=1.0)
            save(ckpt, 2, acc=1.0)
            save(ckpt, 3, acc=0.5)
            assert steps(ckpt) == [1, 2, 3]

    def test_the_metric_is_optional_beside_another_policy(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, keep=BestK(1, "loss") | EveryN(2)) as ckpt:
            save(ckpt, 1, loss=1.0)
            save(ckpt, 2)
            save(ckpt, 3, acc=0.5)
            save(ckpt, 4)
            assert steps(ckpt) == [1, 2, 4]


def damaged(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        flip(path, payload_offset(path, "data/0"))


@pytest.mark.parametrize("how", ["truncated", "flipped"])
class TestDamage:
    @pytest.fixture
    def ckpt(self, tmp_path: Path) -> Checkpointer:
        ckpt = Checkpointer(tmp_path, filename="{step}.pt", keep=KeepAll() | BestK(1, "loss"))
        for step in (1, 2, 3):
            save(ckpt, step, loss=-step)
        return ckpt

    def test_the_error_of_a_damaged_newest_names_the_next(
        self, tmp_path: Path, ckpt: Checkpointer, how: str
    ) -> None:
        damaged(tmp_path / "3.pt", how)
        live = state_of(0)
        for call in (ckpt.load, lambda: ckpt.restore(live), lambda: ckpt.restore(live, missing_ok=True)):
            with pytest.raises(CorruptCheckpointError, match=r"3\.pt.*fallback=True.*2\.pt"):
                call()
        assert live["w"][0] == 0

    def test_fallback_takes_the_newest_whole_one_with_a_warning(
        self, tmp_path: Path, ckpt: Checkpointer, how: str
    ) -> None:
        damaged(tmp_path / "3.pt", how)
        damaged(tmp_path / "2.pt", "flipped")
        live = state_of(0)
        with pytest.warns(UserWarning, match=r"1\.pt is used.*3\.pt.*2\.pt") as told:
            found = ckpt.restore(live, fallback=True)
        assert told[0].filename == __file__
        assert found is not None
        assert (found.step, live["w"][0]) == (1, 1)
        with pytest.warns(UserWarning, match=r"1\.pt is used"):
            assert ckpt.load(fallback=True)["w"][0] == 1

    def test_if_all_are_damaged_nothing_is_restored(
        self, tmp_path: Path, ckpt: Checkpointer, how: str
    ) -> None:
        for step in (1, 2, 3):
            damaged(tmp_path / f"{step}.pt", how)
        for fallback in (False, True):
            with pytest.raises(CorruptCheckpointError, match=r"3\.pt"):
                ckpt.restore(state_of(0), missing_ok=True, fallback=fallback)

    def test_a_damaged_older_one_does_not_prevent_loading_the_newest(
        self, tmp_path: Path, ckpt: Checkpointer, how: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        damaged(tmp_path / "1.pt", how)
        os.utime(tmp_path / "1.pt", (1, 1))
        with caplog.at_level(logging.WARNING, "asyncckpt"):
            assert ckpt.load()["w"][0] == 3
        assert ("1.pt" in caplog.text) == (how == "truncated")
        with pytest.raises(CorruptCheckpointError, match=r"1\.pt"):
            ckpt.load(1)

    def test_a_damaged_best_is_named(self, tmp_path: Path, ckpt: Checkpointer, how: str) -> None:
        damaged(tmp_path / "3.pt", how)
        if how == "flipped":
            with pytest.raises(CorruptCheckpointError, match=r"3\.pt.*fallback=True"):
                ckpt.load("best")
            with pytest.warns(UserWarning, match=r"2\.pt is used"):
                assert ckpt.load("best", fallback=True)["w"][0] == 2
        else:  # its metrics are not known any more
            assert ckpt.load("best")["w"][0] == 2


@pytest.mark.parametrize(
    "filename", ["s-{step:8d}.pt", "s-{step:_d}.pt", "s-{step:x}.pt", "s-{step:08d}-{loss:.1f}.pt"]
)
def test_a_damaged_newest_is_named_whatever_its_template(tmp_path: Path, filename: str) -> None:
    with Checkpointer(tmp_path, filename=filename) as ckpt:
        for step in (1, 2000):
            save(ckpt, step, loss=1.0)
        latest = ckpt.latest()
        assert latest is not None
        damaged(tmp_path / latest.path.rpartition("/")[2], "truncated")
        with pytest.raises(CorruptCheckpointError, match="fallback=True"):
            ckpt.load()


def test_a_newest_that_cannot_be_read_is_an_error_without_fallback(tmp_path: Path) -> None:
    ops = FaultyOps()
    with Checkpointer(tmp_path, filename="{step}.pt") as ckpt:
        for step in (1, 2):
            save(ckpt, step)
    ckpt = Checkpointer(store=LocalStore(str(tmp_path), ops), filename="{step}.pt")
    for call in (ckpt.load, lambda: ckpt.restore(state_of(0), missing_ok=True)):
        ops.fail("open", OSError(errno.EIO, "Input/output error"), where=lambda path: path.endswith("2.pt"))
        with pytest.raises(StoreError, match="the device that holds"):
            call()
        ops.fail("open", OSError(errno.EIO, "Input/output error"), where=lambda path: path.endswith("2.pt"))
        with pytest.warns(UserWarning, match=r"1\.pt is used"):
            assert ckpt.load(fallback=True)["w"][0] == 1
        assert ckpt.load()["w"][0] == 2


def test_fallback_is_refused_with_a_step_or_a_path(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as ckpt:
        save(ckpt, 1)
        for which in (1, "step-00000001.pt"):
            with pytest.raises(ValueError, match="fallback=True goes with"):
                ckpt.load(which, fallback=True)


def test_create_false_changes_nothing_before_the_first_save(tmp_path: Path) -> None:
    for url in (tmp_path / "runs" / "gtp", f"memory://{tmp_path}/gtp"):
        with pytest.raises(CheckpointNotFoundError, match=r"no directory .*gtp"):
            Checkpointer(url, create=False)
    assert not (tmp_path / "runs").exists()
    with Checkpointer(tmp_path / "run") as ckpt:
        save(ckpt, 1)
        leftover = tmp_path / "run" / ".x.pt.00000000.0123456789abcdef.asyncckpt-tmp"
        leftover.touch()
        reader = Checkpointer(tmp_path / "run", create=False)
        assert reader.load()["w"][0] == 1
        assert leftover.exists()
        save(reader, 2)
        assert not leftover.exists()


def test_commits_and_evictions_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Checkpoint] = []
    with (
        caplog.at_level(logging.DEBUG, "asyncckpt"),
        Checkpointer(tmp_path, filename="{step}.pt", keep=LastN(1), on_commit=told.append) as ckpt,
    ):
        made = [ckpt.save(step, state_of(step)).committed.result(30) for step in (1, 2)]
        ckpt.wait()
        assert repr(ckpt) == f"<Checkpointer '{tmp_path}' '{{step}}.pt': 1 checkpoints, 0 in flight>"
    assert told == made
    assert re.search(r"2\.pt is durable: \d+ bytes, stall 0\.\d+ s", caplog.text)
    evictions = [record for record in caplog.records if record.getMessage() == f"evicted {tmp_path}/1.pt"]
    assert [record.levelno for record in evictions] == [logging.DEBUG]


def test_a_failing_on_commit_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Checkpointer(tmp_path, on_commit=lambda _: 1 / 0) as ckpt:
        save(ckpt, 1)
        save(ckpt, 2)
    assert "a callback of a save failed" in caplog.text
    with pytest.raises(TypeError, match="on_commit must be a callable"):
        Checkpointer(tmp_path, on_commit="print")  # type: ignore[arg-type]


def test_a_name_that_is_looked_for_while_its_checkpoint_is_evicted(tmp_path: Path) -> None:
    class Removes(LocalStore):
        async def remove(self, name: str) -> None:
            await super().remove(name)
            await gate.passing()

    gate = Gate()
    with Checkpointer(store=Removes(str(tmp_path)), filename="e{epoch}.pt", keep=LastN(1)) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(step), metrics={"epoch": step}).committed.result(30)
        gate.wait_for_arrival()
        ckpt.save(3, state_of(3), metrics={"epoch": 1})
        gate.open()
        ckpt.wait()
        assert steps(ckpt) == [3]
