"""Make the host memory of the first snapshot ready in the background, once the state is there."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakSet

from asyncckpt._ranks.group import process_group
from asyncckpt._saving.engine import get_engine
from asyncckpt._snapshot import fences
from asyncckpt._snapshot.local_tensors import is_dtensor, local_of
from asyncckpt.errors import SaveError

if TYPE_CHECKING:
    from torch.optim.optimizer import Optimizer

    from asyncckpt._snapshot.owners import Owners

# A file has a header for each storage, and a state has more than an optimizer owns: buffers, for example.
_PER_STORAGE, _MORE, _SHARE = 256, 32 << 10, 1.02


class Preparation:
    """Prepares memory before an attached optimizer steps for the second time, and has its state.

    The size is a guess: the parameters and the state of all attached optimizers that have stepped, and a
    little more. If the first snapshot is larger, its memory is made ready then, in place of this.

    In a process group, a rank other than 0 prepares only if its tensors are sharded: else it may never save.

    Args:
        owners: the optimizers.
    """

    def __init__(self, owners: Owners) -> None:
        self._owners = owners
        self._stepped: WeakSet[Optimizer] = WeakSet()

    def begin(self) -> None:
        """Wait for a second step."""
        fences.watch(self)

    def stop(self) -> None:
        """Prepare nothing any more: the first save takes its memory itself."""
        fences.unwatch(self)

    def end(self) -> None:
        """Stop, and let memory that nobody else uses be released."""
        self.stop()
        get_engine().leave(self)

    def __call__(self, optimizer: Optimizer) -> None:
        """Note a step; prepare before the second one of the same optimizer."""
        if optimizer not in self._owners:
            return
        if optimizer not in self._stepped:
            self._stepped.add(optimizer)
            return
        self.stop()
        owned = self._owners.tensors(fences.seen())
        group, is_sharded = process_group(), any(is_dtensor(found[0]) for found in owned.values())
        if group is not None and group.rank and not is_sharded:
            return
        storages = {key: local_of(found[0]).untyped_storage() for key, found in owned.items()}
        nbytes = sum(storage.nbytes() + _PER_STORAGE for storage in storages.values())
        devices = {storage.device for storage in storages.values() if storage.device.type == "cuda"}
        engine = get_engine()
        with suppress(SaveError, RuntimeError):  # no threads, or the end of the program: the save says so
            engine.use(self)
            engine.start()  # its threads release the memory
            engine.arena.prepare(int(nbytes * _SHARE) + _MORE, min(devices, key=str, default=None))
