"""Let all ranks of a process group act on the decisions of rank 0, through the store of the group."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from asyncckpt.errors import AsyncCkptError, BusyError, SaveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from asyncckpt._ranks.group import ProcessGroup

_SHORTEST_PAUSE, _LONGEST_PAUSE = 1e-4, 0.02
# How many have been made, by store: ranks may be in several groups.
_made: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision of rank 0 for one call of `due`, and how long it holds.

    Attributes:
        step: the step that rank 0 was asked for.
        due: whether a save is due.
        until: the next verdict is given at this step, or after a step back; before that no save is due.
        signum: the signal that a rank has received, or None.
        error: why rank 0 could not decide, or None.
    """

    step: int
    due: bool = False
    until: int = 0
    signum: int | None = None
    error: str | None = None


class Agreement:
    """Give every rank the verdicts of rank 0. All ranks make theirs in the same order.

    The store of the group is used by the calling thread, and no collective: rank 0 does not wait, the others
    wait for it.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._store = group.store
        number = _made.get(group.store, 0)
        _made[group.store] = number + 1
        self._prefix = f"asyncckpt/due/{number}"
        self._number = 0  # of the next verdict
        self._step = self._until = 0  # of the last call, and of the next verdict

    @property
    def decides(self) -> bool:
        """Whether this is rank 0."""
        return self._group.rank == 0

    def verdict(self, step: int, decide: Callable[[], Verdict]) -> Verdict | None:
        """Return the verdict of rank 0; None while the last one holds, and no save is due.

        Args:
            step: the step that this rank was asked for.
            decide: called on rank 0.

        Raises:
            SaveError: the ranks were asked for different steps, or rank 0 could not decide.
            BusyError: rank 0 was not asked within the timeout of the store.
        """
        if self._step <= step < self._until:
            self._step = step
            return None
        self._step = self._until = step
        with _store_errors():
            verdict = self._publish(step, decide) if self.decides else self._read(step)
        self._until = verdict.until
        return verdict

    def report(self, signum: int) -> None:
        """Report a signal to rank 0."""
        with _store_errors():
            self._store.set(f"{self._prefix}/signal/{signum}", b"")

    def reported(self, signals: Iterable[int]) -> list[int]:
        """Return those of `signals` that other ranks have reported."""
        with _store_errors():
            return [signum for signum in signals if self._store.check([f"{self._prefix}/signal/{signum}"])]

    def _publish(self, step: int, decide: Callable[[], Verdict]) -> Verdict:
        try:
            verdict = decide()
        except Exception as error:
            # The other ranks wait for an answer.
            self._put(Verdict(step, error=f"{type(error).__name__}: {error}"))
            raise
        self._put(verdict)
        return verdict

    def _put(self, verdict: Verdict) -> None:
        self._store.set(f"{self._prefix}/{self._number}", json.dumps(asdict(verdict)))
        self._number += 1

    def _read(self, step: int) -> Verdict:
        key = f"{self._prefix}/{self._number}"
        self._wait_for(key, step)
        verdict = Verdict(**json.loads(self._store.get(key)))
        self._number += 1
        readers = f"{key}/read"
        if self._store.add(readers, 1) == self._group.size - 1:
            self._store.delete_key(key)
            self._store.delete_key(readers)
        if verdict.error is not None:
            raise SaveError(f"rank 0 could not decide whether a save is due: {verdict.error}")
        if verdict.step != step:
            raise SaveError(
                f"rank {self._group.rank} called due({step}) where rank 0 called due({verdict.step}); call it"
                " on every rank, once a step and with the same step"
            )
        return verdict

    def _wait_for(self, key: str, step: int) -> None:
        """Wait for a key, without a blocking request, which would hold up other users of the store."""
        patience = self._store.timeout.total_seconds()
        end, pause = time.monotonic() + patience, _SHORTEST_PAUSE
        while not self._store.check([key]):
            if time.monotonic() > end:
                raise BusyError(
                    f"rank 0 has not called due({step}) for {patience:.0f} s; call it on every rank, once a"
                    " step and with the same step"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except AsyncCkptError:
        raise
    except RuntimeError as error:  # the process that hosts the store may have ended
        raise SaveError(f"the store of the process group failed in due(): {error}") from error
