"""Saves that all ranks of a process group make together: they agree, plan, and take their snapshots."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from asyncckpt._ranks.round import Round
from asyncckpt._saving.engine import get_engine
from asyncckpt._saving.save import Save, skipped
from asyncckpt._saving.shard_staging import ShardStager
from asyncckpt._saving.sharded_target import ShardedTarget, SharedPlan
from asyncckpt._sharding.planning import LocalPlan, global_plan
from asyncckpt._sharding.states import collect_sharded, with_rank_state
from asyncckpt.errors import RankError
from asyncckpt.types import SaveStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.checkpoint.planner import SavePlanner

    from asyncckpt._ranks.calls import Running
    from asyncckpt._ranks.coordination import Coordination, Exchange
    from asyncckpt._saving.request import SaveRequest
    from asyncckpt._saving.saver import Saver
    from asyncckpt._saving.staging import Frozen

T = TypeVar("T")

_CHANGED, _BUSY, _FAILED = "changed", "busy", "failed"


class ShardedSaves:
    """Makes the saves of one Checkpointer on all ranks, or on none.

    Args:
        coordination: of the ranks.
        saver: takes the snapshots of this rank.
        skips: whether a save is skipped on all ranks if one of them has no place for it.
    """

    def __init__(self, coordination: Coordination, saver: Saver, *, skips: bool) -> None:
        self._coordination = coordination
        self._saver = saver
        self._skips = skips
        self._plan: SharedPlan | None = None
        self._stagers: ShardStager | None = None

    def save(self, wanted: SaveRequest) -> Save:
        """Take the snapshot of this rank, and queue its write; return once the state may be changed.

        Raises:
            RankError: another rank cannot save, or does not come; no rank has begun this save.
            SaveError: this rank cannot save, or an earlier save failed and its error was not raised yet.
        """
        self._refuse_to_wait("save()")
        same = f"save({wanted.step}) as {wanted.name}"
        return self._all_or_none(same, lambda attempt: self._save(wanted, same, attempt))

    def _save(self, wanted: SaveRequest, same: str, attempt: _Attempt) -> Save:
        stats = SaveStats()
        part = _Part(wanted.state, wanted.rank_state, wanted.planner())
        flags, error = self._prepare(part, wanted.refuse, stats)
        exchanging = attempt.exchange = self._coordination.exchanging(same, flags, _text(error))
        if part.frozen is None or flags:
            exchange = self._agreed(exchanging.call, error, stats)
            save = self._save_differing(wanted, same, part, exchange, attempt, stats)
        else:
            exchanging.start()
            try:
                save = self._start(wanted, part, lambda: self._same(exchanging, attempt, stats))
            except _DifferentError as found:
                save = self._save_differing(wanted, same, part, found.exchange, attempt, stats)
        save.stats.freeze += stats.freeze
        save.stats.agreement = stats.agreement
        return save

    def _same(self, exchanging: Running[Exchange], attempt: _Attempt, stats: SaveStats) -> Round:
        """Return the round of a save whose state was copied while the ranks agreed.

        Raises:
            _DifferentError: a rank has raised a flag.
        """
        exchange = self._agreed(exchanging.result, None, stats)
        if exchange.flags:
            raise _DifferentError(exchange)
        return attempt.begin(self._coordination, exchange)

    def _save_differing(  # noqa: PLR0913, PLR0917 - what `_save` knows
        self,
        wanted: SaveRequest,
        same: str,
        part: _Part,
        exchange: Exchange,
        attempt: _Attempt,
        stats: SaveStats,
    ) -> Save:
        """Do what all ranks do for the flags that one of them has raised; nothing is copied yet."""
        if not {_FAILED, _BUSY}.isdisjoint(exchange.flags):
            attempt.exchange = None  # nobody waits for a round
        if _FAILED in exchange.flags:
            self._raise_failures(exchange.flags[_FAILED])
        if _BUSY in exchange.flags:
            save = Save(wanted.step, wanted.store.path_of(wanted.name))
            return skipped(save, f"ranks {exchange.flags[_BUSY]} are still writing earlier saves")
        made = attempt.begin(self._coordination, exchange)
        return self._start(wanted, self._planned(part, exchange, made, same, stats), lambda: made)

    def reserve(self, state: Any, rank_state: Any = None) -> int:
        """Plan a save, and allocate host memory for its snapshots; return the size of one on this rank.

        Raises:
            RankError: another rank cannot save, or does not come.
            SaveError: this rank cannot save.
        """
        self._refuse_to_wait("reserve()")
        return self._all_or_none("reserve()", lambda attempt: self._reserve(state, rank_state, attempt))

    def _reserve(self, state: Any, rank_state: Any, attempt: _Attempt) -> int:
        stats, same = SaveStats(), "reserve()"
        part = _Part(state, rank_state)
        flags, error = self._prepare(part, lambda: None, stats)
        attempt.exchange = self._coordination.exchanging(same, flags, _text(error))
        exchange = self._agreed(attempt.exchange.call, error, stats)
        made = attempt.begin(self._coordination, exchange)
        frozen = self._planned(part, exchange, made, same, stats).frozen
        made.fail("nothing is saved by reserve()")
        assert frozen is not None  # noqa: S101 - it is planned
        return self._saver.reserve_frozen(frozen[0], self._stager)

    def _all_or_none(self, same: str, work: Callable[[_Attempt], T]) -> T:
        """Call `work`; if it raises, the other ranks do not wait for this one.

        Args:
            same: the call.
            work: notes in its argument what the other ranks may wait for.
        """
        number, attempt = self._coordination.number, _Attempt()
        try:
            return work(attempt)
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
            if attempt.round is not None:
                attempt.round.fail(why)
            elif attempt.exchange is not None and not isinstance(error, RankError):
                attempt.exchange.give_up(why if isinstance(error, Exception) else None)
            if not isinstance(error, Exception):  # of others the ranks are told in the exchanges
                self._give_up(number, same, why, attempt.round)
            raise

    def _give_up(self, number: int, same: str, why: str, made: Round | None) -> None:
        """Tell the ranks of an interrupted call, wherever they wait.

        Args:
            number: of the first exchange that the call could take part in.
            same: the call.
            why: the reason.
            made: the round that the call has made, if it has.
        """
        ranks = self._coordination
        if ranks.number == number:
            ranks.refuse(number, same, why)
            return
        last = ranks.number - 1 if made is None else made.number
        flags = ranks.flags(last)
        if flags is None or not flags.isdisjoint((_FAILED, _BUSY)):
            return  # nothing was begun
        if made is None and last not in ranks.broken_off:
            Round(ranks, last).fail(why)
        if _CHANGED in flags:
            ranks.refuse(last + 1, f"the plan of {same}", why)

    def _prepare(
        self, part: _Part, refuse: Callable[[], object], stats: SaveStats
    ) -> tuple[list[str], Exception | None]:
        """Freeze this rank's part if the last plan still holds; return what the others have to know."""
        flags = []
        if self._saver.reports.has_failures():
            flags.append(_FAILED)
        if self._skips and self._saver.is_full():
            flags.append(_BUSY)
        try:
            self._collect(part, stats)  # on all ranks: FSDP1 has collectives in it
            if self._coordination.leads:
                refuse()
            if self._plan is None or self._plan.fingerprint != part.plan.fingerprint:
                flags.append(_CHANGED)
            else:
                part.frozen = self._stager.freeze((self._plan.kept, part.plan.flat), stats)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait to be told
            return flags, error
        return flags, None

    def _collect(self, part: _Part, stats: SaveStats) -> None:
        began = time.perf_counter()
        state, part.objects = collect_sharded(part.state)
        if part.rank_state is not None:
            state = with_rank_state(state, self._coordination.rank, part.rank_state)
        part.plan = LocalPlan(state, part.planner)
        stats.freeze += time.perf_counter() - began

    def _planned(self, part: _Part, exchange: Exchange, made: Round, same: str, stats: SaveStats) -> _Part:
        """Plan anew on all ranks if the state has changed on one of them; return the part, frozen."""
        if _CHANGED not in exchange.flags:
            return part
        plan: SharedPlan | None = None
        self._plan, error = None, None
        same = f"the plan of {same}"
        try:
            plan = self._plan_together(part, made, stats)
            part.frozen = self._stager.freeze((plan.kept, part.plan.flat), stats)
        except Exception as found:  # noqa: BLE001 - as in `_prepare`
            made.fail(f"{type(found).__name__}: {found}")
            error = found
        self._agreed(self._coordination.exchanging(same, (), _text(error)).call, error, stats)
        self._plan = plan
        return part

    def _plan_together(self, part: _Part, made: Round, stats: SaveStats) -> SharedPlan:
        began = time.perf_counter()
        payloads = made.gather(part.plan.encode())
        final = None if payloads is None else global_plan(payloads, part.planner)
        kept = made.scatter(None if final is None else final.kept)
        plan = SharedPlan(part.plan.fingerprint, part.plan.keep(kept), final)
        stats.agreement += time.perf_counter() - began
        return plan

    def _start(self, wanted: SaveRequest, part: _Part, agree: Callable[[], Round]) -> Save:
        assert self._plan is not None  # noqa: S101 - it is planned
        target = ShardedTarget(
            wanted.store,
            wanted.name,
            wanted.description,
            agree,
            self._coordination.rank,
            self._plan,
            wanted.series if self._coordination.leads else None,
            wanted.extras or {},
        )
        overlap, reason = wanted.overlap(part.objects)
        save = self._saver.start(
            part.plan.flat,
            target,
            wanted.step,
            wanted.began,
            overlap,
            self._stager,
            skips=False,
            frozen=part.frozen,
        )
        save.stats.reason = save.stats.reason or reason
        return save

    def _agreed(self, wait: Callable[[], Exchange], error: Exception | None, stats: SaveStats) -> Exchange:
        """Return the end of an exchange, which `wait` returns."""
        began = time.perf_counter()
        try:
            return wait()
        except RankError:
            if error is not None:
                raise error from None  # of this rank, which says more
            raise
        finally:
            stats.agreement += time.perf_counter() - began

    def _raise_failures(self, ranks: list[int]) -> NoReturn:
        """Raise the failure of an earlier save, of which not all ranks may have heard yet."""
        hint = "; the save that raised this was not started"
        self._saver.drain(self._coordination.timeout)
        self._saver.raise_failures(hint)
        raise RankError(f"an earlier save has failed, as ranks {ranks} know{hint} on any rank")

    def _refuse_to_wait(self, what: str) -> None:
        self._saver.refuse_handler()
        get_engine().refuse_to_wait(f"{what} of a sharded state")

    @property
    def _stager(self) -> ShardStager:
        arena = get_engine().arena
        if self._stagers is None or self._stagers.arena is not arena:
            self._stagers = ShardStager(arena)
        return self._stagers


def _is_given_up() -> bool:
    """Return whether this process ends without its pending saves."""
    return get_engine().given_up


@dataclass(slots=True, eq=False)
class _Part:
    """What this rank brings to a save."""

    state: Any
    rank_state: Any
    planner: SavePlanner | None = None
    plan: LocalPlan = field(init=False)
    objects: list[Any] = field(init=False)
    frozen: Frozen | None = None


class _Attempt:
    """What the other ranks may wait for in a call of this one: an exchange, then the round behind it."""

    exchange: Running[Exchange] | None = None
    round: Round | None = None

    def begin(self, ranks: Coordination, exchange: Exchange) -> Round:
        """Make the round behind an exchange."""
        self.round = Round(ranks, exchange.number, _is_given_up)
        return self.round


class _DifferentError(Exception):
    """The ranks do not all save the same as last time."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(str(exchange))
        self.exchange = exchange


def _text(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"
