"""Tell whether tensors changed while they were copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._snapshot.capture_mode import allow_captures
from asyncckpt._snapshot.culprit import find_culprit
from asyncckpt._snapshot.lanes import bytes_of
from asyncckpt._snapshot.local_tensors import local_of
from asyncckpt.errors import TornSnapshotError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.storage import UntypedStorage

    from asyncckpt._snapshot.ranges import Ranges

_REMEDY = (
    "only steps of attached optimizers may change what an overlapped save copies; call fence() before other"
    " changes, or save with overlap=False"
)
# Words that are fingerprinted at once; they take three times their size for a moment.
_WORDS = 1 << 21
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)
_LOW = (1 << 33) - 1


class Guard:
    """The version counters of tensors as they were at the freeze, and the addresses of their storages.

    An operation of torch that changes a tensor in place raises its version when it ends. That of a DTensor
    and that of its local tensor rise apart: both are watched.

    Args:
        tensors: one or more for each storage.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        # Views keep the counters and the storages where a tensor gets others (`p.data = x`, swap_tensors).
        locals_ = [local_of(tensor) for tensor in tensors]
        views = [local.detach() for local in locals_]
        # To detach a DTensor would take 50 us.
        wrappers = [
            (tensor, view)
            for tensor, local, view in zip(tensors, locals_, views, strict=True)
            if local is not tensor
        ]
        # What has the counter, and what has the memory.
        self._watched = [*zip(views, views, strict=True), *wrappers]
        self._before = self._now()

    def changed(self) -> UntypedStorage | None:
        """Return the storage of a tensor that was changed, or whose memory was moved, if there is one."""
        now = self._now()
        if now == self._before:
            return None
        pairs = zip(self._watched, self._before, now, strict=True)
        return next(view.untyped_storage() for (_, view), before, after in pairs if before != after)

    def _now(self) -> list[tuple[int, int]]:
        return [(tensor._version, view.untyped_storage().data_ptr()) for tensor, view in self._watched]


class Checksums:
    """Checksums of live memory at the freeze, computed on its device, in the order of the training stream.

    Args:
        ranges: whose bytes they are of.
        starts: where in the buffer each is copied to.
    """

    def __init__(self, ranges: Ranges, starts: Sequence[int]) -> None:
        self._storages = ranges.sources
        self._places = list(zip(starts, ranges.sizes, strict=True))
        self._found = [
            fingerprint(bytes_of(storage)[offset : offset + nbytes])
            for storage, offset, nbytes, _ in zip(*ranges, strict=True)
        ]

    def differing(self, buffer: memoryview) -> UntypedStorage | None:
        """Return the storage of a range whose copy in `buffer` has another checksum, if there is one."""
        if any(found.is_cuda for found in self._found):
            allow_captures()
        copied = torch.frombuffer(buffer, dtype=torch.uint8)
        for storage, (start, nbytes), found in zip(self._storages, self._places, self._found, strict=True):
            if int(fingerprint(copied[start : start + nbytes])) != int(found):
                return storage
        return None


def torn_error(state: Any, storage: UntypedStorage, what: str) -> TornSnapshotError:
    """Return the error for a storage of `state` that did not hold still."""
    return TornSnapshotError(f"{_path(state, storage)} {what}; {_REMEDY}")


def fingerprint(memory: torch.Tensor) -> torch.Tensor:
    """Return a hash of bytes, on their device, without waiting for it; any change of a word changes it.

    Args:
        memory: uint8, of any length, at any alignment.

    Returns:
        int64, shape (): the sum of all words, each mixed with its position.
    """
    whole = memory.nbytes // 8 * 8
    rest = memory[whole:].to(torch.int64)
    total = (rest * torch.arange(1, rest.numel() + 1, device=memory.device)).sum()
    if memory.storage_offset() % 8:
        memory = memory.clone()
    words = memory[:whole].view(torch.int64)
    for at in range(0, words.numel(), _WORDS):
        piece = words[at : at + _WORDS]
        mixed = torch.arange(at, at + piece.numel(), device=memory.device).mul_(_ODD).bitwise_xor_(piece)
        # A product alone would carry a change of the highest bit to the highest bit only.
        mixed.bitwise_xor_((mixed >> 31).bitwise_and_(_LOW)).mul_(_ODD)
        total += mixed.bitwise_xor_((mixed >> 29).bitwise_and_(_LOW)).sum()
    return total


def _path(state: Any, storage: UntypedStorage) -> str:
    """Return the path of an entry that views `storage`; training may change the containers meanwhile."""
    try:
        return find_culprit(state, _probe(storage))
    except Exception:  # noqa: BLE001 - the error is raised without the path then
        return f"a tensor of {storage.nbytes()} bytes"


def _probe(storage: UntypedStorage) -> Callable[[object], None]:
    """Return a function that raises for what views `storage`."""

    def probe(value: object) -> None:
        pending, seen = [value], set()
        while pending:
            item = pending.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, torch.Tensor) and item.layout is torch.strided:
                if local_of(item).untyped_storage()._cdata == storage._cdata:
                    raise LookupError
            elif isinstance(item, dict):
                pending.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                pending.extend(item)

    return probe
