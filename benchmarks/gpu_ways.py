"""Ways to take a copy of a training's state: asyncckpt's, and bare copies into pinned host memory."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from asyncckpt import Checkpointer, Save
    from asyncckpt._bench.training import PlainCopy

    Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]


class Way(ABC):
    """One way to take a copy while the training goes on."""

    @abstractmethod
    def begin(self, step: int) -> None:
        """Start, between two steps; returns when the next one may begin."""

    def fence(self) -> None:  # noqa: B027 - most do without
        """Wait for what has to be over before the parameters change."""

    @abstractmethod
    def end(self) -> None:
        """Wait until the copy is complete, and durable where it is saved."""


class Saved(Way):
    """A save with asyncckpt; its fence is the optimizer's own hook.

    Args:
        checkpointer: saves.
        state: returns the state to save at a step.
        overlap: as `save` takes it.

    Attributes:
        save: the last one.
    """

    save: Save

    def __init__(self, checkpointer: Checkpointer, state: Callable[[int], Any], *, overlap: bool) -> None:
        self._checkpointer, self._state, self._overlap = checkpointer, state, overlap

    def begin(self, step: int) -> None:
        """Save."""
        self.save = self._checkpointer.save(step, self._state(step), overlap=self._overlap)

    def end(self) -> None:
        """Wait until the checkpoint is durable and the one before is evicted."""
        self.save.committed.result()
        self._checkpointer.wait()


class Blocking(Way):
    """A bare copy that the training stands still for."""

    def __init__(self, copy: PlainCopy) -> None:
        self._copy = copy

    def begin(self, step: int) -> None:  # noqa: ARG002 - nothing is named after it
        """Copy."""
        self._copy.run()

    def end(self) -> None:
        """Do nothing: all is there."""


class HandMade(Way):
    """A copy beside the training, which waits for it before the parameters change."""

    def __init__(self, copy: PlainCopy, device: str) -> None:
        self._copy, self._beside = copy, beside(device)

    def begin(self, step: int) -> None:  # noqa: ARG002
        """Start the copy."""
        self._beside.start(self._copy.pairs)

    def fence(self) -> None:
        """Let the training wait for the copy."""
        self._beside.hold()

    def end(self) -> None:
        """Wait for the copy."""
        self._beside.finish()


class Cloned(Way):
    """A clone on the device, which is copied beside the training: as much device memory as the state has."""

    def __init__(self, copy: PlainCopy, device: str) -> None:
        self._copy, self._beside = copy, beside(device)
        self._clones: list[torch.Tensor] = []

    def begin(self, step: int) -> None:  # noqa: ARG002
        """Clone, and start the copy."""
        self._clones = [source.clone() for _, source in self._copy.pairs]
        targets = [target for target, _ in self._copy.pairs]
        self._beside.start(list(zip(targets, self._clones, strict=True)))

    def end(self) -> None:
        """Wait for the copy, and drop the clone."""
        self._beside.finish()
        self._clones.clear()


class _Stream:
    """Copies on a stream of its own."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._done = torch.cuda.Event()

    def start(self, pairs: Pairs) -> None:
        """Copy when the training stream has done what it was given so far."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        self._done.record(self._stream)

    def hold(self) -> None:
        """Let the training stream wait; the host goes on."""
        torch.cuda.current_stream().wait_event(self._done)

    def finish(self) -> None:
        """Wait for the copies."""
        self._stream.synchronize()


class _Thread:
    """Copies in a thread: what stands for a stream on the CPU."""

    def __init__(self) -> None:
        self._thread = threading.Thread()

    def start(self, pairs: Pairs) -> None:
        """Copy from now on."""

        def copy() -> None:
            for target, source in pairs:
                target.copy_(source)

        self._thread = threading.Thread(target=copy)
        self._thread.start()

    def hold(self) -> None:
        """Wait for the copies."""
        self._thread.join()

    finish = hold


def beside(device: str) -> _Stream | _Thread:
    """Return what copies beside the training of a device."""
    return _Stream() if device == "cuda" else _Thread()
