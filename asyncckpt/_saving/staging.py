"""From a live state to a snapshot in host memory, and from that to a plan."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._caller_warning import warn_caller
from asyncckpt._loading.unpickle import PayloadFile, load_file
from asyncckpt._saving.weights_only import WeightsOnlyCheck
from asyncckpt._snapshot.compare import holds
from asyncckpt._snapshot.copy import Watermark, copy_storages
from asyncckpt._snapshot.data_pickle import DataPickler
from asyncckpt._snapshot.freeze import Freezer
from asyncckpt.errors import SaveError
from asyncckpt.layout.torch_zip import lay_out, plan

if TYPE_CHECKING:
    from torch.storage import UntypedStorage

    from asyncckpt._snapshot.buffers import Arena, Lease
    from asyncckpt._snapshot.freeze import FrozenState
    from asyncckpt.layout.torch_zip import Body
    from asyncckpt.types import FilePlan

    Frozen = tuple[FrozenState, list[UntypedStorage]]

# Objects and numpy arrays are pickled on the training thread; from this size on that is worth a word.
INLINE_WARNING = 64 << 20


@dataclass(slots=True, eq=False)
class Snapshot:
    """A state at one instant: decided when it is made, in host memory once `copy` has returned.

    Attributes:
        frozen: everything but the bytes of the storages.
        body: where each storage lies in `lease`, which is where it will lie in the file.
        lease: the host buffer; released by whoever is done with the snapshot.
        filled: how far the copy has come, and whether it has ended.
        storages: what is to be copied; empty once the copy has ended.
        wait_seconds, copy_seconds: what the training thread spent on host memory, and on the copy.
    """

    frozen: FrozenState
    body: Body
    lease: Lease
    filled: Watermark = field(default_factory=Watermark)
    wait_seconds: float = 0.0
    copy_seconds: float = 0.0
    storages: list[UntypedStorage] = field(default_factory=list, repr=False)

    def share(self, frozen: FrozenState) -> Snapshot:
        """Return a second snapshot whose storages have the same bytes, with a lease of its own."""
        return Snapshot(frozen, self.body, self.lease.share(), self.filled)

    def copy(self) -> None:
        """Copy the storages into the lease. The state may change once this has returned.

        Raises:
            SaveError: a storage could not be copied.
        """
        began = time.perf_counter()
        try:
            body = self.body
            copy_storages(self.storages, body.sizes, body.starts.tolist(), self.lease, self.filled)
        except BaseException as error:
            failure = SaveError(f"could not copy the state to host memory: {error}")
            self.filled.fail(failure)
            if isinstance(error, Exception):
                raise failure from error
            raise
        self.filled.advance(self.body.nbytes)
        self.copy_seconds = time.perf_counter() - began
        self.end_copy()

    def end_copy(self) -> None:
        """Say that nothing more will be copied, whether all was or not."""
        self.storages = []
        self.filled.end(SaveError("the copy of the state to host memory was broken off"))


@dataclass(slots=True, eq=False)
class Stager:
    """Takes snapshots of one state again and again; what did not change is not laid out anew.

    Attributes:
        arena: where they are copied to.
        warns: whether a state that `weights_only=True` refuses to load is warned of.
    """

    arena: Arena
    warns: bool = True
    _freezer: Freezer = field(default_factory=Freezer, init=False)
    _pickler: DataPickler = field(default_factory=DataPickler, init=False)
    _check: WeightsOnlyCheck = field(default_factory=WeightsOnlyCheck, init=False)
    _body: Body | None = field(default=None, init=False)
    _warned: bool = field(default=False, init=False)

    def freeze(self, state: object) -> Frozen:
        """Decide what a checkpoint of `state` will hold; returns that, and its live storages.

        Raises:
            SaveError: the state cannot be saved; the message says which entry.
        """
        return self._freezer.freeze(state)

    def stage(self, frozen: Frozen, *, wait: bool = True) -> Snapshot:
        """Lease room for a state that has just been frozen; the copy is left to `Snapshot.copy`.

        Raises:
            SaveError: there never is room for it.
            BusyError: there is no room in host memory, and `wait` is false.
        """
        decided, storages = frozen
        body = self._lay_out(decided.sizes)
        self._warn_of_inline(len(decided.pickled))
        if self.warns and (warning := self._check.warning(decided, self._freezer.kinds)):
            warn_caller(warning)
        began = time.perf_counter()
        lease = self.arena.lease(body.nbytes, pinned=_on_cuda(decided), wait=wait)
        snapshot = Snapshot(decided, body, lease, storages=storages)
        snapshot.wait_seconds = time.perf_counter() - began
        return snapshot

    def stage_again(self, frozen: Frozen, snapshot: Snapshot) -> Snapshot | None:
        """Return a snapshot that shares the copy of an earlier one; None if a byte of it differs.

        Everything else than the bytes of storages may differ.
        """
        decided, storages = frozen
        starts = snapshot.body.starts.tolist()
        same = decided.sizes == snapshot.frozen.sizes
        return (
            snapshot.share(decided)
            if same and holds(snapshot.lease, storages, decided.sizes, starts)
            else None
        )

    def reserve(self, state: object, count: int) -> int:
        """Make room for `count` snapshots of `state` ready; returns the bytes of one."""
        frozen, _ = self._freezer.freeze(state)
        nbytes = self._lay_out(frozen.sizes).nbytes
        self.arena.reserve(nbytes, count, pinned=_on_cuda(frozen))
        return nbytes

    def plan(self, snapshot: Snapshot, description: bytes) -> FilePlan:
        """Plan the file of a snapshot. Not on the training thread."""
        return plan(snapshot.body, self._pickler.data_pickle(snapshot.frozen), description)

    def host_state(self, snapshot: Snapshot) -> Any:
        """Return a copied snapshot as a state in host memory, for somebody else's writer.

        It is what loading the file would give, on the CPU, except that its storages lie in the lease: they
        hold until that is released.
        """
        planned = self.plan(snapshot, b"{}")
        view = snapshot.lease.view
        for offset, literal in planned.gaps:
            view[offset : offset + len(literal)] = literal

        def read_at(at: int, length: int) -> bytes:
            behind = max(at - planned.body, 0)
            return (
                bytes(view[at : min(at + length, planned.body)])
                + (planned.tail[behind : max(at + length - planned.body, 0)])
            )

        payloads = {
            start: torch.frombuffer(view[start:stop], dtype=torch.uint8).untyped_storage()
            for start, stop in zip(planned.starts.tolist(), planned.stops.tolist(), strict=True)
            if stop > start
        }
        return load_file(PayloadFile(planned.size, read_at, payloads), "cpu", weights_only=False)

    def _lay_out(self, sizes: list[int]) -> Body:
        if self._body is None or self._body.sizes != sizes:
            self._body = lay_out(sizes)
        return self._body

    def _warn_of_inline(self, nbytes: int) -> None:
        if nbytes > INLINE_WARNING and not self._warned:
            self._warned = True
            msg = (
                f"{nbytes >> 20} MiB of the state are not tensors (numpy arrays, objects) and are pickled on"
                " the training thread at every save; make tensors of them to have them copied"
            )
            warn_caller(msg)


def _on_cuda(frozen: FrozenState) -> bool:
    return any(location.startswith("cuda") for location in set(frozen.locations))
