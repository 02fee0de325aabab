"""Restore a folder into the live state of this rank: on all ranks, or on none."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from asyncckpt._loading.copies import Copy
from asyncckpt._loading.fitting import misfit
from asyncckpt._loading.folder_index import TensorEntry, places_of
from asyncckpt._loading.folder_load import whole_tensor
from asyncckpt._loading.folder_match import NOTHING, carry_over, copied, matched
from asyncckpt._loading.item_tensor import ItemTensors
from asyncckpt._loading.load import load_image
from asyncckpt._loading.restore import carry_out, mismatch, raise_misfits
from asyncckpt._loading.restore_plan import Change, Plan
from asyncckpt._loading.undo import hold_stateful
from asyncckpt._sharding import states
from asyncckpt._sharding.resharding import local_parts
from asyncckpt._snapshot.local_tensors import is_dtensor
from asyncckpt._stateful import collect, is_plain
from asyncckpt.errors import warn_caller

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncckpt._loading.folder import Folder
    from asyncckpt._loading.item_run import Place
    from asyncckpt._loading.reader import Image
    from asyncckpt._loading.target import RestoreTarget
    from asyncckpt._sharding.resharding import LocalPart
    from asyncckpt.types import Checkpoint

    Read = Callable[[Sequence[Place]], dict[Place, Image]]


# Bytes of chunks of which a rank needs a part: its checksum is that of all of it.
_AT_ONCE = 1 << 30


class FolderRestore:
    """A restore of a folder, in three steps. If one of the first two fails, nothing was changed.

    Args:
        folder: what to restore.
        read: reads items; `Folder.read`, called from this thread.
        target: the live state, and how it is restored.
    """

    def __init__(self, folder: Folder, read: Read, target: RestoreTarget) -> None:
        self._folder = folder
        self._read = read
        self._target = target
        self._makes = ItemTensors()

    @property
    def checkpoint(self) -> Checkpoint:
        """What is restored."""
        return self._folder.checkpoint

    def plan(self) -> None:
        """Compare the state with the metadata, and read the entries that are no tensors.

        Raises:
            StateMismatchError: lists each entry that does not fit.
            CorruptCheckpointError: an item is damaged.
            UnsafeStateError: `weights_only` does not allow an entry.
            UnloadableStateError: the objects of an entry cannot be rebuilt here.
        """
        index = self._folder.index
        self._collected, _ = states.collect_sharded(self._target.state)
        problems = states.fit_optimizers(self._target.state, self._collected, index.metadata)
        tree = self._own_entries(index.tree)
        held = {id(copy) for pair in self._pairs for _, copy in copied(*pair)}
        held |= {id(self._live), id(self._live.get(states.RANK_STATE, self._live))}

        def is_whole(live: Any) -> bool:
            return id(live) not in held and is_plain(live)

        needed: list[TensorEntry | Place] = []
        matched(self._live, tree, needed.append, is_whole)
        values = self._values(needed)
        saved = matched(self._live, tree, lambda entry: values[id(entry)], is_whole)
        self._plan = FolderPlan(self._live, saved, self._folder, is_whole, self._target)
        self._plan.problems += problems
        if self._target.subset:
            self._plan.unexpected.clear()
        self._early: set[int] = set()
        for pair in self._pairs:
            objects = states.without_tensors(*pair)
            self._early |= set(objects)
            self._plan.changes += [
                Change(path, partial(hold_stateful, value), partial(states.apply, *pair, {key}.__contains__))
                for key, (path, value) in objects.items()
            ]
            self._plan.changes.append(carry_over(*pair))
        raise_misfits(self._plan, self._folder.path)

    def read(self) -> None:
        """Read the tensors that this rank needs, every byte of them checked.

        Raises:
            CorruptCheckpointError: an item is damaged.
        """
        plan = self._plan
        sources: dict[int, torch.Tensor] = {}
        for batch in _batches(plan.parts):
            sources |= self._sources(batch)
        plan.copies += [Copy(part.path, part.local.target, sources[id(part)]) for part in plan.parts]

    def finish(self) -> None:
        """Put everything into the live state, on all ranks or on none.

        Raises:
            StateMismatchError: lists what an object refuses; nothing was changed.
            PartialRestoreError: an object has failed, or another could not be put back.
            SaveError: another rank cannot take the checkpoint; nothing was changed. `Ranks.agree` raises it.
        """
        where = self._folder.path

        def change_and_check(change: Callable[[], None]) -> None:
            change()
            if lines := [line for pair in self._pairs for line in states.misfits(*pair)]:
                raise mismatch(self._plan, where, lines)

        def apply() -> None:
            self._plan.note_changes()
            for pair in self._pairs:
                states.apply(*pair, lambda key: key not in self._early)

        carry_out(
            self._plan,
            where,
            strict=self._target.strict,
            together=lambda change: self._target.ranks.together(
                f"restore {where}: copy", partial(change_and_check, change)
            ),
            after_copies=apply,
        )

    def _sources(self, parts: Sequence[_Part]) -> dict[int, torch.Tensor]:
        """Read parts, and return the tensor of each by its identity."""
        images = self._read([part.place for part in parts])
        tensors: dict[Place, torch.Tensor] = {}
        sources: dict[int, torch.Tensor] = {}
        for part in parts:
            if part.place not in tensors:
                tensors[part.place] = self._makes.tensor(images[part.place], part.entry.dtype, part.sizes)
            source = tensors[part.place][part.local.region]
            # What is not needed of a chunk does not stay in memory.
            sources[id(part)] = source if part.is_whole else source.clone()
        return sources

    def _own_entries(self, tree: dict[Any, Any]) -> dict[Any, Any]:
        """Add what is saved for this rank to the live state; take that of other ranks out of the tree."""
        self._live, self._pairs = self._collected, [(self._target.state, self._collected)]
        saved = tree.get(states.RANK_STATE)
        if states.RANK_STATE in self._collected:
            return tree
        if not isinstance(saved, dict):
            if self._target.rank_state is not None:
                warn_caller(f"{self._folder.path} has no rank_state, which is left as it is")
            return tree
        others = {key: node for key, node in tree.items() if key != states.RANK_STATE}
        rank, size = self._target.ranks.rank, self._target.ranks.size
        if self._target.rank_state is None:
            return others
        if len(saved) != size or str(rank) not in saved:
            warn_caller(
                f"{self._folder.path} has a rank_state for each of {len(saved)} ranks, and is restored on"
                f" {size}; the rank_state is left as it is"
            )
            return others
        collected = collect(self._target.rank_state)
        self._live = states.with_rank_state(self._collected, rank, collected)
        self._pairs = [(self._target.state, self._live), (self._target.rank_state, collected)]
        return {**others, states.RANK_STATE: {str(rank): saved[str(rank)]}}

    def _values(self, needed: Sequence[TensorEntry | Place]) -> dict[int, Any]:
        """Read entries, and return what is in them by the identity of the entry."""
        images = self._read(places_of(needed))
        return {
            id(entry): whole_tensor(entry, images, self._makes)
            if isinstance(entry, TensorEntry)
            else load_image(images[entry], "cpu", weights_only=self._target.weights_only).state
            for entry in needed
        }


class _Part(NamedTuple):
    """A part of a live tensor that is to be read.

    Attributes:
        path: of the entry in the state.
        entry: the saved tensor.
        place: where the chunk lies that it is a part of.
        sizes: shape of the chunk.
        local: which part, and where it belongs.
    """

    path: str
    entry: TensorEntry
    place: Place
    sizes: tuple[int, ...]
    local: LocalPart

    @property
    def is_whole(self) -> bool:
        """Whether all of the chunk is needed."""
        return tuple(self.local.target.shape) == self.sizes


def _batches(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Return what is read at once: all whole chunks, as they stay in memory; a limited amount of others."""
    whole = [part for part in parts if part.is_whole]
    batches = [whole]
    last: Place | None = None
    nbytes = _AT_ONCE
    for part in sorted((part for part in parts if not part.is_whole), key=lambda part: part.place):
        if part.place != last:
            last, nbytes = part.place, nbytes + part.place.length
            if nbytes > _AT_ONCE:
                nbytes = part.place.length
                batches.append([])
        batches[-1].append(part)
    return batches


class FolderPlan(Plan):
    """A plan in which tensors of the checkpoint are not read yet.

    Args:
        live: the collected state.
        saved: of `matched`.
        folder: whose entries are in it.
        is_whole: whether a live entry is replaced as a whole.
        target: how it is restored.

    Attributes:
        parts: what is to be read and copied.
    """

    def __init__(
        self, live: Any, saved: Any, folder: Folder, is_whole: Callable[[Any], bool], target: RestoreTarget
    ) -> None:
        self.parts: list[_Part] = []
        self._sharded: list[torch.Tensor] = []
        self._metadata = folder.index.metadata.state_dict_metadata
        self._is_plain = is_whole  # type: ignore[method-assign, assignment]
        super().__init__(live, saved, strict=target.strict, map_keys=target.map_keys)

    def note_changes(self) -> None:
        """Raise the version counters of DTensors: a copy raises those of their local tensors alone."""
        torch.autograd.graph.increment_version(self._sharded)

    def _tensor(self, live: torch.Tensor, saved: Any, path: str) -> None:
        if not isinstance(saved, TensorEntry):
            super()._tensor(live, "" if saved is NOTHING else saved, path)
            return
        stand_in = torch.empty((), dtype=saved.dtype).expand(saved.size)
        problem = misfit(live, stand_in) or _conversion_problem(live.dtype, saved.dtype)
        if problem is not None:
            self.problems.append(f"{path}: {problem}")
            return
        self.overlaps = True
        for part in local_parts(saved.key, live, self._metadata[saved.key]):  # type: ignore[arg-type]
            sizes, place = saved.chunks[part.chunk]
            self.parts.append(_Part(path, saved, place, sizes, part))
        if is_dtensor(live):
            self._sharded.append(live)


def _conversion_problem(live: torch.dtype, saved: torch.dtype) -> str | None:
    """Return why values of one dtype cannot become those of another; None if they can."""
    try:
        torch.empty(1, dtype=live).copy_(torch.empty(1, dtype=saved))
    except (RuntimeError, NotImplementedError):
        return f"{saved} in the checkpoint, {live} in the state"
    return None
