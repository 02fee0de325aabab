"""Let all ranks of a process group agree on a save before any of them begins it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from asyncckpt._ranks.group import ProcessGroup


@dataclass(frozen=True, slots=True)
class Exchange:
    """What all ranks have said; equal on all of them.

    Attributes:
        number: of the exchange, from 0; the same on all ranks. Failed exchanges have one, too.
        flags: which ranks raised a flag, in order; flags that no rank raised are absent.
    """

    number: int
    flags: Mapping[str, list[int]] = field(default_factory=dict)


class Coordination:
    """Coordinate the saves of all ranks through the key-value store of their group.

    All ranks make one; the k-th one of a name that is used on each rank belong together. No collective is
    used. `exchange` is for one thread at a time; the rounds of earlier exchanges may run beside it.

    Args:
        group: the ranks.
        name: keeps the keys of several coordinations apart.
        timeout: seconds that a rank waits for the others.
    """

    def __init__(self, group: ProcessGroup, name: str, timeout: float) -> None:
        self._group = group
        self._name = name
        self.timeout = timeout

    @property
    def rank(self) -> int:
        """The rank of this process in the group."""
        return self._group.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._group.size

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def exchange(self, same: str, flags: Collection[str] = (), problem: str | None = None) -> Exchange:
        """Wait until all ranks have called this, and return what they said.

        Args:
            same: has to be equal on all ranks ("step 100").
            flags: names of what holds on this rank ("changed", "busy").
            problem: why this rank cannot go on.

        Raises:
            RankError: on all ranks, with one text: a rank called with another `same`, has a problem, was
                interrupted, or has not called within the timeout; the message names it. A rank that comes
                late with the same text gets the same error; with another text, it takes part in the next
                exchange. The next exchange is a new one on all ranks. Also: the store does not answer.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Delete what is left in the store once all ranks have called this; waits for nobody."""
        raise NotImplementedError
