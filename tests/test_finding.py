"""List, find, keep and evict the checkpoints of a directory."""

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch

import asyncckpt
from asyncckpt import BestK, Checkpointer, CheckpointNotFoundError, KeepAll, LastN, SaveError, StoreError
from asyncckpt.testing import Gate
from support import faulty_store, flip, gated_store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from asyncckpt import Checkpoint, Policy


def save(ckpt: Checkpointer, step: int, **metrics: float) -> Checkpoint:
    """Save a state that is known by its step; returns when evictions are done, too."""
    checkpoint = ckpt.save(step, {"step": step, "w": torch.full((9,), step)}, metrics=metrics)
    ckpt.wait()
    return checkpoint.committed.result(0)


def steps(ckpt: Checkpointer) -> list[int | None]:
    return [checkpoint.step for checkpoint in ckpt.checkpoints()]


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_checkpoints_come_in_order_of_commit(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as ckpt:
        assert ckpt.checkpoints() == []
        assert ckpt.latest() is None
        made = [save(ckpt, step) for step in (5, 3, 9, 1)]
        assert ckpt.checkpoints() == made
        assert [checkpoint.sequence for checkpoint in made] == [1, 2, 3, 4]
        assert ckpt.latest() == made[-1]
        again = save(ckpt, 3)
        assert steps(ckpt) == [5, 9, 1, 3]
        assert ckpt.latest() == again


def test_a_second_checkpointer_continues(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as ckpt:
        made = [save(ckpt, step) for step in (10, 20)]
    with Checkpointer(tmp_path) as ckpt:
        assert ckpt.checkpoints() == made
        assert save(ckpt, 5).sequence == 3
        assert steps(ckpt) == [10, 20, 5]


@pytest.mark.parametrize(
    ("which", "step"),
    [("latest", 2), ("best", 3), (1, 1), (3, 3), ("step-00000001.pt", 1), ("elsewhere/x.pt", 7)],
)
def test_which_selects_a_checkpoint(tmp_path: Path, which: Any, step: int) -> None:
    with Checkpointer(tmp_path, keep=KeepAll() | BestK(1, "acc", mode="max")) as ckpt:
        for at, acc in ((1, 0.1), (3, 0.9), (2, 0.5)):
            save(ckpt, at, acc=acc)
        if which == "elsewhere/x.pt":
            which = tmp_path / which
            asyncckpt.save({"step": 7, "w": torch.ones(9)}, which)
        assert ckpt.load(which)["step"] == step
        ckpt.verify(which)
        state = {"step": 0, "w": torch.zeros(9)}
        found = ckpt.restore(state, which)
        assert found is not None
        assert state["step"] == step
        assert os.path.basename(found.path) == (  # noqa: PTH119 - a str
            "x.pt" if step == 7 else f"step-{step:08d}.pt"
        )


@pytest.mark.parametrize("which", ["latest", "best", 4, "absent.pt", "/absent/absent.pt"])
def test_a_missing_checkpoint_is_not_found(tmp_path: Path, which: Any) -> None:
    with Checkpointer(tmp_path, keep=KeepAll() | BestK(1, "acc")) as ckpt:
        if which == 4:
            save(ckpt, 3)
        for find in (ckpt.load, ckpt.verify, lambda which: ckpt.restore({}, which)):
            with pytest.raises(CheckpointNotFoundError, match=r"absent\.pt|holds no"):
                find(which)
        state = {"n": 1}
        assert ckpt.restore(state, which, missing_ok=True) is None
        assert state == {"n": 1}


@pytest.mark.parametrize("which", [None, True, 1.5, b"latest", ["latest"]])
def test_other_types_of_which_are_a_type_error(tmp_path: Path, which: Any) -> None:
    with Checkpointer(tmp_path) as ckpt, pytest.raises(TypeError, match='"latest", "best", a step or a path'):
        ckpt.load(which)


def test_load_takes_weights_only_and_map_location(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, {"where": tmp_path})
        assert ckpt.load(weights_only=False) == {"where": tmp_path}
        with pytest.raises(pickle.UnpicklingError):
            ckpt.load()
        ckpt.save(2, {"w": torch.ones(3)})
        assert ckpt.load(map_location="meta")["w"].is_meta


@pytest.mark.parametrize(
    "find", [lambda ckpt, _: ckpt.load()["x"], lambda _, path: asyncckpt.load(path)["x"]]
)
def test_loading_waits_for_what_is_pending(
    tmp_path: Path, find: Callable[[Checkpointer, Path], torch.Tensor]
) -> None:
    with Checkpointer(tmp_path) as ckpt:
        for value in range(10):
            save = ckpt.save(1, {"x": torch.full((100_000,), value)})
            assert find(ckpt, tmp_path / "step-00000001.pt")[-1] == value
            assert save.committed.done()


def test_best_ranks_by_its_arguments_or_by_keep(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=LastN(9) | BestK(9, "loss") | BestK(9, "acc", mode="max")) as ckpt:
        for step, loss, acc in ((1, 0.5, 0.9), (2, 0.3, 0.1), (3, float("nan"), 0.5)):
            save(ckpt, step, loss=loss, acc=acc)
        save(ckpt, 4)
        asked = (ckpt.best(), ckpt.best("loss", "max"), ckpt.best("acc", "max"), ckpt.best("f1"))
        assert [found and found.step for found in asked] == [2, 1, 1, None]
    with Checkpointer(tmp_path) as ckpt:
        found = ckpt.best("loss")
        assert found is not None
        assert found.step == 2
        with pytest.raises(ValueError, match=r"best\(\) needs a metric"):
            ckpt.best()


def test_a_run_keeps_its_best_and_its_last(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=BestK(2, "val/loss") | LastN(1)) as ckpt:
        kept = []
        for step, loss in enumerate([3.0, 1.0, float("nan"), 2.0, 4.0, float("nan")]):
            save(ckpt, step, **{"val/loss": loss})
            kept.append(steps(ckpt))
    assert kept == [[0], [0, 1], [0, 1, 2], [1, 3], [1, 3, 4], [1, 3, 5]]
    assert names(tmp_path) == [f"step-{step:08d}.pt" for step in (1, 3, 5)]


class KeepNothing:
    def keep(self, _: Sequence[Checkpoint], /) -> Sequence[Checkpoint]:
        return ()


@pytest.mark.parametrize("keep", [KeepNothing(), LastN(1), BestK(1, "loss")])
def test_the_newest_by_order_of_commit_stays(tmp_path: Path, keep: Policy) -> None:
    with Checkpointer(tmp_path, keep=keep) as ckpt:
        for step in (8, 4, 6):
            save(ckpt, step, loss=float("nan"))
            assert steps(ckpt) == [step]


@pytest.mark.parametrize("answer", [None, RuntimeError("out of ideas")])
def test_a_failing_policy_evicts_nothing_and_is_reported_once(tmp_path: Path, answer: Any) -> None:
    class Broken:
        def keep(self, _: Sequence[Checkpoint], /) -> Any:
            if answer is not None:
                raise answer
            return answer

    with Checkpointer(tmp_path, keep=Broken()) as ckpt:
        first = ckpt.save(1, {})
        with pytest.raises(SaveError, match=r"00000001\.pt is saved, but evicting older checkpoints failed"):
            ckpt.wait()
        ckpt.wait()
        assert first.committed.result(0).step == 1
        ckpt.save(2, {})
        with pytest.raises(SaveError, match="evicting older checkpoints failed"):
            ckpt.wait()
        assert steps(ckpt) == [1, 2]


def test_only_checkpoints_of_the_series_are_evicted(tmp_path: Path) -> None:
    asyncckpt.save({}, tmp_path / "step-00000000.pt").committed.result(60)
    torch.save({}, tmp_path / "step-00000001.pt")
    (tmp_path / "step-00000002.pt").write_text("notes")
    (tmp_path / "step-00000003.pt").mkdir()
    with Checkpointer(tmp_path, filename="other-{step}.pt") as other:
        save(other, 1)
        save(other, 2)
    before = names(tmp_path)
    with Checkpointer(tmp_path, keep=LastN(1)) as ckpt:
        for step in (11, 12, 13):
            save(ckpt, step)
        assert steps(ckpt) == [13]
    assert names(tmp_path) == sorted([*before, "step-00000013.pt"])


@pytest.mark.parametrize("keep", [LastN(1), BestK(1, "loss")])
def test_two_checkpointers_in_one_directory_never_evict_what_was_just_committed(
    tmp_path: Path, keep: Policy
) -> None:
    with Checkpointer(tmp_path, keep=keep) as one, Checkpointer(tmp_path, keep=keep) as two:
        sequences = []
        for step in range(1, 9):
            made = save((one, two, one, one, two, two, two, one)[step - 1], step, loss=float(step))
            sequences.append(made.sequence)
            assert one.latest() == two.latest() == made
            assert step in steps(one)
        assert sequences == sorted(set(sequences))


def test_the_order_of_commits_holds_across_checkpointers_with_saves_pending(tmp_path: Path) -> None:
    gate = Gate()
    store = gated_store(tmp_path, gate, "draft")
    with Checkpointer(store=store, max_in_flight=2) as one, Checkpointer(tmp_path, keep=LastN(1)) as two:
        pending = [one.save(1, {}), two.save(2, {}), one.save(3, {})]
        gate.open()
        assert [save.committed.result(60).sequence for save in pending] == [1, 2, 3]
        two.wait()
        assert steps(one) == [2, 3]


def damage_tail(path: Path) -> None:
    for offset in range(path.stat().st_size - 300, path.stat().st_size, 7):
        flip(path, offset)


def replace_with_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_description(path: Path) -> None:
    data = path.read_bytes()
    start = data.index(b'{"format": 1')
    path.write_bytes(data[:start] + data[start:].replace(b'"step": 2', b'"step":[]', 1))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x05\x06" + b"\xff" * 18),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0" * 10),
        lambda path: path.write_bytes(b"\0" * path.stat().st_size),
        damage_tail,
        replace_description,
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to("nowhere")),
        replace_with_pipe,
    ],
)
def test_a_damaged_file_does_not_hide_the_others(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    with Checkpointer(tmp_path) as ckpt:
        for step in (1, 2, 3):
            save(ckpt, step)
        damage(tmp_path / "step-00000002.pt")
        assert steps(ckpt) == [1, 3]
    with Checkpointer(tmp_path, keep=LastN(2)) as ckpt:
        assert steps(ckpt) == [1, 3]
        assert save(ckpt, 4).sequence == 4
        assert steps(ckpt) == [3, 4]
    assert "step-00000002.pt" in names(tmp_path)  # what cannot be read is never taken for one of ours


def test_a_file_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as ckpt:
        for step in (1, 2, 3):
            save(ckpt, step)
    store = faulty_store(tmp_path)
    store.fail("read", StoreError("bad sector"), times=None, where=lambda name: name.endswith("2.pt"))
    with Checkpointer(store=store) as ckpt:
        assert steps(ckpt) == [1, 3]
        assert ckpt.load()["step"] == 3
        with pytest.raises(StoreError, match="bad sector"):
            ckpt.load("step-00000002.pt")
        store.reset()
        assert steps(ckpt) == [1, 2, 3]
