"""Strategies that write their checkpoints past the CheckpointIO."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.rank_zero import WarningCache

from asyncckpt._trainer.own_code import package_of

_SHARDING = frozenset({"FSDPStrategy", "ModelParallelStrategy"})
_PACKAGES = frozenset({"lightning", "pytorch_lightning", "lightning_fabric"})

_warnings = WarningCache()


def is_sharding(strategy: Any) -> bool:
    """Return whether a strategy is one of those that can save shards."""
    return any(map(_is_lightning, type(strategy).__mro__))


def is_fsdp(strategy: Any) -> bool:
    """Return whether a strategy is `FSDPStrategy`, or a subclass of it."""
    return any(kind.__name__ == "FSDPStrategy" for kind in type(strategy).__mro__)


def saves_shards(strategy: Any) -> bool:
    """Return whether a strategy saves a part on each rank, by Lightning's own code."""
    sharded = vars(strategy).get("_state_dict_type") == "sharded"
    return is_own(strategy, "save_checkpoint") and (
        sharded or vars(strategy).get("_save_distributed_checkpoint", False)
    )


def takes_io(strategy: Any) -> bool:
    """Return whether a strategy has a CheckpointIO; some of Fabric's have none."""
    try:
        return strategy.checkpoint_io is not None
    except NotImplementedError:
        return False


def is_own(strategy: Any, method: str) -> bool:
    """Return whether a method of a strategy is that of Lightning's class, not of a user's subclass."""
    return _is_lightning(_defining(strategy, method))


def warn_if_passed_by(strategy: Any) -> None:
    """Warn once if a strategy writes its checkpoints itself."""
    saving = _defining(strategy, "save_checkpoint")
    if saving.__name__ != "Strategy":
        _warnings.warn(
            f"`{saving.__name__}` writes its checkpoints itself, so asyncckpt cannot save them in the"
            " background: training stands still until they are written."
        )


def _is_lightning(kind: type) -> bool:
    return kind.__name__ in _SHARDING and package_of(kind) in _PACKAGES


def _defining(strategy: Any, method: str) -> type:
    return next(kind for kind in type(strategy).__mro__ if method in vars(kind))
