"""Read a file to a GPU: each piece goes there from pinned memory while later ones are being read."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from asyncckpt._loading.landing import Landing
from asyncckpt._snapshot.memory import map_private
from asyncckpt._snapshot.pinning import pin, unpin

if TYPE_CHECKING:
    from torch.storage import UntypedStorage

    from asyncckpt._snapshot.memory import Mapping
    from asyncckpt.layout.zip_reader import Directory


class DeviceLanding(Landing):
    """Storages on a CUDA device; host memory holds only the pieces that are under way.

    Args:
        stream: of the thread that loads: the storages are allocated and filled in its order.
        directory: the records of the file.
    """

    def __init__(self, stream: torch.cuda.Stream, directory: Directory) -> None:
        self._stream = stream
        self._device: int = stream.device.index
        ranges = [(start, stop) for _, start, stop in directory.storages() if stop > start]
        self._starts = [start for start, _ in ranges]
        self._stops = [stop for _, stop in ranges]
        self._outside: list[tuple[int, bytes]] = []  # bytes of the file that belong to no storage
        self._pinned: list[Mapping] = []
        self._free: list[memoryview] = []
        with torch.cuda.stream(stream):
            self._storages = {
                start: torch.empty(stop - start, dtype=torch.uint8, device=stream.device)
                for start, stop in ranges
            }

    def buffer(self, start: int, stop: int) -> memoryview:
        try:
            return self._free.pop()[: stop - start]
        except IndexError:
            mapping = map_private(stop - start, inherited=False)
            with torch.cuda.device(self._device):
                pin(mapping)
            self._pinned.append(mapping)
            return mapping.view[: stop - start]

    def arrived(self, start: int, piece: memoryview) -> None:
        """Copy a piece to the device, and keep what belongs to no storage."""
        host, end, at = torch.frombuffer(piece, dtype=torch.uint8), start + len(piece), start
        with torch.cuda.stream(self._stream):
            for row in range(bisect_right(self._stops, start), bisect_left(self._starts, end)):
                begin, stop = max(self._starts[row], start), min(self._stops[row], end)
                self._keep(at, piece[at - start : begin - start])
                first = self._starts[row]
                target = self._storages[first][begin - first : stop - first]
                target.copy_(host[begin - start : stop - start], non_blocking=True)
                at = stop
            self._stream.synchronize()  # the piece is read into again
        self._keep(at, piece[at - start :])
        self._free.append(piece)  # only the last one is shorter than its buffer

    def end(self) -> None:
        """Give the host memory back."""
        self._outside.sort()
        self._free.clear()
        while self._pinned:
            mapping = self._pinned.pop()
            unpin(mapping, self._device)
            mapping.close()

    def storage(self, start: int, stop: int) -> UntypedStorage:  # noqa: ARG002 - as of all landings
        return self._storages[start].untyped_storage()

    def read(self, start: int, stop: int) -> bytes:
        found = bytearray(stop - start)
        first = max(bisect_right(self._outside, (start, b"")) - 1, 0)
        for at, data in self._outside[first:]:
            if at >= stop:
                break
            begin, end = max(at, start), min(at + len(data), stop)
            if begin < end:
                found[begin - start : end - start] = data[begin - at : end - at]
        return bytes(found)

    def close(self) -> None:
        with suppress(RuntimeError):  # of the device, which is why it is closed
            self._stream.synchronize()
        self._storages.clear()
        self.end()

    def _keep(self, start: int, data: memoryview) -> None:
        if len(data):
            self._outside.append((start, bytes(data)))
