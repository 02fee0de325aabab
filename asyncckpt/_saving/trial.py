"""Measure on the first saves whether overlapped copies lose less time than blocking ones."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from asyncckpt._snapshot import fences

if TYPE_CHECKING:
    from torch.optim.optimizer import Optimizer

logger = logging.getLogger("asyncckpt")

# Of each kind, by turns; the first two, which also take memory, do not count.
_SAVES = 4


class Trial:
    """Take the first saves by turns, and compare how long each was from its call to the next step.

    That is the save without waits for earlier ones, the next forward and backward pass beside it, and the
    wait at the fence.
    """

    def __init__(self) -> None:
        self._spans: dict[bool, list[float]] = {True: [], False: []}
        self._measured: tuple[float, bool] | None = None  # the start of a save, and whether it is overlapped
        self._reason: str | None = None

    def why_blocking(self) -> str:
        """Return why the next save is to be blocking; nothing if it is to overlap."""
        if self._reason is None:
            overlapped, blocking = self._spans[True], self._spans[False]
            if len(blocking) < min(len(overlapped), _SAVES):
                return "measured, to be compared with overlapped saves"
            if len(overlapped) >= _SAVES:
                self._reason = _decide(min(overlapped[1:]), min(blocking[1:]))
        return self._reason or ""

    def begin(self, began: float, *, overlapped: bool) -> None:
        """Measure a save until the next step."""
        if self._reason is None:
            self._measured = began, overlapped
            fences.watch(self)

    def end(self) -> None:
        """Measure no more."""
        self._measured = None
        fences.unwatch(self)

    def __call__(self, _: Optimizer) -> None:
        """Note a step."""
        measured = self._measured
        self.end()
        if measured is not None:
            began, overlapped = measured
            self._spans[overlapped].append(time.perf_counter() - began)


def _decide(overlapped: float, blocking: float) -> str:
    if overlapped <= blocking:
        return ""
    reason = f"they lose time here: {overlapped:.3f} s up to the next step, {blocking:.3f} s if blocking"
    logger.warning("saves are not overlapped any more: %s", reason)
    return reason
