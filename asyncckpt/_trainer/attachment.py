"""Put a BackgroundIO into a strategy, and give the strategy back what it had."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asyncckpt._trainer.redirection import Redirection
from asyncckpt._trainer.strategies import is_sharding, takes_io, warn_if_passed_by

if TYPE_CHECKING:
    from asyncckpt._trainer.checkpoint_io import BackgroundIO


class Attachment:
    """The use of a BackgroundIO by a strategy, until `end`.

    Args:
        strategy: of a Trainer or of Fabric.
        io: carries out its saves.
        replaces: whether it takes the place of the CheckpointIO of the strategy.
    """

    def __init__(self, strategy: Any, io: BackgroundIO, *, replaces: bool) -> None:
        self.strategy = strategy
        self._former: Any = strategy.checkpoint_io if replaces else None
        if replaces:
            strategy.checkpoint_io = io
        self._redirection = Redirection(strategy, io) if is_sharding(strategy) else None
        if self._redirection is None and not takes_io(strategy):
            warn_if_passed_by(strategy)

    def end(self) -> None:
        """Give back what was replaced; idempotent."""
        if self._redirection is not None:
            self._redirection.end()
        if self._former is not None:
            self.strategy.checkpoint_io, self._former = self._former, None
