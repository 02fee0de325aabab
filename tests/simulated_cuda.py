"""CUDA streams on CPU tensors: host threads and streams advance one at a time, in an order that a test draws.

What is queued on a stream runs when its turn comes, so every order that CUDA allows may happen, however late.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections import deque
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    import pytest


_CHANGE = 0.02  # how often a pace changes


class ReadAfterFreeError(Exception):
    """A stream used memory of another stream that the host had freed."""


class _AbortedError(BaseException):
    """Ends the threads of a test that has failed."""


class Memory:
    """Device memory of one stream: the allocator gives it to what is queued there once it is freed."""

    def __init__(self, machine: Machine, device: torch.device, nbytes: int) -> None:
        self.device = device
        self.streams = {machine.current_stream(device)}  # which the allocator knows to use it
        with torch.inference_mode(mode=False):  # streams use it from another thread
            self.bytes = torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    @property
    def _cdata(self) -> int:
        return id(self)

    def nbytes(self) -> int:
        return self.bytes.nbytes


class View:
    """Contiguous bytes of device memory, as a tensor of some dtype."""

    def __init__(self, memory: Memory, offset: int, nbytes: int, dtype: torch.dtype = torch.uint8) -> None:
        self.memory, self.offset, self.nbytes, self.dtype = memory, offset, nbytes, dtype

    def __getitem__(self, index: slice) -> View:
        start, stop, _ = index.indices(self.nbytes)
        return View(self.memory, self.offset + start, stop - start)

    def is_contiguous(self) -> bool:
        return True

    def record_stream(self, stream: Stream) -> None:
        self.memory.streams.add(stream)

    def untyped_storage(self) -> Memory:
        return self.memory


class Event:
    """A point in the queue of a stream; waits are for where it was recorded last."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._reached: list[int] | None = None

    def record(self, stream: Stream) -> None:
        reached: list[int] = []
        self._reached = reached
        stream.add(lambda: reached.append(next(self._machine.clock)))

    def synchronize(self) -> None:
        self._machine.contexts.add(self._machine.thread().device)  # the runtime makes one, if there is none
        self._machine.pause(self.is_reached())

    def elapsed_time(self, end: Event) -> float:
        assert self._reached
        assert end._reached, "an event was asked for its time before it had one"
        return float(end._reached[0] - self._reached[0])

    def is_reached(self) -> Callable[[], bool]:
        reached = self._reached
        return lambda: reached is None or bool(reached)


class Stream:
    """A queue of operations, each with a condition that it waits for."""

    def __init__(self, machine: Machine, device: torch.device) -> None:
        self.device = device
        self._machine = machine
        self._queue: deque[tuple[Callable[[], bool], Callable[[], object]]] = deque()
        machine.streams.append(self)

    def add(self, do: Callable[[], object], ready: Callable[[], bool] = lambda: True) -> None:
        self._queue.append((ready, do))
        self._machine.pause()

    def can_advance(self) -> bool:
        return bool(self._queue) and self._queue[0][0]()

    def is_idle(self) -> bool:
        return not self._queue

    def advance(self) -> None:
        _, do = self._queue.popleft()
        do()

    def record_event(self) -> Event:
        event = Event(self._machine)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.add(lambda: None, event.is_reached())

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self._machine.pause(self.record_event().is_reached())


class HostThread:
    """A thread that runs while the machine has chosen it, up to its next call of `pause`."""

    def __init__(self, machine: Machine, program: Callable[[], object]) -> None:
        self.ready: Callable[[], bool] = lambda: True
        self.ended = False
        self.error: BaseException | None = None
        self.device = torch.device("cuda", 0)
        self.interrupted_after = 0  # calls of `pause`; 0 for never
        self.streams: dict[torch.device, Stream] = {}
        self._machine, self._program = machine, program
        self._go, self._stop = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="simulated", daemon=True)
        self._thread.start()

    def advance(self) -> None:
        self._go.release()
        assert self._stop.acquire(timeout=60)

    def pause(self, ready: Callable[[], bool]) -> None:
        self.ready = ready
        self._stop.release()
        self._go.acquire()
        if self._machine.is_aborted:
            raise _AbortedError
        if self.interrupted_after:
            self.interrupted_after -= 1
            if not self.interrupted_after:
                raise KeyboardInterrupt

    def abort(self) -> None:
        while not self.ended:
            self.advance()
        self._thread.join(60)

    def _run(self) -> None:
        self._go.acquire()
        self._machine.here.thread = self
        try:
            if not self._machine.is_aborted:
                self._program()
        except BaseException as error:  # noqa: BLE001 - raised by the machine
            self.error = error
        self.ended = True
        self._stop.release()


class Machine:
    """A host and its devices.

    Args:
        seed: of the order in which threads and streams advance; some are much slower than others.
        failing: which allocations fail, by number.
    """

    def __init__(self, seed: int, failing: Collection[int] = ()) -> None:
        self.streams: list[Stream] = []
        self.clock = count()
        self.is_aborted = False
        self.is_capturing = False
        self.looks_again = False  # whether waiting threads are woken once where nothing else can advance
        self.here = threading.local()
        self.contexts: set[torch.device] = set()
        self.allocated: dict[torch.device, int] = {}
        self.most_allocated: dict[torch.device, int] = {}
        self.host_writes = 0  # copies to host memory that have not run
        self._failing, self._allocations = frozenset(failing), count()
        self._random = random.Random(seed)
        self._paces: WeakKeyDictionary[HostThread | Stream, float] = WeakKeyDictionary()
        self._threads: list[HostThread] = []
        self._default: dict[torch.device, Stream] = {}

    def start(self, program: Callable[[], object]) -> HostThread:
        thread = HostThread(self, program)
        self._threads.append(thread)
        return thread

    def run(self) -> None:
        """Advance threads and streams until all of them have ended."""
        try:
            while True:
                failed = [thread.error for thread in self._threads if thread.error is not None]
                if failed:
                    raise failed[0]
                able: list[HostThread | Stream] = [
                    thread for thread in self._threads if not thread.ended and thread.ready()
                ]
                able += [stream for stream in self.streams if stream.can_advance()]
                if not able:
                    if self.looks_again and not all(thread.ended for thread in self._threads):
                        self.looks_again, able = False, [one for one in self._threads if not one.ended]
                    else:
                        break
                self._random.choices(able, [self._pace(one) for one in able])[0].advance()
            assert all(thread.ended for thread in self._threads), "a thread waits forever"
            assert all(stream.is_idle() for stream in self.streams), "a stream waits forever"
        finally:
            self.is_aborted = True
            for thread in self._threads:
                thread.abort()

    def thread(self) -> HostThread:
        thread: HostThread = self.here.thread
        return thread

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others advance, and go on once `ready` is true and the calling thread is chosen."""
        self.thread().pause(ready)

    def use(self, device: torch.device) -> None:
        """Make a device the current one of the calling thread, which needs a context on it."""
        self.thread().device = device
        self.contexts.add(device)

    def current_stream(self, device: torch.device) -> Stream:
        return self.thread().streams.get(device) or self.default_stream(device)

    def default_stream(self, device: torch.device) -> Stream:
        return self._default.get(device) or self._default.setdefault(device, Stream(self, device))

    def allocate(self, device: torch.device, nbytes: int) -> Memory:
        """Allocate memory of the current stream, or raise what CUDA raises where there is none."""
        if next(self._allocations) in self._failing:
            raise torch.cuda.OutOfMemoryError
        memory = Memory(self, device, nbytes)
        self._count(device, nbytes)
        weakref.finalize(memory, self._count, device, -nbytes)
        return memory

    def copy(self, target: View | torch.Tensor, source: View) -> None:
        """Queue a copy on the current stream."""
        stream = self.current_stream(source.memory.device)
        find = self._finder(source, stream)
        if isinstance(target, View):
            place = self._finder(target, stream)
            stream.add(lambda: place().copy_(find()))
            return
        self.host_writes += 1

        def write() -> None:
            self.host_writes -= 1
            target.copy_(find())

        stream.add(write)

    def change(self, memory: Memory, content: torch.Tensor) -> None:
        """Queue a kernel on the current stream that writes into memory."""
        self.current_stream(memory.device).add(lambda: memory.bytes.copy_(content))

    def concatenated(self, sources: Sequence[View]) -> View:
        (device,) = {source.memory.device for source in sources}
        assert len({source.dtype for source in sources}) == 1
        image = View(self.allocate(device, sum(source.nbytes for source in sources)), 0, 0)
        image.nbytes = image.memory.nbytes()
        at = 0
        for source in sources:
            self.copy(image[at : at + source.nbytes], source)
            at += source.nbytes
        return image

    def condition(self) -> _Condition:
        return _Condition(self)

    def lock(self) -> _Lock:
        return _Lock(self)

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before = self.thread().device
        self.use(device)
        try:
            yield
        finally:
            if before in self.contexts:
                self.thread().device = before

    @contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        thread = self.thread()
        device, before = thread.device, thread.streams.get(stream.device)
        thread.streams[stream.device] = stream
        self.use(stream.device)
        try:
            yield
        finally:
            if before is None:
                del thread.streams[stream.device]
            else:
                thread.streams[stream.device] = before
            self.use(device)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put this machine in the place of CUDA and of what threads wait for."""
        room = "asyncckpt._snapshot"
        names = SimpleNamespace(
            Stream=lambda device: Stream(self, device),
            Event=lambda *, enable_timing=False: Event(self),  # noqa: ARG005
            OutOfMemoryError=torch.cuda.OutOfMemoryError,
            current_stream=self.current_stream,
            default_stream=self.default_stream,
            device=self.on_device,
            is_current_stream_capturing=lambda: self.is_capturing,
            set_device=self.use,
            stream=self.on_stream,
        )
        lane = {
            "_concatenated": self.concatenated,
            "_copy": self.copy,
            "_memory": lambda nbytes, device: View(self.allocate(device, nbytes), 0, nbytes),
            "_pinned": lambda nbytes: torch.full((nbytes,), 0x5A, dtype=torch.uint8),
            "Lock": self.lock,
            "allow_captures": lambda: self.use(self.thread().device),
            "bytes_of": lambda memory: View(memory, 0, memory.nbytes()),
            "cuda": names,
        }
        for name, value in lane.items():
            monkeypatch.setattr(f"{room}.cuda_lane.{name}", value)
        monkeypatch.setattr(f"{room}.range_copy.Condition", self.condition)

    def _pace(self, one: HostThread | Stream) -> float:
        if one not in self._paces or self._random.random() < _CHANGE:
            self._paces[one] = self._random.choice([1, 30, 1000])
        return self._paces[one]

    def _finder(self, view: View, stream: Stream) -> Callable[[], torch.Tensor]:
        """Return what finds the bytes of a view when an operation on `stream` runs."""
        memory = weakref.ref(view.memory)
        streams, found = view.memory.streams, view.memory.bytes[view.offset : view.offset + view.nbytes]

        def find() -> torch.Tensor:
            # What these streams use is used again only behind their operations.
            if memory() is None and stream not in streams:
                raise ReadAfterFreeError
            return found

        return find

    def _count(self, device: torch.device, nbytes: int) -> None:
        self.allocated[device] = self.allocated.get(device, 0) + nbytes
        self.most_allocated[device] = max(self.most_allocated.get(device, 0), self.allocated[device])


class _Lock:
    def __init__(self, machine: Machine) -> None:
        self._machine, self._taken = machine, False

    def __enter__(self) -> None:
        while self._taken:
            self._machine.pause(lambda: not self._taken)
        self._taken = True

    def __exit__(self, *_: object) -> None:
        self._taken = False


class _Condition:
    """`asyncckpt._threads.Condition`; others may advance whenever its lock is released."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._changes = machine, 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        if error == (None, None, None):
            self._machine.pause()

    def until(self, attempt: Callable[[], Any], timeout: float | None = None) -> Any:
        while not (result := attempt()) and timeout != 0:
            self._machine.pause(lambda seen=self._changes: self._changes != seen)  # type: ignore[misc]
        return result

    def notify_all(self) -> None:
        self._changes += 1
