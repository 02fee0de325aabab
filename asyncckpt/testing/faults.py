"""Which call is to fail, and with what."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class _Fault:
    operation: str
    error: BaseException
    first: int
    times: int | None
    where: Callable[[str], bool] | None
    seen: int = 0

    def strikes(self, operation: str, subject: str) -> bool:
        if operation != self.operation or (self.where is not None and not self.where(subject)):
            return False
        self.seen += 1
        return self.seen >= self.first and (self.times is None or self.seen < self.first + self.times)


@dataclass
class Faults:
    """The failures that are still to come; used from several threads."""

    _faults: list[_Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(
        self,
        operation: str,
        error: BaseException,
        *,
        at: int = 1,
        times: int | None = 1,
        where: Callable[[str], bool] | None = None,
    ) -> None:
        """Let calls of an operation fail.

        Args:
            operation: the name of the method.
            error: what it raises.
            at: which call from now on is the first to fail, counted from 1.
            times: how many fail from there on; None for all.
            where: counts only calls whose subject, a name or a path, this is true of.
        """
        with self._lock:
            self._faults.append(_Fault(operation, error, at, times, where))

    def clear(self) -> None:
        """Let everything work again."""
        with self._lock:
            self._faults.clear()

    def check(self, operation: str, subject: str) -> None:
        """Raise what this call is to fail with, if anything."""
        with self._lock:
            struck = [fault for fault in self._faults if fault.strikes(operation, subject)]
        if struck:
            raise struck[0].error
