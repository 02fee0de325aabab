"""Load checkpoints of many ranks as DCP does, every checksum compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.stateful import Stateful

from asyncckpt._finder import first_whole, locate
from asyncckpt._loading.agreement import Ranks
from asyncckpt._loading.target import RestoreTarget
from asyncckpt._saving.engine import get_engine, wait_for_pending
from asyncckpt.distributed._groups import checked_path, ranked, state_dicts
from asyncckpt.stores import open_store

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.planner import LoadPlanner


def load(  # noqa: PLR0913 - the arguments are those of DCP
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: Any = None,
    planner: LoadPlanner | None = None,
    process_group: ProcessGroup | None = None,
    no_dist: bool = False,
    weights_only: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Load a checkpoint into a state, as `torch.distributed.checkpoint.load`; call it on every rank.

    Waits for pending saves of this process first. Entries that only the checkpoint has are not read. Tensors
    are changed in place once all ranks have read their parts and compared every checksum.

    Args:
        state_dict: as DCP takes it.
        checkpoint_id: path or URL of the folder.
        storage_reader: a `FileSystemReader`, of which only the path is used.
        planner: a `DefaultLoadPlanner`, of which `allow_partial_load` is used.
        process_group: of the ranks; None for the default group.
        no_dist: load in this process alone.
        weights_only: as in torch.load, for what is no tensor; False, as in DCP, runs what a pickle says.
        storage_options: options of the file system of a URL, as fsspec takes them.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        CorruptCheckpointError: it is damaged, for any of the ranks; nothing was changed.
        StateMismatchError: the message lists every entry that does not fit; nothing was changed.
        RankError: another rank cannot load it, or does not come; nothing was changed.
        TypeError, ValueError: an argument is not supported.
    """
    if planner is not None and type(planner) is not DefaultLoadPlanner:
        raise TypeError(
            f"planner must be a plain DefaultLoadPlanner, not a {type(planner).__name__}: asyncckpt plans"
            " reads itself"
        )
    if storage_reader is not None and type(storage_reader) is not FileSystemReader:
        raise TypeError(
            f"storage_reader must be a plain FileSystemReader, not a {type(storage_reader).__name__}:"
            " asyncckpt reads the files itself; give checkpoint_id instead"
        )
    path = checked_path(checkpoint_id, storage_reader)
    wait_for_pending()
    collected = state_dicts(state_dict)
    together = ranked(process_group, no_dist=no_dist)
    coordination = together.coordination()
    target = RestoreTarget(
        collected,
        get_engine().call,
        ranks=Ranks(together.agree, coordination.rank, coordination.size),
        weights_only=weights_only,
        strict=planner is None or not planner.allow_partial_load,
        subset=True,
    )
    first_whole(target.prepare, *locate(path, open_store("."), storage_options)).finish()
    for key, value in collected.items():
        live = state_dict[key]
        if isinstance(live, Stateful):
            live.load_state_dict(value)
        else:
            state_dict[key] = value
