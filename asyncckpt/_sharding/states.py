"""Turn the objects of a state into state dicts that DCP can reshard, and give those back to the objects.

Modules and optimizers are saved under fully qualified names, as
`torch.distributed.checkpoint.state_dict` does it; other stateful objects by their `state_dict`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

RANK_STATE = "rank_state"


def collect_sharded(state: Any) -> tuple[dict[str, Any], list[Any]]:
    """Return a state with its stateful objects replaced by state dicts, and these objects.

    The tensors in it are the live ones. A module becomes its state dict, an optimizer its state dict with
    names for its parameters if modules of the state hold them all, without wrappers' prefixes in either.
    An optimizer that has not stepped has no state in it; nothing is changed in the program.

    Args:
        state: a dict, or an object with a state dict.

    Raises:
        SaveError: it is no dict.
    """
    raise NotImplementedError


def with_rank_state(state: dict[str, Any], rank: int, rank_state: Any) -> dict[str, Any]:
    """Add what is saved for each rank of its own: under `rank_state`, then the rank as a string.

    Stock DCP loads it by the same path, `{"rank_state": {"3": ...}}`.

    Raises:
        SaveError: the state has another entry of that name.
    """
    raise NotImplementedError


def fit_optimizers(state: Any, collected: dict[str, Any], metadata: Metadata) -> list[str]:
    """Give the optimizers in a collected state the entries that a checkpoint has, before it is read into them.

    An optimizer that has not stepped has no tensors to read into: they are made, like its parameters. Entries
    that the checkpoint does not have are taken out, so that the optimizer is as it was at the save. The
    optimizers themselves are not changed: `apply` gives them the result.

    Args:
        state: the live state.
        collected: of `collect_sharded(state)`; is changed.
        metadata: of the checkpoint.

    Returns:
        What could not be made, a line each.
    """
    raise NotImplementedError


def misfits(state: Any, collected: dict[str, Any]) -> list[str]:
    """Return what `apply` would not fit into the objects of `state`, a line each; changes nothing.

    Call it once the values that are no tensors have been read into `collected`.
    """
    raise NotImplementedError


def apply(state: Any, collected: dict[str, Any]) -> None:
    """Give each stateful object of `state` its state back.

    Args:
        state: the live state.
        collected: of `collect_sharded(state)`, with what was loaded in it.
    """
    raise NotImplementedError
