"""Plan which rank writes what by DCP's planner, called directly: no collectives take part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from asyncckpt._sharding.conflicts import check_items, check_plans, check_shards, describe_duplicate
from asyncckpt._sharding.detect import is_plain_tensor
from asyncckpt._sharding.fingerprint import fingerprint
from asyncckpt._sharding.flatten import flatten
from asyncckpt._sharding.metadata import complete, dump_metadata
from asyncckpt._snapshot.collector import no_collections
from asyncckpt.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

    from asyncckpt._sharding.fingerprint import Fingerprint
    from asyncckpt._sharding.flatten import Flat


@dataclass(slots=True)
class Kept:
    """What this rank writes of a state, in the order of the items in its file: tensors, then objects.

    Attributes:
        indices: of each item in the metadata: key, and offset in the tensor; without hints.
        tensor_count: how many of them are tensors.
        lookups: positions of the tensors that are to be found in what the state has under their key.
    """

    indices: list[MetadataIndex]
    tensor_count: int
    lookups: list[int]

    def tensors(self, flat: dict[str, Any]) -> list[torch.Tensor]:
        """Return the tensors to write: plain ones, DTensors, and the local tensors of ShardedTensors."""
        tensors = [flat[index.fqn] for index in self.indices[: self.tensor_count]]
        if self.lookups:
            from torch.distributed.checkpoint.utils import find_tensor_shard  # noqa: PLC0415 - see __init__

            for position in self.lookups:
                tensors[position] = find_tensor_shard(tensors[position], self.indices[position])
        return tensors

    def objects(self, flat: dict[str, Any]) -> list[Any]:
        """Return the objects to write."""
        return [flat[index.fqn] for index in self.indices[self.tensor_count :]]


class LocalPlan:
    """A flattened state on this rank, and what this rank could write of it.

    Attributes:
        flat: key -> tensor or object.
        fingerprint: equal if an earlier plan, and what was made of it, still holds.

    Args:
        state: of `collect_sharded`.
        planner: DCP's, not used before; the default one if it is None.

    Raises:
        SaveError: two entries have the same key.
    """

    def __init__(self, state: dict[str, Any], planner: SavePlanner | None = None) -> None:
        self._state = state
        self._plan: SavePlan | None = None
        self._planner: Any = planner
        flattened = flatten(state) if planner is None else None
        self.flat, self._paths = self._set_up() if flattened is None else flattened
        self.fingerprint: Fingerprint = fingerprint(self.flat, self._paths)
        if planner is not None:
            self.fingerprint.append(_options(planner))

    def encode(self) -> bytes:
        """Return the plan for rank 0.

        Raises:
            ShardedStateError: a shard is in an object that is pickled as a whole; the message has its path.
            SaveError: a tensor cannot be saved as it is; the message has its key.
        """
        from asyncckpt._sharding.plan_codec import encode_plan  # noqa: PLC0415 - see __init__

        return encode_plan(self._made())

    def keep(self, kept: bytes) -> Kept:
        """Return what this rank writes, of what rank 0 decided for it."""
        items = [self._made().items[position] for position in np.frombuffer(kept, np.uint32).tolist()]
        tensors = [item.index for item in items if item.tensor_data is not None]
        objects = [item.index for item in items if item.tensor_data is None]
        lookups = [
            position for position, index in enumerate(tensors) if not is_plain_tensor(self.flat[index.fqn])
        ]
        return Kept(tensors + objects, len(tensors), lookups)

    def _made(self) -> SavePlan:
        if self._plan is not None:
            return self._plan
        if self._planner is None:
            flat, paths = self._set_up()
            if list(paths.items()) != list(self._paths.items()):  # a newer DCP flattens in another way
                self.flat, self._paths, self.fingerprint = flat, paths, fingerprint(flat, paths)
        check_items(self.flat)
        with torch.no_grad():
            plan: SavePlan = self._planner.create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                # The field is deprecated; what is saved never requires gradients.
                item.tensor_data.properties.requires_grad = False
        check_shards(self.flat, plan)
        self._plan = plan
        return plan

    def _set_up(self) -> Flat:
        """Give the state to the planner; return what that makes of it."""
        if self._planner is None:
            self._planner = _default_planner()
        try:
            self._planner.set_up_planner(self._state)
        except ValueError as error:
            raise SaveError(describe_duplicate(self._state) or str(error)) from error
        return getattr(self._planner, "state_dict", self._state), getattr(self._planner, "mappings", {})


class GlobalPlan:
    """What all ranks write; on rank 0.

    Attributes:
        kept: for each rank, what it passes to `LocalPlan.keep`.
        metadata: of the checkpoint, without what is known after the writes.
    """

    def __init__(
        self, asked: Sequence[Sequence[MetadataIndex]], decided: Sequence[SavePlan], metadata: Metadata
    ) -> None:
        self.metadata = metadata
        self.kept: list[bytes] = []
        self._indices: list[list[MetadataIndex]] = []
        self._written: _Written | None = None
        for indices, final in zip(asked, decided, strict=True):
            positions = {index: position for position, index in enumerate(indices)}
            self.kept.append(np.array([positions[item.index] for item in final.items], np.uint32).tobytes())
            tensors = [item.index for item in final.items if item.tensor_data is not None]
            objects = [item.index for item in final.items if item.tensor_data is None]
            self._indices.append(tensors + objects)

    def write(self, prefix: str, files: Sequence[str], extents: Sequence[np.ndarray[Any, Any]]) -> bytes:
        """Return the content of `.metadata`: that of the last time, if all items lie where they lay.

        Args:
            prefix: what the names of the files begin with, as text that is nowhere else; or an empty one.
            files: the rest of the name of each rank's file.
            extents: for each rank, offset and length in bytes of every item, in the order of `Kept`.
        """
        last = self._written
        if (
            last is not None
            and len(last.prefix) == len(prefix)
            and last.files == files
            and all(map(np.array_equal, last.extents, extents))
        ):
            return last.data.replace(last.prefix.encode(), prefix.encode()) if prefix else last.data
        names = [prefix + file for file in files]
        with no_collections():
            data = dump_metadata(complete(self.metadata, self._indices, names, extents))
        self._written = _Written(prefix, list(files), list(extents), data)
        return data


class _Written(NamedTuple):
    """The content of `.metadata`, and what it was made of."""

    prefix: str
    files: list[str]
    extents: list[np.ndarray[Any, Any]]
    data: bytes


def global_plan(payloads: Sequence[bytes], planner: SavePlanner | None = None) -> GlobalPlan:
    """Decide which rank writes what, from the encoded plans of all ranks.

    Args:
        payloads: of `LocalPlan.encode`, in the order of the ranks.
        planner: that of rank 0's `LocalPlan`; the default one if it is None.

    Raises:
        SaveError: the states of the ranks do not fit together; the message has keys and ranks.
    """
    from asyncckpt._sharding.plan_codec import PlanDecoder  # noqa: PLC0415 - see __init__

    decoder = PlanDecoder()
    planner = _default_planner() if planner is None else planner
    with no_collections():
        plans = [decoder.decode(payload) for payload in payloads]
        check_plans(plans)
        # Torch 2.7 takes items out of the plans.
        asked = [[item.index for item in plan.items] for plan in plans]
        try:
            decided, metadata = planner.create_global_plan(plans)
        except (ValueError, AssertionError) as error:
            raise SaveError(f"the states of the ranks do not fit together: {error}") from error
        return GlobalPlan(asked, decided, metadata)


def _options(planner: Any) -> tuple[Any, ...]:
    """Return what else a plan depends on: one that a planner of the user's has made is for one save."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner  # noqa: PLC0415 - see __init__

    if type(planner) is not DefaultSavePlanner:
        return (object(),)
    return planner.flatten_state_dict, planner.flatten_sharded_tensors, planner.dedup_save_to_lowest_rank


def _default_planner() -> Any:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner  # noqa: PLC0415 - see __init__

    return DefaultSavePlanner()
