"""The saves, removals, copies and links that a plugin has submitted, until they are reported."""

from __future__ import annotations

import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any

from asyncckpt.errors import BusyError, SaveError

if TYPE_CHECKING:
    from asyncckpt._saving.save import Outcome
    from asyncckpt.types import SaveStats


class Submitted:
    """Outcomes by path; only the last one of a path is kept."""

    def __init__(self) -> None:
        self._outcomes: dict[str, tuple[Outcome[Any], SaveStats | None]] = {}

    def note(self, path: str, outcome: Outcome[Any], stats: SaveStats | None = None) -> None:
        """Keep an outcome; with `stats` it is that of a save."""
        for former, (ended, of_save) in list(self._outcomes.items()):
            if ended.done() and (of_save is not None or not ended.failed()):
                del self._outcomes[former]
        self._outcomes[path] = outcome, stats

    def take(self, path: str) -> tuple[Outcome[Any] | None, SaveStats | None]:
        """Return outcome and cost of the last operation on a path; the caller raises its failure."""
        outcome, stats = self._outcomes.pop(path, (None, None))
        if outcome is not None:
            outcome.retrieved = True
        return outcome, stats

    def wait_for_changes(self, timeout: float | None) -> None:
        """Wait for removals, copies and links.

        Raises:
            BusyError: they are still pending after `timeout` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        for outcome, stats in list(self._outcomes.values()):
            if stats is None:
                try:
                    outcome.exception(None if end is None else max(end - time.monotonic(), 0))
                except FutureTimeoutError:
                    raise BusyError(f"removals are still pending after {timeout} s; they continue") from None

    def raise_failed_changes(self) -> None:
        """Raise what failed of the removals, copies and links, each once."""
        for path, (outcome, stats) in list(self._outcomes.items()):
            if stats is None and outcome.failed():
                del self._outcomes[path]
                error = outcome.exception()
                raise SaveError(f"{path} could not be removed or linked: {error}") from error
