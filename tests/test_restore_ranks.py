"""Ranks that restore together, as threads: what is in the way of one stops all of them, and at once."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncckpt import CheckpointNotFoundError, CorruptCheckpointError, StoreError
from asyncckpt._finder import Finder
from asyncckpt._loading.agreement import Ranks
from asyncckpt.stores.local import LocalStore
from folders import DATA, save_by_stock, save_described
from rank_threads import Stores, together
from support import flip

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from asyncckpt._ranks.coordination import Coordination
    from asyncckpt.stores.base import StoredFile


class Hiding(LocalStore):
    """A directory as a rank sees it before or after another one has changed it."""

    hidden: Collection[str] = ()

    async def list_folders(self) -> Sequence[StoredFile]:
        return [file for file in await super().list_folders() if file.name not in self.hidden]


def ranks_of(tmp_path: Path) -> list[Ranks]:
    def ranks(coordination: Coordination) -> Ranks:
        def agree(what: str, flags: Collection[str], problem: str | None) -> Mapping[str, list[int]]:
            return coordination.exchange(what, flags, problem).flags

        return Ranks(agree, coordination.rank, coordination.size)

    return [ranks(coordination) for coordination in Stores("hash", tmp_path, 2).coordinations()]


def restored(
    tmp_path: Path,
    live: Sequence[dict[str, Any]],
    hidden: Sequence[Collection[str]] = ((), ()),
    **options: Any,
) -> list[Any]:
    """Return what `restore` returns or raises on each rank."""

    def restore(ranks: Ranks) -> Any:
        store = Hiding(str(tmp_path))
        store.hidden = hidden[ranks.rank]
        finder = Finder(None, store, "step-{step:08d}.pt", None, None)
        finder._ranks_of = lambda state: ranks  # type: ignore[method-assign]  # noqa: ARG005
        return finder.restore(live[ranks.rank], **options)

    return together(ranks_of(tmp_path), restore)


def states() -> list[dict[str, Any]]:
    return [{"a": torch.zeros(500)} for _ in range(2)]


def save(tmp_path: Path, *steps: int) -> None:
    for step in steps:
        save_described(tmp_path, step, {"a": torch.full((500,), float(step))})


def test_ranks_may_differ_in_what_they_do_not_restore(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    live = states()
    found = restored(tmp_path, live, [["step-00000001"], []])  # evicted between the listings
    assert [checkpoint.step for checkpoint in found] == [2, 2]
    assert [state["a"].unique().tolist() for state in live] == [[2.0]] * 2


def test_ranks_that_fall_back_to_different_checkpoints_get_an_error(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    flip(tmp_path / "step-00000002" / DATA, 1000)
    live = states()
    found = restored(tmp_path, live, [["step-00000001"], []], fallback=True)
    assert [type(error).__name__ for error in found] == ["RankError"] * 2
    assert all("step-00000001" in str(error) and "damaged" in str(error) for error in found)
    assert not any(state["a"].any() for state in live)


def test_rank_that_cannot_list_the_directory_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    listed = Hiding.list_folders

    async def refused(self: Hiding) -> Sequence[StoredFile]:
        if self.hidden:
            raise StoreError(errno.EIO, "the network is down")
        return await listed(self)

    monkeypatch.setattr(Hiding, "list_folders", refused)
    one, other = restored(tmp_path, states(), [[], ["all"]])
    assert type(one).__name__ == "RankError"
    assert "the network is down" in str(one)
    assert type(other).__name__ == "StoreError"


class Refusing:
    """An object that does not take its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError(f"not {state}")


class Taking(Refusing):
    """An object that takes its state."""

    n = 1

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


def test_object_of_one_rank_that_refuses_a_file_stops_all_ranks(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.ones(500), "o": {"n": 2}}, path)
    taking, live = Taking(), states()
    live[0]["o"], live[1]["o"] = taking, Refusing()
    one, other = restored(tmp_path, live, which=path)
    assert type(one).__name__ == "RankError"
    assert "rank 1" in str(one)
    assert type(other).__name__ == "StateMismatchError"
    assert taking.n == 1
    assert not any(state["a"].any() for state in live)


def test_object_of_one_rank_that_refuses_a_folder_stops_all_ranks(tmp_path: Path) -> None:
    path = save_by_stock(tmp_path / "saved", {"a": torch.ones(500), "o": {"n": 2}})
    taking, live = Taking(), states()
    live[0]["o"], live[1]["o"] = taking, Refusing()
    one, other = restored(tmp_path, live, which=path)
    assert type(one).__name__ == "RankError"
    assert "o: ValueError: not" in str(one)
    assert type(other).__name__ == "StateMismatchError"
    assert taking.n == 1
    assert not any(state["a"].any() for state in live)
    live[1]["o"] = Taking()
    restored(tmp_path, live, which=path)
    assert [state["o"].n for state in live] == [2, 2]


def raising(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize("gone", [0, 1])
def test_checkpoint_that_is_gone_for_one_rank_and_damaged_for_another_is_gone(
    tmp_path: Path, gone: int
) -> None:
    works = [raising(CorruptCheckpointError("damaged")), raising(CheckpointNotFoundError("gone"))]
    works = works if gone else works[::-1]
    found = together(ranks_of(tmp_path), lambda ranks: ranks.together("restore it", works[ranks.rank]))
    assert [type(error) for error in found] == [CheckpointNotFoundError] * 2
