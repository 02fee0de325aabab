"""Choose the memory that a file is read into, by where its tensors go."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._loading.device_landing import DeviceLanding
from asyncckpt._loading.fitting import is_dense
from asyncckpt._loading.landing import LeasedLanding, OwnLanding
from asyncckpt._loading.stateful import CONTAINERS
from asyncckpt.errors import BusyError, SaveError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asyncckpt._loading.landing import Land, Landing
    from asyncckpt._loading.unpickle import MapLocation
    from asyncckpt._snapshot.arena import Arena, Lease
    from asyncckpt.layout.zip_reader import Directory


def land_for_load(map_location: MapLocation) -> Land:
    """Return where a file lands whose state is the result: on a CUDA device, if all of it is to be there."""
    if isinstance(map_location, (str, torch.device)) and torch.cuda.is_available():
        try:
            device = torch.device(map_location)
        except RuntimeError:
            return OwnLanding  # torch.load says what is wrong with it
        if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
            return partial(DeviceLanding, torch.cuda.current_stream(device))
    return OwnLanding


class RestoreLandings:
    """Where the files of one restore land: in the arena, if their content is copied from there.

    What is copied to the CPU lands in a free buffer of the arena, if it has one. What goes to a GPU lands in
    pinned memory, which the next save needs as well.

    Args:
        live: the state to be restored.
        arena: the host memory of snapshots.
    """

    def __init__(self, live: Any, arena: Arena) -> None:
        self._arena = arena
        self._landings: list[LeasedLanding] = []
        tensors, self._keeps = _destinations(live)
        on_cuda = any(tensor.is_cuda for tensor in tensors)
        self._device = torch.cuda.current_device() if on_cuda else None

    def land(self, directory: Directory) -> Landing:
        """Take memory for a file."""
        lease = None if self._keeps else self._lease(directory.storages_end)
        if lease is None:
            return OwnLanding(directory)
        landing = LeasedLanding(lease)
        self._landings.append(landing)
        return landing

    def give_back(self) -> None:
        """Give the buffers back to the arena, once nothing is copied from them any more."""
        while self._landings:
            self._landings.pop().give_back()

    def _lease(self, nbytes: int) -> Lease | None:
        if self._device is None:
            return self._arena.lease_free(nbytes)
        try:
            with torch.cuda.device(self._device):
                return self._arena.lease(nbytes, pinned=True, wait=False)
        except (BusyError, SaveError):
            return None


def _destinations(live: Any) -> tuple[list[torch.Tensor], bool]:
    """Return the tensors that a restore changes, as far as they are known, and if it keeps loaded ones.

    An optimizer without state on the CPU keeps what it loads.
    """
    tensors: list[torch.Tensor] = []
    keeps = False
    pending, seen = [live], set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.nn.Module):
            tensors += _dense(chain(item.parameters(), item.buffers()))
        elif isinstance(item, torch.optim.Optimizer):
            params = _dense(param for group in item.param_groups for param in group["params"])
            tensors += params
            keeps |= any(param.is_cpu and param not in item.state for param in params)
        elif isinstance(item, torch.Tensor):
            tensors += _dense([item])
        elif isinstance(item, CONTAINERS):
            pending.extend(item.values() if isinstance(item, dict) else item)
    return tensors, keeps


def _dense(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors if is_dense(tensor)]
