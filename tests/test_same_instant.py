"""What is saved twice in one instant is copied once, and every file says what was true when it was saved."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch

from asyncckpt import SaveError
from asyncckpt._saving import operations
from asyncckpt._saving.engine import get_engine
from asyncckpt._saving.saver import Saver
from asyncckpt._saving.targets import FileTarget
from asyncckpt.errors import UnpicklableStateError
from asyncckpt.layout.description import Description
from asyncckpt.stores.local import LocalStore
from asyncckpt.testing import FaultyStore, Gate
from asyncckpt.testing.doubles import WrapperStore
from sameness import assert_same
from states import TorchFunctionTensor
from support import torch_round_trip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from asyncckpt import Save
    from asyncckpt._saving.engine import Engine
    from asyncckpt.stores.base import Store

# Enough that the copy and the writing overlap.
LARGE = 9 << 20


class HoldingStore(WrapperStore):
    """Holds back chosen operations on chosen files, and counts all of them."""

    all_gates: ClassVar[list[Gate]] = []

    def __init__(self, inner: Store, *held: tuple[str, str]) -> None:
        super().__init__(inner)
        self.gates = {operation: Gate() for operation in held}
        self.all_gates.extend(self.gates.values())
        self.calls: Counter[str] = Counter()

    async def before(self, operation: str, subject: str) -> None:
        self.calls[operation] += 1
        if (operation, subject) in self.gates:
            await self.gates[operation, subject].passing()


def finished() -> Engine:
    for gate in HoldingStore.all_gates:
        gate.open()
    get_engine().drain()
    return get_engine()


@pytest.fixture(autouse=True)
def nothing_stays_leased() -> Iterator[None]:
    """Hold that each lease is given back, and exactly once."""
    yield
    engine = finished()
    assert engine.arena.statistics().leases == 0
    assert {len(buffer.holders) for buffer in engine.arena._buffers} <= {0}


@pytest.fixture
def saver() -> Iterator[Saver]:
    saver = Saver(max_in_flight=2)
    yield saver
    finished()
    assert saver.in_flight == 0


def put(saver: Saver, store: Store, name: str, state: object) -> Save:
    async def describe() -> Description:
        await store.prepare()
        return Description(0, None, {}, 0.0)

    return saver.save(state, FileTarget(store, name, describe), None, time.perf_counter())


def leases() -> int:
    return get_engine().arena.statistics().leases


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def state_of(value: float = 1.0, *, size: int = 5, **rest: object) -> dict[str, Any]:
    return {"x": torch.full((size,), value), "n": 1, **rest}


@pytest.mark.parametrize("size", [5, LARGE])
def test_an_equal_state_is_written_once(tmp_path: Path, saver: Saver, size: int) -> None:
    store = HoldingStore(LocalStore(str(tmp_path)))
    state = state_of(size=size)
    with saver.instant():
        put(saver, store, "a.pt", state)
        second = put(saver, store, "b.pt", state)
    state["x"].zero_()
    assert second.committed.result(60).nbytes == (tmp_path / "a.pt").stat().st_size
    assert (tmp_path / "a.pt").samefile(tmp_path / "b.pt")
    assert_same(load(tmp_path / "b.pt"), state_of(size=size))
    assert (store.calls["draft"], store.calls["copy"]) == (1, 1)


@pytest.mark.parametrize("size", [5, LARGE])
def test_a_state_whose_numbers_changed_shares_the_snapshot(tmp_path: Path, saver: Saver, size: int) -> None:
    store = HoldingStore(LocalStore(str(tmp_path)), ("commit", "a.pt"))
    state = state_of(size=size)
    with saver.instant():
        put(saver, store, "a.pt", state)
        state["n"] = 2
        second = put(saver, store, "b.pt", state)
    state["x"].zero_()
    assert (get_engine().depth(), leases(), saver.in_flight) == (2, 1, 1)
    store.gates["commit", "a.pt"].open()
    second.committed.result(60)
    assert_same(load(tmp_path / "a.pt"), state_of(size=size))
    assert_same(load(tmp_path / "b.pt"), state_of(size=size) | {"n": 2})
    assert store.calls["draft"] == 2


def step(state: dict[str, Any]) -> None:
    parameter = torch.nn.Parameter(state["x"])
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=0.1).step()


def add_to(name: str) -> Callable[[dict[str, Any]], object]:
    def add(state: dict[str, Any]) -> None:
        with torch.inference_mode(state[name].is_inference()), torch.no_grad():
            state[name].add_(1)

    return add


def for_inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "more"),
    [
        (add_to("x"), {}),
        (step, {}),
        (lambda state: state["x"].view(-1)[1:3].zero_(), {}),
        (lambda state: state["x"].resize_(4000).fill_(3), {}),
        (lambda state: state["x"].requires_grad_(), {}),
        (lambda state: state.update(x=state["x"] * 2), {}),
        (lambda state: state.update(x=state["x"][1:]), {}),
        (lambda state: state.update(x=state["y"], y=state["x"]), {"y": torch.full((5,), 9.0)}),
        (lambda state: state["array"].fill(7), {"array": np.arange(5)}),
        (add_to("frozen"), {"frozen": for_inference()}),
        (add_to("special"), {"special": torch.zeros(3).as_subclass(TorchFunctionTensor)}),
        (add_to("parameter"), {"parameter": torch.nn.Parameter(torch.zeros(3))}),
    ],
    ids=[
        "in place",
        "by an optimizer",
        "through a view",
        "grown",
        "its flag",
        "another tensor",
        "a shorter view",
        "swapped",
        "numpy",
        "for inference",
        "a subclass",
        "a parameter",
    ],
)
def test_what_changes_between_two_saves_is_in_the_second(
    tmp_path: Path, saver: Saver, change: Callable[[dict[str, Any]], object], more: dict[str, Any]
) -> None:
    state = state_of(**more)
    store = HoldingStore(LocalStore(str(tmp_path)), ("prepare", ""))
    with saver.instant():
        before = torch_round_trip(state)
        put(saver, store, "a.pt", state)
        change(state)
        after = torch_round_trip(state)
        put(saver, store, "b.pt", state)
    state["x"].detach().zero_()
    store.gates["prepare", ""].open()
    get_engine().drain()
    assert_same(load(tmp_path / "a.pt"), before)
    assert_same(load(tmp_path / "b.pt"), after)


def test_clones_that_hooks_make_are_told_apart(tmp_path: Path) -> None:
    saver, store = Saver(max_in_flight=20), LocalStore(str(tmp_path))
    x = torch.zeros(2000)
    with saver.instant():
        for i in range(20):
            put(saver, store, f"{i}.pt", {"clone": x.add_(1).clone()})
    get_engine().drain()
    assert [load(tmp_path / f"{i}.pt")["clone"][0].item() for i in range(20)] == list(range(1, 21))


@contextmanager
def left_by_an_exception(saver: Saver) -> Iterator[None]:
    with suppress(KeyboardInterrupt), saver.instant():
        yield
        raise KeyboardInterrupt


@pytest.mark.parametrize("within", [Saver.instant, left_by_an_exception, lambda _: nullcontext()])
def test_nothing_is_taken_as_unchanged_behind_an_instant(tmp_path: Path, saver: Saver, within: Any) -> None:
    store, x = LocalStore(str(tmp_path)), torch.zeros(3)
    for i in range(3):
        with within(saver):
            put(saver, store, f"{i}.pt", {"x": x})
        x.numpy()[:] += 1  # which torch does not count
    put(saver, store, "3.pt", {"x": x})
    get_engine().drain()
    assert [load(tmp_path / f"{i}.pt")["x"][0].item() for i in range(4)] == [0, 1, 2, 3]


def test_a_place_in_flight_is_free_when_all_who_share_it_are_written(tmp_path: Path) -> None:
    saver = Saver(max_in_flight=1)
    store = HoldingStore(LocalStore(str(tmp_path)), ("draft", "b.pt"))
    state = state_of()
    with saver.instant():
        first = put(saver, store, "a.pt", state)
        state["n"] = 2
        put(saver, store, "b.pt", state)
    state["x"].add_(1)
    first.committed.result(60)
    third = threading.Thread(target=put, args=(saver, store, "c.pt", state))
    third.start()
    store.gates["draft", "b.pt"].wait_for_arrival()
    third.join(0.2)  # time enough to go on, were it allowed to
    assert (third.is_alive(), leases(), saver.in_flight) == (True, 1, 1)
    store.gates["draft", "b.pt"].open()
    third.join(60)
    get_engine().drain()
    assert [load(tmp_path / name)["x"][0].item() for name in ("a.pt", "b.pt", "c.pt")] == [1, 1, 2]
    assert saver.in_flight == 0


def test_a_snapshot_is_held_until_the_instant_ends(tmp_path: Path, saver: Saver) -> None:
    store, state = HoldingStore(LocalStore(str(tmp_path))), state_of()
    with saver.instant():
        put(saver, store, "a.pt", state)
        get_engine().drain()
        state["n"] = 2
        put(saver, store, "b.pt", state)
        get_engine().drain()
        put(saver, store, "c.pt", state)
        get_engine().drain()
        assert get_engine().arena.statistics().leases == 1
    assert get_engine().arena.statistics().leases == 0
    assert_same(load(tmp_path / "b.pt"), state)
    assert (tmp_path / "b.pt").samefile(tmp_path / "c.pt")
    assert store.calls["draft"] == 2


def test_what_was_to_be_a_copy_of_what_fails_is_written(
    tmp_path: Path, saver: Saver, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "b.pt").write_bytes(b"of an earlier run")
    faulty = FaultyStore(LocalStore(str(tmp_path)))
    faulty.fail("commit", OSError("disk full"))
    store = HoldingStore(faulty, ("commit", "a.pt"))
    state = state_of()
    with saver.instant():
        put(saver, store, "a.pt", state)
        put(saver, store, "b.pt", state)
    store.gates["commit", "a.pt"].open()
    get_engine().drain()
    assert [path.name for path in tmp_path.iterdir()] == ["b.pt"]
    assert_same(load(tmp_path / "b.pt"), state)
    with pytest.raises(SaveError, match=r"a\.pt failed: disk full"):
        saver.raise_failures()
    saver.raise_failures()
    assert len(caplog.records) == 1


def test_what_shares_a_snapshot_with_what_fails_is_written(
    tmp_path: Path, saver: Saver, caplog: pytest.LogCaptureFixture
) -> None:
    store = FaultyStore(LocalStore(str(tmp_path)))
    store.fail("commit", OSError("disk full"))
    state = state_of()
    gated = HoldingStore(store, ("commit", "a.pt"))
    with saver.instant():
        failing = put(saver, gated, "a.pt", state)
        state["n"] = 2
        second = put(saver, gated, "b.pt", state)
    gated.gates["commit", "a.pt"].open()
    second.committed.result(60)
    assert_same(load(tmp_path / "b.pt"), state)
    with pytest.raises(SaveError, match="disk full"):
        failing.committed.result(60)
    assert len(caplog.records) == 1


def test_nothing_is_made_a_copy_of_what_has_failed(
    tmp_path: Path, saver: Saver, caplog: pytest.LogCaptureFixture
) -> None:
    store, state = FaultyStore(LocalStore(str(tmp_path))), state_of()
    store.fail("commit", OSError("disk full"))
    with saver.instant():
        failed = put(saver, store, "a.pt", state)
        assert failed.committed.exception(60) is not None
        get_engine().drain()
        put(saver, store, "b.pt", state).committed.result(60)
    assert_same(load(tmp_path / "b.pt"), state)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("lost", ["replaced", "removed"])
def test_nothing_is_made_a_copy_of_a_file_that_is_another_by_then(
    tmp_path: Path, saver: Saver, lost: str
) -> None:
    store, state = LocalStore(str(tmp_path)), state_of()
    with saver.instant():
        put(saver, store, "a.pt", state)
        if lost == "replaced":
            put(saver, store, "a.pt", state | {"n": 2})
        else:
            operations.remove(store, "a.pt")
        put(saver, store, "b.pt", state).committed.result(60)
    assert_same(load(tmp_path / "b.pt"), state)


def test_a_copy_crosses_directories_but_not_kinds_of_stores(tmp_path: Path, saver: Saver) -> None:
    near, far = LocalStore(str(tmp_path / "near")), LocalStore(str(tmp_path / "far" / "away"))
    other, state = HoldingStore(LocalStore(str(tmp_path))), state_of()
    with saver.instant():
        put(saver, near, "a.pt", state)
        put(saver, far, "b.pt", state)
        put(saver, other, "c.pt", state)
    get_engine().drain()
    assert (tmp_path / "near" / "a.pt").samefile(tmp_path / "far" / "away" / "b.pt")
    assert (other.calls["draft"], other.calls["copy"]) == (1, 0)
    assert_same(load(tmp_path / "c.pt"), state)


def test_a_second_state_that_cannot_be_saved_takes_nothing(tmp_path: Path, saver: Saver) -> None:
    store, state = LocalStore(str(tmp_path)), state_of()
    with saver.instant():
        first = put(saver, store, "a.pt", state)
        with pytest.raises(UnpicklableStateError, match="bad"):
            put(saver, store, "b.pt", state | {"bad": lambda: None})
        put(saver, store, "c.pt", state)
    first.committed.result(60)
    get_engine().drain()
    assert (tmp_path / "a.pt").samefile(tmp_path / "c.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "c.pt"]
