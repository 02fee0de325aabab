"""States that cannot be saved: who is told what, and that nothing stays behind."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import asyncckpt
from asyncckpt import Checkpointer, SaveError, UnpicklableStateError
from asyncckpt._saving import staging
from asyncckpt._saving.engine import get_engine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Refusing:
    def __reduce__(self) -> Any:
        raise RuntimeError("I stay here")


class Having:
    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.fixture
def checkpointer(tmp_path: Path) -> Iterator[Checkpointer]:
    with Checkpointer(tmp_path) as checkpointer:
        yield checkpointer


def shared_dtypes() -> dict[str, Any]:
    base = torch.zeros(4)
    return {"a": base, "b": {"c": base.view(torch.int32)}}


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"opt": {"hook": lambda: None}}, 'state["opt"]["hook"]'),
        ({"opt": {"hook": threading.Lock()}}, 'state["opt"]["hook"]'),
        ({"a": [1, (2, Refusing())]}, 'state["a"][1][1]'),
        ({"it's": Having({3: [iter([]), open]}), "x": Refusing()}, 'state["x"]'),
        ({"it's": Refusing()}, 'state["it\'s"]'),
        ([Having({"deep": Refusing()})], 'state[0].value["deep"]'),
        ({3: {(1, "k"): Refusing()}}, "state[3][(1, 'k')]"),
        (Refusing(), "state"),
    ],
)
def test_the_message_starts_with_the_path_of_the_culprit(
    checkpointer: Checkpointer, state: Any, path: str
) -> None:
    with pytest.raises(UnpicklableStateError) as caught:
        checkpointer.save(1, state)
    assert str(caught.value).startswith(f"{path}: cannot pickle (")
    assert isinstance(caught.value, SaveError)
    assert isinstance(caught.value, TypeError)
    assert caught.value.__cause__ is not None


def test_a_culprit_in_a_tensors_attribute_or_in_a_cycle(checkpointer: Checkpointer) -> None:
    tensor = torch.zeros(1)
    tensor.hook = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(UnpicklableStateError, match=r'^state\["t"\]\.hook: cannot pickle'):
        checkpointer.save(1, {"t": tensor})
    cycle: dict[str, Any] = {}
    cycle["self"] = [cycle, threading.Lock()]
    with pytest.raises(UnpicklableStateError, match=r'^state\["self"\]\[1\]: cannot pickle'):
        checkpointer.save(1, cycle)


def test_two_dtypes_on_one_storage_are_refused_as_torch_refuses_them(checkpointer: Checkpointer) -> None:
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        torch.save(shared_dtypes(), "/dev/null")
    with pytest.raises(SaveError, match=r"same storage \(16 bytes\) as torch.float32 and as torch.int32"):
        checkpointer.save(1, shared_dtypes())


@pytest.mark.parametrize("state", [{"a": torch.ones(3), "lock": threading.Lock()}, shared_dtypes()])
def test_a_refused_state_leaves_nothing_behind(
    checkpointer: Checkpointer, tmp_path: Path, state: Any
) -> None:
    for step in range(3):
        with pytest.raises(SaveError):
            checkpointer.save(step, state)
    assert get_engine().arena.statistics().leases == 0
    assert list(tmp_path.iterdir()) == []
    checkpointer.save(0, {"a": torch.ones(3)})
    checkpointer.wait()  # raises nothing: the caller was told already
    assert torch.equal(checkpointer.load(0)["a"], torch.ones(3))
    assert [c.sequence for c in checkpointer.checkpoints()] == [1]


@pytest.mark.parametrize("numel", [8, 48 << 18])
def test_a_copy_that_fails_is_told_once_and_leaves_nothing_behind(
    checkpointer: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numel: int
) -> None:
    # Memory that goes away, as a GPU's does that falls off the bus, cannot be had here.
    def lost(*_: Any) -> None:
        raise RuntimeError("the device is lost")

    with monkeypatch.context() as patch:
        patch.setattr(staging, "copy_ranges", lost)
        with pytest.raises(SaveError, match="could not copy the state to host memory: the device is lost"):
            checkpointer.save(1, {"a": torch.ones(numel)})
    checkpointer.wait()
    assert get_engine().arena.statistics().leases == 0
    assert list(tmp_path.iterdir()) == []
    checkpointer.save(1, {"a": torch.ones(numel)})
    checkpointer.wait()
    checkpointer.verify(1)


def test_what_torch_cannot_save_either_is_an_error_not_a_crash(checkpointer: Checkpointer) -> None:
    state = {"storage": torch.empty(3, device="meta").untyped_storage()}
    with pytest.raises(Exception):  # noqa: B017, PT011 - torch's own, whatever it is
        torch.save(state, "/dev/null")
    with pytest.raises(SaveError):
        checkpointer.save(1, state)


def test_much_that_is_pickled_on_the_training_thread_is_warned_of_once(tmp_path: Path) -> None:
    state = {"table": bytes(65 << 20)}
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.warns(UserWarning, match="65 MiB of the state are not tensors") as warned:
            checkpointer.save(1, state)
        checkpointer.save(2, state)
    assert warned[0].filename == __file__


def test_functions_save_refuses_as_well(tmp_path: Path) -> None:
    with pytest.raises(UnpicklableStateError, match=r'^state\["f"\]: cannot pickle'):
        asyncckpt.save({"f": lambda: None}, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []
