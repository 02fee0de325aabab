"""What tests of overlapped saves need: saves that are held back, and what they must have written."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt import Checkpointer
from sameness import assert_same
from support import assert_waits, torch_round_trip
from trainings import WIDTH, momentum, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from asyncckpt import Save
    from asyncckpt.testing import Gate
    from copier import Copier
    from trainings import Phase, Training


_MOMENTUM = partial(train, make_optimizer=momentum)


class Held:
    """A training whose optimizer has made a step, and a Checkpointer; use it as a context.

    Args:
        copier: holds copies back; opened at the end.
        path: the directory of the Checkpointer.
        make: makes the training.
        gate: opened at the end, too.
        options: of the Checkpointer.

    Attributes:
        ckpt: the Checkpointer.
        training: the training.
        expected: for each save, what it must have written.
    """

    def __init__(
        self,
        copier: Copier,
        path: Path | None = None,
        make: Callable[[Phase], Training] = _MOMENTUM,
        gate: Gate | None = None,
        **options: Any,
    ) -> None:
        self._copier = copier
        self._gate = gate
        self.ckpt = Checkpointer(path, overlap=True, **options)
        self.training = make(lambda _: None)
        self.model: Any = self.training.objects["model"]
        self.opt: torch.optim.Optimizer = self.training.objects["opt"]
        self.expected: dict[int, Any] = {}
        self.ckpt.attach(self.opt)
        self.training.step()

    def __enter__(self) -> Self:
        self.ckpt.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._copier.open()
        if self._gate is not None:
            self._gate.open()
        self.ckpt.__exit__(kind, error, trace)

    def save(self, step: int = 1, state: Any = None, **options: Any) -> Save:
        """Save the training, or another state, and hold the copy back before its first piece."""
        state = self.training.plain_state() if state is None else state
        self.expected[step] = torch_round_trip(state)
        self._copier.hold()
        save = self.ckpt.save(step, state, overlap=True, **options)
        assert save.stats.overlapped, save.stats.reason
        self._copier.wait_for_arrival()
        return save

    def assert_saved(self, save: Save) -> None:
        """Let all pieces pass, and assert that a save is committed as it was to be."""
        assert save.step is not None
        self._copier.open()
        path = save.committed.result(30).path
        assert_same(torch.load(path, weights_only=False), self.expected[save.step])

    def backward(self) -> None:
        """Compute gradients, so that a step of the optimizer changes all parameters."""
        self.model(torch.ones(2, WIDTH)).square().mean().backward()

    def values(self) -> list[torch.Tensor]:
        """Return what the parameters are now."""
        return [parameter.detach().clone() for parameter in self.model.parameters()]


class Call:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def assert_waits(self) -> None:
        """Return once it waits for asyncckpt; fail if it returns instead."""
        assert_waits(self._has_returned, [self._thread])

    def join(self) -> None:
        """Wait for its end, and raise what it has raised."""
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def _has_returned(self) -> bool:
        if not self._thread.is_alive():
            self.join()
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001 - raised by `join`
            self.error = error
