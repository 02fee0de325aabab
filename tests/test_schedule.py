from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from asyncckpt import LastN
from asyncckpt.schedule import AnyOf, Budget, Every, Progress, Schedule, calls_until_due

counts = st.integers(min_value=1, max_value=60)
durations = st.floats(min_value=1e-3, max_value=1e5)
shares = st.floats(min_value=1e-4, max_value=0.9)
costs = st.floats(min_value=0.0, max_value=1e3)
every_steps = st.builds(lambda n: Every(steps=n), counts)
every_time = st.builds(lambda unit, n: Every(**{unit: n}), st.sampled_from(["seconds", "minutes"]), durations)
budgets = st.builds(Budget, shares, st.none() | st.floats(min_value=1e-3, max_value=1e4))
simple: st.SearchStrategy[Any] = every_steps | every_time | budgets
schedules: st.SearchStrategy[Any] = st.recursive(
    simple, lambda parts: st.builds(lambda a, b: a | b, parts, parts), max_leaves=4
)


@st.composite
def progresses(draw: st.DrawFn) -> Progress:
    step = draw(st.integers(min_value=0, max_value=500))
    return Progress(
        step=step,
        steps=draw(st.integers(min_value=0, max_value=step)),
        seconds=draw(st.floats(min_value=0.0, max_value=1e6)),
        saves=draw(st.integers(min_value=0, max_value=3)),
        cost=draw(st.none() | costs),
        durable=draw(costs),
        step_time=draw(st.none() | durations),
    )


def after(progress: Progress, steps: int, seconds: float) -> Progress:
    return replace(
        progress,
        step=progress.step + steps,
        steps=progress.steps + steps,
        seconds=progress.seconds + seconds,
    )


class TestLaws:
    @given(schedules, progresses(), counts, costs)
    def test_once_due_stays_due_until_a_save(
        self, schedule: Any, progress: Progress, steps: int, seconds: float
    ) -> None:
        assume(schedule.due(progress))
        assert schedule.due(after(progress, steps, seconds))

    @given(schedules, progresses())
    def test_never_due_without_a_step_since_the_save(self, schedule: Any, progress: Progress) -> None:
        assert not schedule.due(replace(progress, steps=0))

    @given(progresses(), schedules, schedules)
    def test_union_is_due_exactly_if_either_is(self, progress: Progress, a: Any, b: Any) -> None:
        assert (a | b).due(progress) == (a.due(progress) or b.due(progress))

    @given(schedules, schedules, schedules)
    def test_unions_nest_flat(self, a: Any, b: Any, c: Any) -> None:
        assert (a | b) | c == a | (b | c)
        assert not any(isinstance(each, AnyOf) for each in ((a | b) | c).schedules)

    @given(counts, st.integers(min_value=1, max_value=500))
    def test_every_n_steps_saves_at_the_multiples(self, n: int, last: int) -> None:
        saved, base = [], 0
        for step in range(1, last + 1):
            if Every(steps=n).due(Progress(step, step - base, 0.0)):
                saved.append(step)
                base = step
        assert saved == list(range(n, last + 1, n))

    @given(counts, st.lists(counts, min_size=1, max_size=30))
    def test_every_n_steps_saves_once_for_the_multiples_between_two_calls(
        self, n: int, strides: list[int]
    ) -> None:
        step = base = 0
        for stride in strides:
            before, step = step, step + stride
            due = Every(steps=n).due(Progress(step, step - base, 0.0))
            assert due == any(multiple % n == 0 for multiple in range(before + 1, step + 1))
            base = step if due else base

    @given(every_time, progresses())
    def test_a_unit_is_a_number_of_seconds(self, schedule: Every, progress: Progress) -> None:
        seconds = schedule.seconds or (schedule.minutes or 0.0) * 60
        assert schedule.due(progress) == Every(seconds=seconds).due(progress)

    @given(budgets, progresses(), costs)
    def test_a_budget_is_never_exceeded(self, budget: Budget, progress: Progress, cost: float) -> None:
        progress = replace(progress, cost=cost)
        assume(budget.due(progress))
        assert cost <= budget.share * progress.seconds * (1 + 1e-9)

    @given(budgets, costs, costs, costs)
    def test_what_costs_more_is_saved_no_more_often(
        self, budget: Budget, cost: float, more: float, durable: float
    ) -> None:
        assert budget.interval(cost, durable) <= budget.interval(cost + more, durable)

    @given(shares, st.floats(min_value=1e-3, max_value=1e4), costs, costs)
    def test_failures_make_a_budget_save_at_the_optimum_or_less_often(
        self, share: float, mtbf_hours: float, cost: float, durable: float
    ) -> None:
        optimum = math.sqrt(2 * cost * mtbf_hours * 3600)
        alone = Budget(share).interval(cost, durable)
        assert Budget(share, mtbf_hours).interval(cost, durable) == pytest.approx(max(alone, optimum))

    @given(budgets, progresses(), costs)
    def test_a_budget_waits_until_the_last_save_would_be_durable(
        self, budget: Budget, progress: Progress, durable: float
    ) -> None:
        progress = replace(progress, cost=0.0, durable=durable)
        assert budget.due(progress) == (progress.steps > 0 and progress.seconds >= durable)

    @given(
        schedules,
        progresses(),
        counts,
        st.just(math.inf) | costs,
        st.integers(min_value=1, max_value=40),
    )
    def test_the_calls_until_due_are_those_of_a_simulation(
        self, schedule: Any, progress: Progress, stride: int, seconds: float, limit: int
    ) -> None:
        found = calls_until_due(schedule, progress, stride, seconds, limit)
        simulated = (
            calls
            for calls in range(1, limit)
            if schedule.due(after(progress, calls * stride, calls * seconds))
        )
        assert found == next(simulated, limit)


class TestBudget:
    def test_the_first_save_comes_after_20_steps_or_60_seconds(self) -> None:
        budget = Budget(0.01)
        assert not budget.due(Progress(19, 19, 59.0))
        assert budget.due(Progress(20, 20, 0.1))
        assert budget.due(Progress(1, 1, 60.0))

    def test_the_second_save_waits_until_the_first_is_measured(self) -> None:
        assert not Budget(0.01).due(Progress(10**6, 10**6, 10**6, saves=1))
        assert Budget(0.01).due(Progress(10**6, 10**6, 10**6, saves=1, cost=1.0))

    def test_one_percent_of_the_time(self) -> None:
        assert Budget(0.01).interval(0.5) == 50.0
        assert not Budget(0.01).due(Progress(9, 9, 49.9, cost=0.5))
        assert Budget(0.01).due(Progress(9, 9, 50.0, cost=0.5))

    def test_young_and_daly(self) -> None:
        # 30 s of cost and a failure a day: the square root of 2 * 30 * 86,400.
        assert Budget(0.5, mtbf_hours=24).interval(30.0) == pytest.approx(2276.8, abs=0.1)
        assert Budget(0.01, mtbf_hours=24).interval(30.0) == 3000.0

    def test_a_cost_below_zero_is_noise(self) -> None:
        assert Budget(0.01, 24).interval(-1.0, 2.0) == 2.0


class Never:
    """A user's own schedule, which knows nothing of ours."""

    def due(self, _progress: Progress) -> bool:
        return False


class TestUsersSchedule:
    def test_is_a_schedule(self) -> None:
        assert isinstance(Never(), Schedule)

    @pytest.mark.parametrize(
        "union", [Never() | Every(steps=2), Every(steps=2) | Never()], ids=["left", "right"]
    )
    def test_combines_on_either_side(self, union: AnyOf) -> None:
        assert union.due(Progress(2, 2, 0.0))
        assert not union.due(Progress(1, 1, 0.0))
        assert len((union | Never() | Budget(0.1)).schedules) == 4


class TestConstruction:
    @pytest.mark.parametrize(
        "given", [{}, {"steps": 1, "hours": 1}, {"seconds": 1, "minutes": 1, "hours": 1}]
    )
    def test_every_takes_exactly_one_unit(self, given: dict[str, Any]) -> None:
        with pytest.raises(TypeError, match=f"exactly one of steps, .* and hours, not {len(given)}"):
            Every(**given)

    def test_every_takes_no_number_without_a_unit(self) -> None:
        with pytest.raises(TypeError, match="positional argument"):
            Every(500)  # type: ignore[call-arg]

    @pytest.mark.parametrize("value", [2.0, "2", True])
    def test_steps_are_ints(self, value: Any) -> None:
        with pytest.raises(TypeError, match="steps must be an int, not"):
            Every(steps=value)

    @pytest.mark.parametrize("value", [0, -1])
    def test_steps_start_at_one(self, value: int) -> None:
        with pytest.raises(ValueError, match=f"at least 1, not {value}"):
            Every(steps=value)

    @pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
    @pytest.mark.parametrize(
        "make", [lambda v: Every(minutes=v), Budget, lambda v: Budget(0.1, mtbf_hours=v)]
    )
    def test_durations_and_shares_are_positive_and_finite(self, make: Any, value: float) -> None:
        with pytest.raises(ValueError, match=f"positive and finite, not {value}"):
            make(value)

    @pytest.mark.parametrize("value", ["1", True, [1]])
    @pytest.mark.parametrize("make", [lambda v: Every(hours=v), Budget, lambda v: Budget(0.1, mtbf_hours=v)])
    def test_durations_and_shares_are_numbers(self, make: Any, value: Any) -> None:
        with pytest.raises(TypeError, match="must be a number, not"):
            make(value)

    def test_a_share_is_below_one(self) -> None:
        with pytest.raises(ValueError, match=r"below 1, such as 0\.01 for 1 percent, not 5"):
            Budget(5)

    @pytest.mark.parametrize("other", [None, 3, "last", Every, object(), Schedule, LastN(1)])
    def test_only_schedules_combine(self, other: Any) -> None:
        with pytest.raises(TypeError, match="unsupported operand"):
            Every(steps=1) | other
        with pytest.raises(TypeError, match="unsupported operand"):
            other | Every(steps=1)

    def test_schedules_are_plain_frozen_values(self) -> None:
        schedule = Every(steps=500) | Budget(0.01, mtbf_hours=24)
        assert schedule == Every(steps=500) | Budget(0.01, 24)
        assert hash(schedule) == hash(Every(steps=500) | Budget(0.01, 24))
        assert repr(schedule) == "AnyOf(schedules=(Every(steps=500), Budget(share=0.01, mtbf_hours=24)))"
        with pytest.raises(FrozenInstanceError):
            schedule.schedules = ()  # type: ignore[misc]
