"""Copies from CUDA devices, in every order in which simulated streams and threads may advance."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from asyncckpt._snapshot import cuda_lane
from asyncckpt._snapshot.copy import Watermark, copy_ranges
from asyncckpt._snapshot.deferred import DeferredCopy, Overlap, defer
from asyncckpt._snapshot.device_budget import DeviceBudget
from asyncckpt._snapshot.ranges import Ranges
from asyncckpt.errors import TornSnapshotError
from asyncckpt.types import SaveStats
from simulated_cuda import Machine, Memory, Stream, View

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

# In place of the real ones, so that a few bytes have every kind of piece.
_SMALL, _STRIDE, _PIECE, _IMAGE, _MOST = 8, 12, 40, 20, 3
_GAP = 2
_GATHERED = 30

seeds = st.integers(0, 2**32)
failures = st.sets(st.integers(0, 5), max_size=2)


@dataclass(frozen=True)
class Part:
    """A range of a state: `owned` ones hold still until a fence."""

    device: int
    nbytes: int
    offset: int
    dtype: torch.dtype | None
    owned: bool


parts = st.lists(
    st.builds(
        Part,
        device=st.integers(0, 1),
        nbytes=st.integers(1, 40),
        offset=st.sampled_from([0, 0, 3]),
        dtype=st.sampled_from([None, torch.float32, torch.int64]),
        owned=st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@dataclass
class State:
    """A state on the devices of a machine, and the buffer that it is copied into."""

    machine: Machine
    parts: Sequence[Part]
    memories: list[Memory] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.starts, self.frozen, end = [], [], 0
        for index, part in enumerate(self.parts):
            self.starts.append(end)
            end += part.nbytes + _GAP
            self.frozen.append((torch.arange(part.offset + part.nbytes) + 41 * index) % 127)
        self.buffer = torch.zeros(end, dtype=torch.uint8)
        self.lease: Any = SimpleNamespace(view=self.buffer.numpy().data, address=self.buffer.data_ptr())
        self.expected = torch.zeros_like(self.buffer)
        for part, start, content in zip(self.parts, self.starts, self.frozen, strict=True):
            self.expected[start : start + part.nbytes] = content[part.offset :].to(torch.uint8)

    def make(self) -> Ranges:
        """Allocate the sources, queue the kernels that fill them, and return them."""
        ranges = Ranges([], [], [], [])
        for part, content in zip(self.parts, self.frozen, strict=True):
            memory = Memory(self.machine, torch.device("cuda", part.device), part.offset + part.nbytes)
            self.memories.append(memory)
            self.machine.change(memory, content)
            ranges.sources.append(memory)  # type: ignore[arg-type]
            ranges.offsets.append(part.offset)
            ranges.sizes.append(part.nbytes)
            view = None if part.dtype is None else View(memory, 0, memory.nbytes(), part.dtype)
            ranges.tensors.append(view)  # type: ignore[arg-type]
        return ranges

    def change(self, wanted: Callable[[int], object]) -> None:
        """Queue kernels of the training that write other bytes into some of the sources."""
        for index, memory in enumerate(self.memories):
            if wanted(index):
                self.machine.change(memory, 255 - self.frozen[index])

    def is_deferred(self, index: int) -> bool:
        return self.parts[index].owned and self.parts[index].nbytes > _SMALL

    def progress(self) -> Watermark:
        """Return what a copy reports its progress to, which is checked."""
        state = self

        class Checked(Watermark):
            def advance(self, value: int) -> None:
                assert torch.equal(state.buffer[:value], state.expected[:value])

        return Checked()

    def assert_copied(self) -> None:
        assert torch.equal(self.buffer, self.expected)
        self.assert_nothing_writes()

    def assert_nothing_writes(self) -> None:
        assert not self.machine.host_writes[self.buffer.data_ptr()]


@contextmanager
def simulated(seed: int, failing: Collection[int] = ()) -> Iterator[Machine]:
    machine = Machine(seed, failing)
    with pytest.MonkeyPatch.context() as patch:
        machine.install(patch)
        for name, value in (
            ("copy.SMALL", _SMALL),
            ("copy._STRIDE", _STRIDE),
            ("copy.PIECE", _PIECE),
            ("copy._GATHERED", _GATHERED),
            ("copy.indices_on_device", lambda ranges: list(range(len(ranges.sources)))),
            ("deferred.SMALL", _SMALL),
            ("cuda_lane._IMAGE", _IMAGE),
            ("cuda_lane._MOST", _MOST),
        ):
            patch.setattr(f"asyncckpt._snapshot.{name}", value)
        yield machine


class Saving:
    """One of some overlapped saves; their limit of device memory is checked."""

    def __init__(self, machine: Machine, state: State, limit: int, saves: int = 1) -> None:
        self.machine, self.state = machine, state
        self.budget, self.machine_limit = DeviceBudget(limit), limit * saves
        self.stats = SaveStats()
        self.copy: DeferredCopy | None = None

    def save(self, ranges: Ranges | None = None) -> DeferredCopy:
        state = self.state
        ranges = ranges or state.make()
        with torch.inference_mode(mode=False):
            owned = {
                memory._cdata: [torch.empty(memory.nbytes(), dtype=torch.uint8)]
                for memory, part in zip(state.memories, state.parts, strict=True)
                if part.owned
            }
        overlap = Overlap(SimpleNamespace(tensors=lambda: owned), self.budget)  # type: ignore[arg-type]
        copy = defer(ranges, state.starts, state.lease, state.progress(), self.stats, overlap)
        assert copy is not None
        self.copy = copy
        return copy

    def run(self) -> None:
        assert self.copy is not None
        self.copy._run_in_thread()
        if self.copy._error is not None:
            raise self.copy._error
        self.state.assert_nothing_writes()

    def assert_ended(self) -> None:
        self.copy = None
        self.state.memories.clear()
        for device in map(torch.device, ("cuda:0", "cuda:1")):
            assert self.budget.left(device) == self.budget.limit
            assert not self.machine.allocated.get(device)
            assert self.machine.most_allocated.get(device, 0) <= self.machine_limit


def pauses(machine: Machine, number: int) -> None:
    for _ in range(number):
        machine.pause()


@settings(max_examples=120, deadline=None)
@given(parts=parts, seed=seeds, failing=failures)
def test_a_blocking_copy_has_the_bytes_as_of_its_call(
    parts: list[Part], seed: int, failing: set[int]
) -> None:
    with simulated(seed, failing) as machine:
        state = State(machine, parts)

        def train() -> None:
            copy_ranges(state.make(), state.starts, state.lease, state.progress())
            state.assert_copied()
            state.change(lambda _: True)

        machine.start(train)
        machine.run()
        state.assert_copied()
        state.memories.clear()
        assert not any(machine.allocated.values())


@settings(max_examples=100, deadline=None)
@given(parts=parts, seed=seeds, limit=st.integers(0, 150), before=st.integers(0, 40))
def test_two_saves_are_copied_at_once(parts: list[Part], seed: int, limit: int, before: int) -> None:
    with simulated(seed) as machine:
        states = [State(machine, parts) for _ in range(2)]
        assume(any(map(states[0].is_deferred, range(len(parts)))))
        savings = [Saving(machine, state, limit, saves=2) for state in states]

        def train() -> None:
            copies = []
            for saving in savings:
                copies.append(saving.save())
                machine.start(saving.run)
                pauses(machine, before)
            for copy in copies:
                copy.fence()
            for state in states:
                state.change(lambda _: True)

        machine.start(train)
        machine.run()
        for state, saving in zip(states, savings, strict=True):
            state.assert_copied()
            saving.copy = None
            state.memories.clear()
        for saving in savings:
            saving.assert_ended()


@settings(max_examples=120, deadline=None)
@given(
    sizes=st.lists(st.integers(20, 40), min_size=3, max_size=5),
    seed=seeds,
    before=st.integers(0, 20),
    limit=st.sampled_from([0, 12]),
)
def test_a_fence_and_the_background_launch_pieces_of_one_device_at_once(
    sizes: list[int], seed: int, before: int, limit: int
) -> None:
    with simulated(seed) as machine:
        state = State(machine, [Part(0, nbytes, 0, None, owned=True) for nbytes in sizes])
        saving = Saving(machine, state, limit)

        def train() -> None:
            copy = saving.save()
            machine.start(saving.run)
            pauses(machine, before)
            copy.fence()
            state.change(lambda _: True)

        machine.start(train)
        machine.run()
        state.assert_copied()
        saving.assert_ended()


@settings(max_examples=120, deadline=None)
@given(parts=parts, seed=seeds, limit=st.integers(0, 150), at=st.integers(1, 60), before=st.integers(0, 20))
def test_an_interrupted_fence_can_be_repeated(
    parts: list[Part], seed: int, limit: int, at: int, before: int
) -> None:
    with simulated(seed) as machine:
        machine.looks_again = True
        state = State(machine, parts)
        assume(any(map(state.is_deferred, range(len(parts)))))
        saving = Saving(machine, state, limit)

        def train() -> None:
            copy = saving.save()
            machine.start(saving.run)
            pauses(machine, before)
            machine.thread().interrupted_after = at
            with suppress(KeyboardInterrupt):
                copy.fence()
            machine.thread().interrupted_after = 0
            copy.fence()
            state.change(state.is_deferred)

        machine.start(train)
        machine.run()
        state.assert_copied()


@settings(max_examples=50, deadline=None)
@given(parts=parts, seed=seeds, limit=st.integers(0, 150))
def test_what_is_queued_after_a_fence_needs_no_thread(parts: list[Part], seed: int, limit: int) -> None:
    with simulated(seed) as machine:
        state = State(machine, parts)
        assume(any(map(state.is_deferred, range(len(parts)))))
        saving = Saving(machine, state, limit)

        def train() -> None:
            saving.save().fence()
            state.change(state.is_deferred)
            for device in {memory.device for memory in state.memories}:
                machine.current_stream(device).synchronize()
            machine.start(saving.run)

        machine.start(train)
        machine.run()
        state.assert_copied()
        saving.assert_ended()


@settings(max_examples=50, deadline=None)
@given(parts=parts, seed=seeds, before=st.integers(0, 20))
def test_a_fence_lets_no_copy_wait_for_what_was_queued_since_the_save(
    parts: list[Part], seed: int, before: int
) -> None:
    with simulated(seed) as machine:
        parts = [replace(part, owned=True, nbytes=part.nbytes + _SMALL) for part in parts]
        state = State(machine, parts)
        saving = Saving(machine, state, 0)
        copied: list[bool] = []

        def run(copy: DeferredCopy) -> None:
            copy.copy.run()
            copied.append(True)

        def train() -> None:
            copy = saving.save()
            machine.start(lambda: run(copy))
            for device in {memory.device for memory in state.memories}:
                machine.current_stream(device).add(lambda: None, lambda: bool(copied))
            pauses(machine, before)
            copy.fence()
            state.change(lambda _: True)

        machine.start(train)
        machine.run()
        state.assert_copied()


def test_a_step_that_is_captured_before_the_fence_fails_the_save_and_queues_nothing() -> None:
    with simulated(0) as machine:
        state = State(machine, [Part(0, 30, 0, None, owned=True)])
        saving = Saving(machine, state, 100)

        def train() -> None:
            copy = saving.save()
            stream = machine.current_stream(torch.device("cuda", 0))
            stream.synchronize()
            machine.is_capturing = True
            copy.fence()
            assert stream.is_idle()
            machine.is_capturing = False
            machine.start(saving.run)

        machine.start(train)
        with pytest.raises(TornSnapshotError, match="captured into a CUDA graph"):
            machine.run()


def test_a_step_that_is_captured_after_the_fence_is_none_of_the_copy() -> None:
    with simulated(0) as machine:
        state = State(machine, [Part(0, 30, 0, None, owned=True)])
        saving = Saving(machine, state, 100)

        def train() -> None:
            copy = saving.save()
            copy.fence()
            stream = machine.current_stream(torch.device("cuda", 0))
            stream.synchronize()
            machine.is_capturing = True
            copy.fence()
            assert stream.is_idle()
            machine.is_capturing = False
            machine.start(saving.run)

        machine.start(train)
        machine.run()
        state.assert_copied()


@pytest.mark.parametrize("runs", [True, False])
def test_all_lanes_are_closed_and_the_copy_has_ended_where_a_device_fails(
    monkeypatch: pytest.MonkeyPatch, *, runs: bool
) -> None:
    with simulated(0) as machine:
        state = State(machine, [Part(device, 30, 0, None, owned=True) for device in (0, 1)])
        saving = Saving(machine, state, 100)
        synchronize = Stream.synchronize

        def failing(stream: Stream) -> None:
            if stream.device.index == 0:
                raise RuntimeError("device-side assert")
            synchronize(stream)

        monkeypatch.setattr(Stream, "synchronize", failing)

        def train() -> None:
            copy = saving.save()
            copy.fence()
            with pytest.raises(RuntimeError, match="device-side assert"):
                copy.copy.run() if runs else copy.cancel()
            assert copy.copy.ended
            copy.cancel()

        machine.start(train)
        machine.run()
        saving.assert_ended()


def test_a_save_in_inference_mode_is_copied_by_other_threads() -> None:
    with simulated(0) as machine:
        state = State(machine, [Part(0, 30, 0, None, owned=True)])
        saving = Saving(machine, state, 0)

        def train() -> None:
            with torch.inference_mode():
                saving.save()
            machine.start(saving.run)

        machine.start(train)
        machine.run()
        state.assert_copied()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.complex64])
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_small_tensors_are_gathered_as_they_are(dtype: torch.dtype, autocast: torch.dtype) -> None:
    tensors = [torch.ones(3, 2, dtype=dtype), torch.zeros((), dtype=dtype), torch.ones(1, dtype=dtype)]
    if dtype.is_floating_point:
        tensors[0].requires_grad_()
    for count in (1, 3):
        expected = torch.cat([tensor.detach().flatten() for tensor in tensors[:count]])
        with torch.autocast("cpu", dtype=autocast), torch.no_grad():
            gathered = cuda_lane._concatenated(tensors[:count])
        assert gathered.untyped_storage()._cdata != tensors[0].untyped_storage()._cdata
        assert torch.equal(gathered.flatten(), expected)


@settings(max_examples=120, deadline=None)
@given(
    parts=parts,
    seed=seeds,
    failing=failures,
    limit=st.integers(0, 150),
    before=st.integers(0, 60),
)
def test_a_deferred_copy_has_the_bytes_as_of_the_save_whenever_the_fence_comes(
    parts: list[Part], seed: int, failing: set[int], limit: int, before: int
) -> None:
    with simulated(seed, failing) as machine:
        state = State(machine, parts)
        assume(any(map(state.is_deferred, range(len(parts)))))
        saving = Saving(machine, state, limit)

        def train() -> None:
            copy = saving.save()
            state.change(lambda index: not state.is_deferred(index))
            machine.start(saving.run)
            pauses(machine, before)
            copy.fence()
            state.change(state.is_deferred)

        machine.start(train)
        machine.run()
        state.assert_copied()
        saving.assert_ended()


@settings(max_examples=120, deadline=None)
@given(
    parts=parts,
    seed=seeds,
    failing=failures,
    limit=st.integers(0, 150),
    beside=st.booleans(),
)
def test_memory_that_is_freed_after_the_save_is_not_used_again_before_it_is_copied(
    parts: list[Part], seed: int, failing: set[int], limit: int, *, beside: bool
) -> None:
    with simulated(seed, failing) as machine:
        state = State(machine, parts)
        assume(any(map(state.is_deferred, range(len(parts)))))
        saving = Saving(machine, state, limit)

        def train() -> None:
            ranges = state.make()
            if beside:
                for device in {memory.device for memory in state.memories}:
                    stream = Stream(machine, device)
                    stream.wait_stream(machine.default_stream(device))
                    machine.thread().streams[device] = stream
            copy = saving.save(ranges)
            del ranges
            machine.start(saving.run)
            state.memories.clear()
            copy.fence()

        machine.start(train)
        machine.run()
        state.assert_copied()
        saving.assert_ended()


@settings(max_examples=120, deadline=None)
@given(
    parts=parts,
    seed=seeds,
    failing=failures,
    limit=st.integers(0, 150),
    before=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_two_threads_with_streams_of_their_own_each_fence_what_they_change(
    parts: list[Part], seed: int, failing: set[int], limit: int, before: tuple[int, int]
) -> None:
    with simulated(seed, failing) as machine:
        state = State(machine, parts)
        assume(any(map(state.is_deferred, range(len(parts)))))
        saving = Saving(machine, state, limit)

        def step(copy: DeferredCopy, turn: int) -> None:
            pauses(machine, before[turn])
            copy.fence()
            state.change(lambda index: state.is_deferred(index) and index % 2 == turn)

        def other(copy: DeferredCopy, streams: list[Stream]) -> None:
            machine.thread().streams.update({stream.device: stream for stream in streams})
            step(copy, 1)

        def train() -> None:
            copy = saving.save()
            streams = []
            for device in {memory.device for memory in state.memories}:
                streams.append(Stream(machine, device))
                streams[-1].wait_stream(machine.current_stream(device))
            machine.start(saving.run)
            machine.start(lambda: other(copy, streams))
            step(copy, 0)

        machine.start(train)
        machine.run()
        state.assert_copied()
        saving.assert_ended()


@settings(max_examples=120, deadline=None)
@given(
    parts=parts,
    seed=seeds,
    limit=st.integers(0, 150),
    before=st.tuples(st.sampled_from([0, 20, 300]), st.integers(0, 20), st.integers(0, 40)),
)
def test_nothing_is_copied_any_more_once_cancel_has_returned(
    parts: list[Part], seed: int, limit: int, before: tuple[int, int, int]
) -> None:
    with simulated(seed) as machine:
        state = State(machine, parts)
        assume(any(map(state.is_deferred, range(len(parts)))))
        saving = Saving(machine, state, limit)

        def run(copy: DeferredCopy) -> None:
            pauses(machine, before[0])
            copy.copy.run()

        def cancel(copy: DeferredCopy) -> None:
            pauses(machine, before[1])
            copy.cancel()
            state.assert_nothing_writes()

        def train() -> None:
            copy = saving.save()
            machine.start(lambda: run(copy))
            pauses(machine, before[2])
            machine.start(lambda: cancel(copy))
            copy.fence()
            state.change(state.is_deferred)

        machine.start(train)
        machine.run()
        saving.assert_ended()


@settings(max_examples=30, deadline=None)
@given(parts=parts, seed=seeds, current=st.booleans())
def test_no_context_is_made_on_a_device_that_the_state_is_not_on(
    parts: list[Part], seed: int, *, current: bool
) -> None:
    with simulated(seed) as machine:
        parts = [replace(part, device=1) for part in parts]
        state, blocking = State(machine, parts), State(machine, parts)
        assume(any(map(state.is_deferred, range(len(parts)))))
        saving = Saving(machine, state, 50)

        def train() -> None:
            if current:
                machine.use(torch.device("cuda", 1))
            copy_ranges(blocking.make(), blocking.starts, blocking.lease, blocking.progress())
            copy = saving.save()
            machine.start(saving.run)
            copy.fence()

        machine.start(train)
        machine.run()
        state.assert_copied()
        assert machine.contexts == {torch.device("cuda", 1)}
