"""The process groups that save and load by the functions of this package."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.stateful import Stateful

from asyncckpt._saving.ranked import Ranked
from asyncckpt._saving.saver import Saver

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Two in flight: a second save does not wait until the first one is written.
saver = Saver(max_in_flight=2, keeps=False)
_TIMEOUT = 300.0
_SERIES = "asyncckpt.distributed"

_groups: dict[tuple[Any, bool], Ranked] = {}


def ranked(process_group: ProcessGroup | None, *, no_dist: bool) -> Ranked:
    """Return what coordinates the saves and loads of a group; it keeps the plans of the last save."""
    key = None if no_dist else process_group
    found = _groups.get((key, no_dist))
    if found is None:
        found = Ranked(True, key, _TIMEOUT, _SERIES, saver, "wait", alone=no_dist)  # noqa: FBT003 - sharded
        _groups[key, no_dist] = found
    return found


def state_dicts(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with the stateful objects at its top replaced by their state dicts, as DCP does it."""
    return {key: one.state_dict() if isinstance(one, Stateful) else one for key, one in state.items()}


def checked_path(checkpoint_id: str | os.PathLike[str] | None, storage: Any) -> str:
    """Return the path of a folder, without slashes at its end.

    Args:
        checkpoint_id: its path or URL, or None.
        storage: a reader or writer of DCP that has the path, or None.

    Raises:
        ValueError: there is none.
    """
    if checkpoint_id is None and storage is not None:
        checkpoint_id = storage.path
    if checkpoint_id is None:
        raise ValueError("checkpoint_id is needed: the path or URL of the folder")
    path = os.fspath(checkpoint_id).rstrip("/")
    if not path:
        raise ValueError(f"checkpoint_id {checkpoint_id!r} does not name a folder")
    return path
