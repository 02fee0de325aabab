"""Save states of many ranks as DCP does, in the background."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from asyncckpt._finder import locate
from asyncckpt._saving.request import SaveRequest
from asyncckpt.distributed._groups import checked_path, ranked, saver, state_dicts
from asyncckpt.layout.description import Description
from asyncckpt.stores import open_store

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from concurrent.futures import Future

    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.planner import SavePlanner

    from asyncckpt._saving.save import Save
    from asyncckpt.types import Checkpoint


def async_save(  # noqa: PLR0913 - the arguments are those of DCP
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: Any = None,
    planner: SavePlanner | None = None,
    process_group: ProcessGroup | None = None,
    async_checkpointer_type: Any = None,
    async_stager: Any = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Save a state in the background, as `torch.distributed.checkpoint.async_save`; call it on every rank.

    The state may be changed once this has returned. The checkpoint gets its name when all ranks have written
    it durably, and replaces an existing one then.

    Args:
        state_dict: as DCP takes it.
        checkpoint_id: path or URL of the folder.
        storage_writer: a `FileSystemWriter`, of which only the path is used.
        planner: DCP's; not one with a plan cache of its own. What a `DefaultSavePlanner` has planned is kept
            here for later saves; any other plans each save.
        process_group: of the ranks; None for the default group.
        async_checkpointer_type: of no effect: there is one way.
        async_stager: of no effect on the copy; with one that stages asynchronously, the result is an
            `AsyncSaveResponse`.
        no_dist: save what this process has, alone.
        use_collectives: must be True.
        storage_options: options of the file system of a URL, as fsspec takes them.

    Returns:
        A future of the `asyncckpt.Checkpoint`, or DCP's `AsyncSaveResponse`.

    Raises:
        RankError: another rank cannot save, or does not come.
        SaveError: this rank cannot save, or an earlier save failed and its error was not raised yet.
        TypeError, ValueError: an argument is not supported.
    """
    del async_checkpointer_type
    began = time.perf_counter()
    if not use_collectives:
        raise ValueError(
            "use_collectives=False writes another format, without a common .metadata; leave it out"
        )
    path = _target(checkpoint_id, storage_writer)
    store, name = locate(path, open_store("."), storage_options)
    description = Description(0, None, {}, time.time())
    state = state_dicts(state_dict)
    wanted = SaveRequest(
        None,
        state,
        store,
        name,
        description,
        began,
        refuse=lambda: None,
        overlap=lambda _: (None, ""),
        planner=partial(_fresh, planner),
    )
    return _response(ranked(process_group, no_dist=no_dist).saves().save(wanted), async_stager)


def save(  # noqa: PLR0913 - the arguments are those of DCP
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: Any = None,
    planner: SavePlanner | None = None,
    process_group: ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Save a state, and wait until the checkpoint is durable; see `async_save`."""
    future = async_save(
        state_dict,
        checkpoint_id=checkpoint_id,
        storage_writer=storage_writer,
        planner=planner,
        process_group=process_group,
        no_dist=no_dist,
        use_collectives=use_collectives,
        storage_options=storage_options,
    )
    checkpoint: Checkpoint = future.result()
    return checkpoint


def wait(timeout: float | None = None) -> None:
    """Wait until everything given to `async_save` is durable.

    Raises:
        SaveError: for failures that were not raised before.
        BusyError: saves are still pending after `timeout` seconds; they continue.
    """
    saver.drain(timeout)
    saver.raise_failures()


def _target(checkpoint_id: str | os.PathLike[str] | None, storage_writer: Any) -> str:
    if storage_writer is not None and type(storage_writer) is not FileSystemWriter:
        raise TypeError(
            f"storage_writer must be a plain FileSystemWriter, not a {type(storage_writer).__name__}:"
            " asyncckpt writes the files itself; give checkpoint_id instead"
        )
    return checked_path(checkpoint_id, storage_writer)


def _fresh(planner: SavePlanner | None) -> SavePlanner | None:
    """Return a planner that keeps no plans of its own: the default one, if it is like that."""
    if type(planner) is not DefaultSavePlanner:
        return planner
    return DefaultSavePlanner(
        planner.flatten_state_dict,
        planner.flatten_sharded_tensors,
        dedup_save_to_lowest_rank=planner.dedup_save_to_lowest_rank,
    )


def _response(save: Save, stager: Any) -> Future[Checkpoint] | Any:
    """Return what DCP would: a future, or with asynchronous staging two of them."""
    stages_later = getattr(getattr(stager, "_config", None), "use_async_staging", False)
    if not stages_later:
        return save.committed
    from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse  # noqa: PLC0415 - torch 2.9

    return AsyncSaveResponse(save.snapshotted, save.committed)  # type: ignore[arg-type]
