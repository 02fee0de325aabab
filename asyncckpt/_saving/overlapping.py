"""Decide whether a save is overlapped, and which optimizers' tensors it may defer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import torch

from asyncckpt._saving.preparation import Preparation
from asyncckpt._saving.trial import Trial
from asyncckpt._snapshot.deferred import Overlap
from asyncckpt._snapshot.device_budget import DeviceBudget
from asyncckpt._snapshot.fences import watch_steps
from asyncckpt._snapshot.owners import Owners, hooked

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asyncckpt._saving.save import Save

logger = logging.getLogger("asyncckpt")

GuardKind = Literal["version", "checksum"]
DEVICE_MEMORY = 256 << 20


class Overlapping:
    """The choice between blocking and overlapped copies for the saves of one Checkpointer or plugin.

    Where the default is to overlap, it is given up once a snapshot was torn, and on a machine without a GPU
    if the first saves lose more time than blocking ones.

    Args:
        default: for saves that do not say.
        guard: "version" or "checksum".
        device_memory: bytes that clones may take on each device.
        everyone: whether what any optimizer of the process owns may be deferred, attached or not.
        prepares: whether the memory of the first snapshot is made ready before it, by what optimizers own.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """

    def __init__(
        self,
        default: bool,  # noqa: FBT001
        guard: GuardKind = "version",
        device_memory: int = DEVICE_MEMORY,
        *,
        everyone: bool = False,
        prepares: bool = True,
    ) -> None:
        if guard not in {"version", "checksum"}:
            raise ValueError(f'guard must be "version" or "checksum", not {guard!r}')
        if isinstance(device_memory, bool) or not isinstance(device_memory, int):
            raise TypeError(f"device_memory must be an int, in bytes, not {device_memory!r}")
        if device_memory < 0:
            raise ValueError(f"device_memory must not be negative, but is {device_memory}")
        self._default = _checked(default)
        if default:
            watch_steps()
        self._overlap = Overlap(Owners(everyone=everyone), DeviceBudget(device_memory), guard == "checksum")
        self._trial = Trial()
        self._preparation = Preparation(self._overlap.owners)
        if default and prepares:
            self._preparation.begin()
        self._warned = False

    def attach(self, optimizers: Iterable[Any]) -> None:
        """Let what optimizers own be deferred.

        Raises:
            TypeError: one is not a `torch.optim.Optimizer`.
        """
        self._overlap.owners.attach(optimizers)

    def attach_found(self, objects: Iterable[Any]) -> None:
        """Attach the optimizers among the objects of a state, if saves overlap by default."""
        if self._default:
            self.attach(filter(hooked, objects))

    def of(self, overlap: bool | None, objects: Iterable[Any]) -> tuple[Overlap | None, str]:  # noqa: FBT001
        """Return what a save may defer, or None and why it is to copy everything before it returns.

        Args:
            overlap: as given to the save; None for the default.
            objects: the stateful objects of its state; optimizers among them are attached.
        """
        if not (self._default if overlap is None else _checked(overlap)):
            return None, ""
        self._preparation.stop()
        self.attach(filter(hooked, objects))
        if overlap is None:
            reason = self._why_torn() or self._trial.why_blocking()
            if reason:
                return None, reason
        return self._overlap, ""

    def note(self, save: Save, began: float) -> None:
        """Learn from a save that did not say whether to overlap.

        Args:
            save: just started.
            began: when, by `time.perf_counter`.
        """
        if self._default and not save.skipped and not torch.cuda.is_initialized():
            self._trial.begin(began + save.stats.wait, overlapped=save.stats.overlapped)

    def close(self) -> None:
        """Measure and prepare no more."""
        self._trial.end()
        self._preparation.end()

    def _why_torn(self) -> str:
        if not self._overlap.torn:
            return ""
        if not self._warned:
            self._warned = True
            logger.warning("saves are not overlapped any more, since a snapshot was torn")
        return "an earlier snapshot was torn"


def _checked(overlap: Any) -> bool:
    if not isinstance(overlap, bool):
        raise TypeError(f"overlap must be True or False, not {overlap!r}")
    return overlap
