"""Strategies that write their checkpoints past the CheckpointIO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import WarningCache

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

_warnings = WarningCache()


def warn_if_passed_by(strategy: Strategy) -> None:
    """Warn once if a strategy writes its checkpoints itself."""
    saving = next(c for c in type(strategy).__mro__ if "save_checkpoint" in vars(c))
    if saving.__name__ != "Strategy":
        _warnings.warn(
            f"`{saving.__name__}` writes its checkpoints itself, so asyncckpt cannot save them in the"
            " background: training stands still until they are written."
        )
