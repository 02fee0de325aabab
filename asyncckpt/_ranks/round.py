"""Let all ranks decide one save together: committed or failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncckpt._ranks.coordination import Coordination


class Round:
    """One save of all ranks, from its plan to its end.

    Make one on each rank right after the exchange. Then either `fail` is called, or the last wait is made
    (`outcome`; on rank 0 `end`): a rank is through then, and the store is cleared when all are. Every wait
    ends `timeout` seconds after it began, and fails the save for all ranks with an error that names those
    that are missing; so does an exception that is raised in it (Ctrl-C). A failed save stays failed: all
    later calls raise the error of the first rank that failed it.

    Any method raises RankError if the save has failed, or if the store does not answer.

    Args:
        coordination: of the ranks.
        number: of the exchange.
        cancelled: looked at during waits; if true, the save is failed.
    """

    def __init__(
        self, coordination: Coordination, number: int, cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        raise NotImplementedError

    # --- on the training thread

    def gather(self, payload: bytes) -> list[bytes] | None:
        """Send a payload to rank 0; rank 0 waits and gets all of them, in order of rank, the others None."""
        raise NotImplementedError

    def scatter(self, payloads: Sequence[bytes] | None = None) -> bytes:
        """Wait for the payload of this rank from rank 0, which passes one for each rank."""
        raise NotImplementedError

    # --- in the background

    def begin(self, text: str) -> None:
        """Publish a text (rank 0)."""
        raise NotImplementedError

    def begun(self) -> str:
        """Wait for the text of `begin` (any rank)."""
        raise NotImplementedError

    def report(self, payload: bytes) -> None:
        """Report that this rank has written its part (every rank, rank 0 too); does not wait."""
        raise NotImplementedError

    def reports(self) -> list[bytes]:
        """Wait for the reports of all ranks, decide to commit, and return them in order of rank (rank 0).

        Once it has returned, no other rank can fail the save.
        """
        raise NotImplementedError

    def end(self, text: str) -> None:
        """Tell all ranks that the save is committed, and a text (rank 0)."""
        raise NotImplementedError

    def outcome(self) -> str:
        """Wait for the end of the save, and return the text of `end` (other ranks).

        Raises:
            RankError: the save has failed; or rank 0 has decided to commit and then been silent for `timeout`
                seconds more: the message says that it may be committed.
        """
        raise NotImplementedError

    def fail(self, why: str) -> bool:
        """Fail the save for all ranks, on any rank, at any time, from any thread; never raises.

        Without effect once the commit was decided, except on rank 0, whose commit may fail, and once it ended.

        Returns:
            Whether the save has failed, for this reason or an earlier one.
        """
        raise NotImplementedError
