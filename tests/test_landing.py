"""Where a restored file lands: in memory of the arena, which gets it back unless something is kept."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncckpt import Checkpointer, CorruptCheckpointError, StateMismatchError
from asyncckpt._loading import choose_landing
from asyncckpt._saving.engine import get_engine
from asyncckpt._snapshot.arena import Arena
from asyncckpt.stores import LocalStore
from asyncckpt.stores.fileops import FileOps
from asyncckpt.stores.local_file import LocalFile
from sameness import assert_same
from support import flip, payload_offset

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1 << 20


@pytest.fixture
def ckpt(tmp_path: Path) -> Iterator[Checkpointer]:
    get_engine().release()
    with Checkpointer(tmp_path) as ckpt:
        yield ckpt


def state_of(value: float) -> dict[str, Any]:
    return {"w": torch.full((SIZE,), value), "small": torch.full((3,), value), "n": int(value)}


def saved(ckpt: Checkpointer, state: Any, step: int = 1) -> Any:
    ckpt.save(step, state).committed.result(30)
    return state


def in_arena() -> tuple[int, int]:
    """Return how many bytes the arena has, and how many leases."""
    statistics = get_engine().arena.statistics()
    return statistics.mapped, statistics.leases


@pytest.fixture
def only_in_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no file land in memory of its own."""

    def refuse(_: object) -> None:
        raise AssertionError("memory of its own")

    monkeypatch.setattr(choose_landing, "OwnLanding", refuse)


@pytest.mark.usefixtures("only_in_arena")
def test_a_restore_uses_the_buffer_of_the_last_save_and_gives_it_back(ckpt: Checkpointer) -> None:
    saved(ckpt, state_of(1))
    mapped, _ = in_arena()
    live = state_of(0)
    for _ in range(3):
        ckpt.restore(live)
        assert in_arena() == (mapped, 0)
    assert_same(live, state_of(1))
    saved(ckpt, state_of(2), 2)
    assert_same(live, state_of(1))
    assert in_arena() == (mapped, 0)


def test_a_restore_does_without_a_buffer(ckpt: Checkpointer) -> None:
    saved(ckpt, state_of(1))
    get_engine().arena.release()
    live = state_of(0)
    ckpt.restore(live)
    assert_same(live, state_of(1))
    assert in_arena() == (0, 0)


class Keeper:
    """An object that keeps what it loads."""

    def __init__(self, average: torch.Tensor) -> None:
        self.average = average

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.average = state["average"]


@pytest.mark.usefixtures("only_in_arena")
def test_what_an_object_keeps_of_a_loaded_state_is_not_overwritten_by_the_next_save(
    ckpt: Checkpointer,
) -> None:
    saved(ckpt, state_of(1) | {"keeper": Keeper(torch.full((SIZE,), 5.0)), "tail": torch.ones(SIZE)})
    mapped, _ = in_arena()
    live = state_of(0) | {"keeper": Keeper(torch.zeros(SIZE)), "tail": torch.zeros(SIZE)}
    ckpt.restore(live)
    assert in_arena() == (0, 0)  # it would be another program's memory there
    saved(ckpt, {name: torch.full((SIZE,), 9.0) for name in "abc"}, 2)
    assert live["keeper"].average.unique().tolist() == [5.0]
    assert live["tail"].unique().tolist() == [1.0]
    assert in_arena()[0] <= mapped


@pytest.mark.usefixtures("only_in_arena")
def test_a_small_tensor_that_an_object_keeps_takes_no_buffer_with_it(ckpt: Checkpointer) -> None:
    saved(ckpt, {"w": torch.zeros(SIZE), "keeper": Keeper(torch.full((3,), 5.0))})
    mapped, _ = in_arena()
    keeper = Keeper(torch.zeros(3))
    ckpt.restore({"w": torch.zeros(SIZE), "keeper": keeper})
    assert in_arena() == (mapped, 0)
    saved(ckpt, {"w": torch.full((SIZE,), 9.0), "keeper": Keeper(torch.full((3,), 9.0))}, 2)
    assert keeper.average.tolist() == [5.0] * 3


@pytest.mark.usefixtures("only_in_arena")
@pytest.mark.skipif(sys.platform != "linux", reason="what is not inherited elsewhere differs")
def test_forked_children_have_what_an_object_keeps(ckpt: Checkpointer) -> None:
    saved(ckpt, {"keeper": Keeper(torch.full((SIZE,), 5.0))})
    live = {"keeper": Keeper(torch.zeros(SIZE))}
    ckpt.restore(live)
    child = os.fork()
    if child == 0:
        os._exit(0 if bytes(live["keeper"].average[-1:].numpy()) == bytes(torch.tensor([5.0]).numpy()) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_fresh_optimizer_keeps_what_it_loads_outside_the_arena(ckpt: Checkpointer) -> None:
    model, fresh = torch.nn.Linear(512, 512), torch.nn.Linear(512, 512)
    trained = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 512)).sum().backward()
    trained.step()
    saved(ckpt, {"model": model, "opt": trained})
    mapped, _ = in_arena()
    opt = torch.optim.Adam(fresh.parameters())
    ckpt.restore({"model": fresh, "opt": opt})
    assert in_arena() == (mapped, 0)
    expected = trained.state_dict()
    saved(ckpt, {"model": torch.nn.Linear(512, 512), "opt": torch.optim.Adam(model.parameters())}, 2)
    assert_same(opt.state_dict(), expected)


@pytest.mark.usefixtures("only_in_arena")
def test_after_an_error_the_next_save_overwrites_nothing_that_is_in_use(
    ckpt: Checkpointer, tmp_path: Path
) -> None:
    saved(ckpt, state_of(1))
    live = {**state_of(0), "w": torch.zeros(SIZE + 1)}
    before = {**live, "w": live["w"].clone(), "small": live["small"].clone()}
    with pytest.raises(StateMismatchError):
        ckpt.restore(live)
    assert in_arena()[1] == 0
    saved(ckpt, state_of(2), 2)
    path = tmp_path / "step-00000002.pt"
    flip(path, payload_offset(path, "data/0") + 5)
    with pytest.raises(CorruptCheckpointError):
        ckpt.restore(live)
    assert in_arena()[1] == 0
    assert_same(live, before)


class GatedOps(FileOps):
    """Once armed, reads wait until they may go on."""

    def __init__(self) -> None:
        self.armed = False
        self.arrived, self.may_go_on = threading.Event(), threading.Event()

    def preadv(self, fd: int, into: memoryview, offset: int) -> int:
        if self.armed and offset == 0:
            self.arrived.set()
            assert self.may_go_on.wait(30)
        return super().preadv(fd, into, offset)


def test_a_buffer_is_not_leased_again_while_an_interrupted_restore_is_still_read(tmp_path: Path) -> None:
    get_engine().release()
    ops = GatedOps()
    with Checkpointer(store=LocalStore(str(tmp_path), ops)) as ckpt:
        saved(ckpt, state_of(1))
        arena, ops.armed = get_engine().arena, True

        def interrupt() -> None:
            assert ops.arrived.wait(30)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                ckpt.restore(state_of(0))
            thread.join()
            assert in_arena()[1] == 1
            assert arena.lease_free(1) is None
        finally:
            ops.may_go_on.set()
        assert arena._changed.until(lambda: not arena._leased(), 30)
        assert arena.lease_free(1) is not None


def test_a_free_buffer_is_leased_if_it_is_large_enough() -> None:
    arena = Arena()
    assert arena.lease_free(1) is None
    for size in (3, 2):
        arena.reserve(size * SIZE, 1)
    held = arena.lease_free(2 * SIZE)
    assert held is not None
    assert len(held.view) == held._arena.statistics().leased
    assert arena.lease_free(4 * SIZE) is None
    address = held.address
    held.release()
    again = arena.lease_free(SIZE)
    assert again is not None
    assert again.address == address


def test_a_detached_buffer_counts_nowhere_and_is_closed_with_its_lease() -> None:
    arena = Arena(limit=SIZE)
    lease = arena.lease(SIZE)
    mapping = lease.detach()
    assert arena.statistics().mapped == 0
    other = arena.lease(SIZE, wait=False)
    assert other.address != lease.address
    lease.view[:3] = b"abc"
    assert mapping._unmap.alive
    del lease
    assert not mapping._unmap.alive


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    def test_a_state_on_the_gpu_is_restored_from_a_pinned_buffer_that_the_next_save_uses(
        self, ckpt: Checkpointer
    ) -> None:
        model = torch.nn.Linear(1024, 1024, device="cuda")
        opt = torch.optim.AdamW(model.parameters())
        state = {"model": model, "opt": opt, "n": 3}

        def step() -> None:
            opt.zero_grad()
            model(torch.ones(4, 1024, device="cuda")).sum().backward()
            opt.step()

        step()
        saved(ckpt, state)
        get_engine().arena.release()
        expected = {"model": {k: v.clone() for k, v in model.state_dict().items()}}
        moments = [entry["exp_avg"] for entry in opt.state.values()]
        averages = [moment.clone() for moment in moments]
        step()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ckpt.restore(state)
        assert torch.cuda.max_memory_allocated() - held < 1 << 20
        assert_same(dict(model.state_dict()), expected["model"])
        assert all(entry["exp_avg"] is old for entry, old in zip(opt.state.values(), moments, strict=True))
        assert all(torch.equal(*pair) for pair in zip(moments, averages, strict=True))
        mapped, leases = in_arena()
        assert (mapped > 0, leases) == (True, 0)
        saved(ckpt, state, 2)
        assert in_arena() == (mapped, 0)

    @pytest.mark.parametrize("where", ["cuda", "cuda:0", torch.device("cuda")])
    @pytest.mark.parametrize("chunk", [4096, 8 << 20])
    def test_a_load_to_the_gpu_gives_what_torch_gives(
        self, ckpt: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, chunk: int
    ) -> None:
        monkeypatch.setattr(LocalFile, "chunk", chunk)
        tied = torch.rand(300, 300)
        state = {"a": tied, "b": tied.t(), "c": {str(i): torch.rand(i) for i in range(90)}, "n": 1}
        saved(ckpt, state)
        path = tmp_path / "step-00000001.pt"
        with torch.cuda.stream(torch.cuda.Stream()):
            loaded = ckpt.load(map_location=where)
            assert loaded["a"].device == torch.device("cuda:0")
            assert loaded["a"].untyped_storage().data_ptr() == loaded["b"].untyped_storage().data_ptr()
            expected = torch.load(path, map_location=where)
            assert all(torch.equal(loaded[key], expected[key]) for key in "ab")
            assert all(torch.equal(loaded["c"][key], expected["c"][key]) for key in expected["c"])
        flip(path, payload_offset(path, "data/0"))
        with pytest.raises(CorruptCheckpointError, match="data/0"):
            ckpt.load(map_location=where)
