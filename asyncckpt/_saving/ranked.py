"""What a Checkpointer of one rank makes of a state: a part of a folder, a file, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asyncckpt._ranks.coordination import Coordination
from asyncckpt._ranks.group import ProcessGroup, process_group
from asyncckpt._saving.arguments import check_rank_timeout
from asyncckpt._saving.one_writer import OneWriter
from asyncckpt._sharding.detect import is_sharded

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from asyncckpt._saving.saver import Saver
    from asyncckpt._saving.sharded_saves import ShardedSaves


class Ranked:
    """How the saves of one Checkpointer go with those of the other ranks.

    Args:
        sharded: whether all ranks write each checkpoint together; None to do so if the state is sharded.
        group: of the ranks; None for the default group.
        timeout: seconds that a rank waits for the others.
        series: directory and template of the Checkpointer, the same on all ranks.
        saver: takes the snapshots of this rank.
        when_busy: what a save does if there is no place for it.
        alone: whether this process saves without other ranks, whatever the process group.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - each is one decision of the user's
        self,
        sharded: bool | None,  # noqa: FBT001
        group: Any,
        timeout: float,
        series: str,
        saver: Saver,
        when_busy: str,
        *,
        alone: bool = False,
    ) -> None:
        if sharded is not None and not isinstance(sharded, bool):
            raise TypeError(f"sharded must be True, False or None, not {sharded!r}")
        check_rank_timeout(timeout)
        self._sharded = sharded
        self._given = group
        self._timeout = timeout
        self._series = series
        self._saver = saver
        self._when_busy = when_busy
        self._alone = alone
        self._store: Any = None  # of the group that the following belong to
        self._coordination: Coordination | None = None
        self._saves: ShardedSaves | None = None
        self._writer: OneWriter | None = None
        if not sharded:
            self.writer()

    @property
    def group(self) -> ProcessGroup | None:
        """The process group, if it has several ranks."""
        return None if self._alone else process_group(self._given)

    def shards(self, state: Any) -> bool:
        """Return whether all ranks save, or restore, a state together."""
        if self._sharded is None:
            return self.group is not None and is_sharded(state)
        return self._sharded

    def writer(self) -> OneWriter | None:
        """Return what decides which rank writes a state that is not sharded; None if there is one rank."""
        group = self._renewed()
        if self._writer is None and group is not None:
            self._writer = OneWriter(group, self._series, self._timeout)
        return self._writer

    def saves(self) -> ShardedSaves:
        """Return what makes the saves of all ranks.

        Raises:
            ValueError: they would replace others in the queue.
        """
        from asyncckpt._saving.sharded_saves import ShardedSaves  # noqa: PLC0415 - it imports DCP

        if self._when_busy == "replace":
            raise ValueError(
                'when_busy="replace" is not for sharded saves, which begin on each rank at another time; use'
                ' "wait" or "skip"'
            )
        coordination = self.coordination()
        if self._saves is None:
            self._saves = ShardedSaves(coordination, self._saver, skips=self._when_busy == "skip")
        return self._saves

    def agree(self, what: str, flags: Collection[str], problem: str | None) -> Mapping[str, list[int]]:
        """Wait for the other ranks.

        Args:
            what: what all of them do; the same on all ranks.
            flags: what holds on this rank.
            problem: why this rank cannot.

        Returns:
            Which ranks raised each flag.

        Raises:
            RankError: a rank does something else, has a problem, or does not come; on all ranks.
        """
        return self.coordination().exchange(what, flags, problem).flags

    def close(self) -> None:
        """Leave nothing in the store of the group."""
        coordination, self._coordination = self._coordination, None  # once: the ranks are counted
        if coordination is not None:
            coordination.close()
        if self._writer is not None:
            self._writer.close()

    def coordination(self) -> Coordination:
        """Return what the ranks agree through; of this process alone, if there are no others."""
        group = self._renewed()
        if self._coordination is None:
            self._coordination = Coordination(group or _alone(), self._series, self._timeout)
        return self._coordination

    def _renewed(self) -> ProcessGroup | None:
        """Return the process group; what belonged to one before it is dropped."""
        group = self.group
        store = None if group is None else group.store
        if store is not self._store:
            self._store = store
            self._coordination = self._saves = self._writer = None
        return group


def _alone() -> ProcessGroup:
    """Return a group of this process alone."""
    from torch import distributed  # noqa: PLC0415 - most programs do without

    return ProcessGroup(distributed.HashStore(), 0, 1)  # type: ignore[attr-defined]
