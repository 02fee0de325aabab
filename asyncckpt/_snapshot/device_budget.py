"""How much memory of each device clones may take."""

from __future__ import annotations

from collections import defaultdict
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class DeviceBudget:
    """Memory that clones may take on each device.

    Args:
        limit: in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken: dict[torch.device, int] = defaultdict(int)
        self._lock = Lock()

    def left(self, device: torch.device) -> int:
        """Return how many bytes are left."""
        return self.limit - self._taken[device]

    def take(self, device: torch.device, nbytes: int) -> bool:
        """Take a part, if that much is left."""
        with self._lock:
            fits = nbytes <= self.left(device)
            if fits:
                self._taken[device] += nbytes
        return fits

    def give_back(self, device: torch.device, nbytes: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self._taken[device] -= nbytes
