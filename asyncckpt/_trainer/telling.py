"""What loggers are told of a save once it is committed: how things stood when it was made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import proxy

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from asyncckpt.types import SaveStats

_SEEN = (
    "best_model_path",
    "best_model_score",
    "current_score",
    "kth_best_model_path",
    "kth_value",
    "last_model_path",
)


class AsOf:
    """A ModelCheckpoint as it was: later saves, which are still pending, do not show in it.

    Args:
        callback: what it is of; everything else than paths and scores is as it is now.
        step: the global step of the save.
    """

    def __init__(self, callback: ModelCheckpoint, step: int) -> None:
        self._callback = proxy(callback)
        self._step = step
        self.best_k_models = dict(callback.best_k_models)
        for name in _SEEN:
            setattr(self, name, getattr(callback, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callback, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the callback, as a weak reference has it."""
        return self._callback.__class__  # type: ignore[no-any-return]

    def tell(self, trainer: Trainer) -> None:
        """Tell the loggers that the save is committed."""
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)  # type: ignore[arg-type]

    def log_cost(self, trainer: Trainer, stats: SaveStats) -> None:
        """Log what the save cost."""
        cost = {"stall": stats.stall, "durable": stats.durable, "nbytes": stats.nbytes}
        for logger in trainer.loggers:
            logger.log_metrics({f"asyncckpt/{name}": value for name, value in cost.items()}, step=self._step)
