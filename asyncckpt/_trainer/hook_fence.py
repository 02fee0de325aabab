"""Fence pending copies before hooks that may change parameters without a step of an optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asyncckpt._trainer.own_code import may_change_parameters

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch.callbacks import Callback as Base
    from typing_extensions import Self

    from asyncckpt._trainer.checkpoint_io import BackgroundIO
else:
    Base = object

# What comes between two batches of a fit. During the next batch copies are meant to continue.
_HOOKS = (
    "on_train_epoch_start", "on_train_epoch_end", "on_train_end", "on_validation_start",
    "on_validation_epoch_start", "on_validation_epoch_end", "on_validation_end", "on_exception",
)  # fmt: skip


class HookFence(Base):
    """A callback, before all others, that fences overlapped saves before hooks that may change parameters.

    Args:
        io: carries out the saves.
    """

    def __init__(self, io: BackgroundIO) -> None:
        self.io = io

    @classmethod
    def put_first(cls, trainer: Any, io: BackgroundIO) -> None:
        """Put one before the callbacks of a trainer until `remove`, unless there is one for `io`."""
        if all(fence.io is not io for fence in cls._of(trainer)):
            # A new list: Lightning may be iterating over the old one.
            trainer.callbacks = [cls(io), *trainer.callbacks]

    @classmethod
    def remove(cls, trainer: Any) -> None:
        """Remove it from the callbacks of a trainer."""
        for fence in cls._of(trainer):
            trainer.callbacks = [callback for callback in trainer.callbacks if callback is not fence]

    @classmethod
    def _of(cls, trainer: Any) -> list[Self]:
        return [callback for callback in trainer.callbacks if isinstance(callback, cls)]


def _fencing(hook: str) -> Callable[..., None]:
    def fence(self: HookFence, trainer: Any, *_: Any) -> None:
        owners = (*trainer.callbacks, trainer.lightning_module)
        if any(may_change_parameters(owner, hook) for owner in owners):
            self.io.fence()

    return fence


for _hook in _HOOKS:
    setattr(HookFence, _hook, _fencing(_hook))
