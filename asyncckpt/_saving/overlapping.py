"""Decide whether a save is overlapped, and which optimizers' tensors it may defer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from asyncckpt._snapshot.deferred import Overlap
from asyncckpt._snapshot.device_budget import DeviceBudget
from asyncckpt._snapshot.fences import watch_steps
from asyncckpt._snapshot.owners import Owners, hooked

if TYPE_CHECKING:
    from collections.abc import Iterable

GuardKind = Literal["version", "checksum"]
DEVICE_MEMORY = 256 << 20


class Overlapping:
    """The choice between blocking and overlapped copies for the saves of one Checkpointer or plugin.

    Args:
        default: for saves that do not say.
        guard: "version" or "checksum".
        device_memory: bytes that clones may take on each device.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """

    def __init__(self, default: bool, guard: GuardKind, device_memory: int) -> None:  # noqa: FBT001
        if guard not in {"version", "checksum"}:
            raise ValueError(f'guard must be "version" or "checksum", not {guard!r}')
        if isinstance(device_memory, bool) or not isinstance(device_memory, int):
            raise TypeError(f"device_memory must be an int, in bytes, not {device_memory!r}")
        if device_memory < 0:
            raise ValueError(f"device_memory must not be negative, but is {device_memory}")
        self._default = _checked(default)
        if default:
            watch_steps()
        self._overlap = Overlap(Owners(), DeviceBudget(device_memory), guard == "checksum")

    def attach(self, optimizers: Iterable[Any]) -> None:
        """Let what optimizers own be deferred.

        Raises:
            TypeError: one is not a `torch.optim.Optimizer`.
        """
        self._overlap.owners.attach(optimizers)

    def of(self, overlap: bool | None, objects: Iterable[Any]) -> Overlap | None:  # noqa: FBT001
        """Return what a save may defer; None if it is to copy everything before it returns.

        Args:
            overlap: as given to the save; None for the default.
            objects: the stateful objects of its state; optimizers among them are attached.
        """
        if not (self._default if overlap is None else _checked(overlap)):
            return None
        self.attach(filter(hooked, objects))
        return self._overlap


def _checked(overlap: Any) -> bool:
    if not isinstance(overlap, bool):
        raise TypeError(f"overlap must be True or False, not {overlap!r}")
    return overlap
