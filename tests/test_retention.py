from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.retention import AnyOf, BestK, EveryN, KeepAll, LastN, Mode, Policy, evict, first_best, rank
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

INF, NAN = math.inf, math.nan


def checkpoint(sequence: int, *, step: int | None = None, **metrics: float) -> Checkpoint:
    return Checkpoint(step=step, path=f"run/{sequence}.pt", metrics=metrics, sequence=sequence)


def with_losses(*losses: float) -> list[Checkpoint]:
    return [checkpoint(sequence, loss=loss) for sequence, loss in enumerate(losses, start=1)]


def sequences(checkpoints: Iterable[Checkpoint]) -> list[int]:
    return [c.sequence for c in checkpoints]


def kept(policy: Policy, checkpoints: Sequence[Checkpoint]) -> list[int]:
    return sorted(sequences(policy.keep(checkpoints)))


def evicted(policy: Policy, checkpoints: Sequence[Checkpoint]) -> list[int]:
    return sequences(evict(policy, checkpoints))


# Few different values, so that ties, NaN and infinities are common.
values = st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0, 2.0]) | st.floats(allow_nan=False)
metrics = st.dictionaries(st.sampled_from(["loss", "acc"]), values)
steps = st.none() | st.integers(min_value=0, max_value=40)
directories = st.lists(
    st.builds(
        lambda sequence, step, metrics: checkpoint(sequence, step=step, **metrics),
        st.integers(min_value=1, max_value=60),
        steps,
        metrics,
    ),
    max_size=12,
    unique_by=lambda c: c.sequence,
)
counts = st.integers(min_value=1, max_value=6)
modes: st.SearchStrategy[Mode] = st.sampled_from(["min", "max"])
best = st.builds(BestK, counts, st.sampled_from(["loss", "acc"]), modes)
simple = st.builds(LastN, counts) | st.builds(EveryN, counts) | st.just(KeepAll()) | best
policies: st.SearchStrategy[Any] = st.recursive(
    simple, lambda parts: st.builds(lambda a, b: a | b, parts, parts), max_leaves=4
)


def brute_force_best(checkpoints: Sequence[Checkpoint], k: int, metric: str, mode: Mode) -> list[int]:
    """Whoever is beaten by fewer than `k` others, with every rule spelled out pair by pair."""

    def beats(a: Checkpoint, b: Checkpoint) -> bool:
        x, y = a.metrics[metric], b.metrics[metric]
        if math.isnan(x) and math.isnan(y):
            return a.sequence > b.sequence
        if math.isnan(x) or math.isnan(y):
            return math.isnan(y)
        if x == y:
            return a.sequence > b.sequence
        return x < y if mode == "min" else x > y

    candidates = [c for c in checkpoints if metric in c.metrics]
    return sorted(c.sequence for c in candidates if sum(beats(o, c) for o in candidates) < k)


class TestLaws:
    @given(directories, policies)
    def test_newest_is_never_evicted(self, checkpoints: list[Checkpoint], policy: Policy) -> None:
        newest = max(sequences(checkpoints), default=None)
        assert newest not in evicted(policy, checkpoints)

    @given(directories, policies)
    def test_evicted_are_all_that_no_policy_keeps_in_order_of_commit(
        self, checkpoints: list[Checkpoint], policy: Policy
    ) -> None:
        every = set(sequences(checkpoints))
        staying = set(kept(policy, checkpoints)) | {max(every, default=0)}
        assert evicted(policy, checkpoints) == sorted(every - staying)

    @given(directories, policies)
    def test_evicting_again_removes_nothing(self, checkpoints: list[Checkpoint], policy: Policy) -> None:
        gone = evicted(policy, checkpoints)
        assert evicted(policy, [c for c in checkpoints if c.sequence not in gone]) == []

    @given(directories, policies, st.randoms(use_true_random=False))
    def test_order_of_input_does_not_matter(
        self, checkpoints: list[Checkpoint], policy: Policy, random: Any
    ) -> None:
        shuffled = random.sample(checkpoints, len(checkpoints))
        assert kept(policy, shuffled) == kept(policy, checkpoints)
        assert evicted(policy, shuffled) == evicted(policy, checkpoints)

    @given(directories, policies, policies)
    def test_union_keeps_exactly_the_union(self, checkpoints: list[Checkpoint], a: Any, b: Any) -> None:
        both = set(kept(a, checkpoints)) | set(kept(b, checkpoints))
        assert kept(a | b, checkpoints) == sorted(both)

    @given(directories, policies, policies)
    def test_another_policy_never_evicts_more(self, checkpoints: list[Checkpoint], a: Any, b: Any) -> None:
        assert set(evicted(a | b, checkpoints)) <= set(evicted(a, checkpoints))

    @given(directories, policies, policies, policies)
    def test_unions_nest_flat(self, checkpoints: list[Checkpoint], a: Any, b: Any, c: Any) -> None:
        left, right = (a | b) | c, a | (b | c)
        assert left == right
        assert not any(isinstance(policy, AnyOf) for policy in left.policies)
        assert evicted(left, checkpoints) == evicted(right, checkpoints)

    @given(directories, counts, modes)
    def test_best_is_the_brute_force_best(self, checkpoints: list[Checkpoint], k: int, mode: Mode) -> None:
        expected = brute_force_best(checkpoints, k, "loss", mode)
        assert kept(BestK(k, "loss", mode), checkpoints) == expected

    @given(directories, counts)
    def test_max_of_the_metric_is_min_of_its_negative(self, checkpoints: list[Checkpoint], k: int) -> None:
        negative = [replace(c, metrics={name: -v for name, v in c.metrics.items()}) for c in checkpoints]
        assert kept(BestK(k, "loss", "max"), checkpoints) == kept(BestK(k, "loss", "min"), negative)

    @given(directories, counts, modes, st.data())
    def test_a_worse_one_never_evicts_a_better_one(
        self, checkpoints: list[Checkpoint], k: int, mode: Mode, data: st.DataObject
    ) -> None:
        policy = BestK(k, "loss", mode)
        ranked = rank(checkpoints, "loss", mode)
        worst = ranked[-1].metrics["loss"] if ranked else 0.0
        loss = data.draw(
            st.just(NAN)
            if math.isnan(worst)
            else values.filter(lambda v: math.isnan(v) or (v > worst if mode == "min" else v < worst))
            | st.just(NAN)
        )
        sequence = 100 if not math.isnan(worst) else 0  # among NaNs the older is the worse
        more = [*checkpoints, checkpoint(sequence, loss=loss)]
        assert set(kept(policy, checkpoints)) <= set(kept(policy, more))

    @given(directories, counts)
    def test_last_n_are_the_n_highest_in_order_of_commit(self, checkpoints: list[Checkpoint], n: int) -> None:
        assert kept(LastN(n), checkpoints) == sorted(sequences(checkpoints))[-n:]

    @given(directories, counts)
    def test_every_n_are_the_multiples(self, checkpoints: list[Checkpoint], n: int) -> None:
        multiples = range(0, 41, n)
        assert kept(EveryN(n), checkpoints) == sorted(c.sequence for c in checkpoints if c.step in multiples)

    @given(directories)
    def test_keep_all_evicts_nothing(self, checkpoints: list[Checkpoint]) -> None:
        assert evicted(KeepAll(), checkpoints) == []

    @given(directories, counts, counts)
    def test_a_run_never_holds_more_than_its_policy_says(
        self, checkpoints: list[Checkpoint], k: int, n: int
    ) -> None:
        on_disk: list[Checkpoint] = []
        for committed in sorted(checkpoints, key=lambda c: c.sequence):
            on_disk.append(committed)
            gone = evicted(BestK(k, "loss") | LastN(n), on_disk)
            on_disk = [c for c in on_disk if c.sequence not in gone]
            assert len(on_disk) <= k + n
        # Nothing that was evicted on the way would be among the best in the end.
        assert set(kept(BestK(k, "loss"), checkpoints)) <= set(sequences(on_disk))


class TestBest:
    def test_lower_is_better_by_default(self) -> None:
        checkpoints = with_losses(3.0, 1.0, 2.0, 4.0)
        assert kept(BestK(2, "loss"), checkpoints) == [2, 3]
        assert kept(BestK(2, "loss", mode="max"), checkpoints) == [1, 4]

    @pytest.mark.parametrize(("mode", "worst"), [("min", INF), ("max", -INF)])
    def test_nan_is_worse_than_the_worst_infinity(self, mode: Mode, worst: float) -> None:
        checkpoints = with_losses(worst, NAN)
        assert kept(BestK(1, "loss", mode), checkpoints) == [1]

    @pytest.mark.parametrize("mode", ["min", "max"])
    def test_nan_is_a_candidate_where_there_is_nothing_better(self, mode: Mode) -> None:
        assert kept(BestK(1, "loss", mode), with_losses(NAN)) == [1]

    def test_best_infinity_is_the_best(self) -> None:
        checkpoints = with_losses(-INF, 0.0, INF)
        assert kept(BestK(1, "loss"), checkpoints) == [1]
        assert kept(BestK(1, "loss", "max"), checkpoints) == [3]

    @pytest.mark.parametrize("loss", [1.0, NAN, INF, -INF])
    @pytest.mark.parametrize("mode", ["min", "max"])
    def test_of_equals_the_newer_is_kept(self, loss: float, mode: Mode) -> None:
        assert kept(BestK(2, "loss", mode), with_losses(loss, loss, loss)) == [2, 3]

    def test_zeros_of_both_signs_are_equal(self) -> None:
        assert kept(BestK(1, "loss"), with_losses(-0.0, 0.0)) == [2]

    def test_without_the_metric_is_no_candidate(self) -> None:
        checkpoints = [checkpoint(1, loss=9.0), checkpoint(2, acc=0.5), checkpoint(3)]
        assert kept(BestK(3, "loss"), checkpoints) == [1]
        assert evicted(BestK(3, "loss"), checkpoints) == [2]

    def test_rank_gives_the_whole_order(self) -> None:
        checkpoints = [*with_losses(NAN, 2.0, INF, 2.0, -INF, NAN), checkpoint(7)]
        assert sequences(rank(checkpoints, "loss")) == [5, 4, 2, 3, 6, 1]
        assert sequences(rank(checkpoints, "loss", "max")) == [3, 4, 2, 5, 6, 1]

    def test_first_best(self) -> None:
        first, second = BestK(1, "loss"), BestK(2, "acc", "max")
        assert first_best(first) is first
        assert first_best(LastN(1) | (EveryN(5) | first) | second) is first
        assert first_best(LastN(1) | KeepAll()) is None
        assert first_best(OnlyStepsWithA7()) is None


class OnlyStepsWithA7:
    """A user's own policy, which knows nothing of ours."""

    def keep(self, checkpoints: Sequence[Checkpoint]) -> Collection[Checkpoint]:
        return [c for c in checkpoints if "7" in str(c.step)]


@dataclass
class Answer:
    """A policy that answers, whatever it is asked."""

    answer: Any

    def keep(self, _checkpoints: Sequence[Checkpoint]) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class TestUsersPolicy:
    checkpoints: tuple[Checkpoint, ...] = tuple(
        checkpoint(sequence, step=step) for sequence, step in enumerate([5, 7, 10, 17, 3], start=1)
    )

    def test_is_a_policy(self) -> None:
        assert isinstance(OnlyStepsWithA7(), Policy)
        assert evicted(OnlyStepsWithA7(), self.checkpoints) == [1, 3]

    @pytest.mark.parametrize(
        "union", [OnlyStepsWithA7() | EveryN(10), EveryN(10) | OnlyStepsWithA7()], ids=["left", "right"]
    )
    def test_combines_on_either_side(self, union: AnyOf) -> None:
        assert evicted(union, self.checkpoints) == [1]
        assert len((union | OnlyStepsWithA7() | LastN(1)).policies) == 4

    def test_members_are_asked_from_left_to_right(self) -> None:
        first, second = Answer([]), Answer([])
        assert (first | LastN(1)).policies == (first, LastN(1))
        assert (first | (LastN(1) | second)).policies == (first, LastN(1), second)

    def test_gets_the_checkpoints_in_order_of_commit(self) -> None:
        asked: list[int] = []

        class Witness:
            def keep(self, checkpoints: Sequence[Checkpoint]) -> Collection[Checkpoint]:
                asked.extend(sequences(checkpoints))
                return checkpoints

        evict(Witness(), self.checkpoints[::-1])
        assert asked == [1, 2, 3, 4, 5]

    def test_cannot_change_what_is_committed(self) -> None:
        class Greedy:
            def keep(self, checkpoints: Sequence[Checkpoint]) -> Collection[Checkpoint]:
                checkpoints.clear()  # type: ignore[attr-defined]
                return []

        with pytest.raises(AttributeError):
            evict(Greedy(), list(self.checkpoints))

    def test_may_return_equal_checkpoints_and_any_collection(self) -> None:
        twin = replace(self.checkpoints[0])
        assert evicted(Answer((twin, twin)), self.checkpoints) == [2, 3, 4]
        assert evicted(Answer({"a": twin}.values()), self.checkpoints) == [2, 3, 4]

    def test_that_keeps_nothing_leaves_the_newest(self) -> None:
        assert evicted(Answer([]), self.checkpoints) == [1, 2, 3, 4]

    @pytest.mark.parametrize(
        "answer",
        [
            [checkpoint(99)],
            [replace(checkpoint(1), path="elsewhere/1.pt")],
            [replace(checkpoint(1), sequence=2)],
            ["run/1.pt"],
            [None],
            [[]],
            "run/1.pt",
            None,
            True,
            5,
        ],
    )
    @pytest.mark.parametrize("wrap", [lambda p: p, lambda p: p | KeepAll(), lambda p: KeepAll() | p])
    def test_that_returns_something_else_is_a_type_error(self, answer: Any, wrap: Any) -> None:
        with pytest.raises(TypeError, match=r"Answer\(.*nothing was evicted"):
            evict(wrap(Answer(answer)), self.checkpoints)

    @pytest.mark.parametrize("wrap", [lambda p: p, lambda p: p | KeepAll(), lambda p: KeepAll() | p])
    def test_errors_of_a_policy_propagate(self, wrap: Any) -> None:
        with pytest.raises(KeyError, match="its own"):
            evict(wrap(Answer(KeyError("its own"))), self.checkpoints)


class TestEdges:
    def test_nothing_to_evict(self) -> None:
        assert evict(LastN(1), []) == []
        assert evicted(BestK(1, "acc"), [checkpoint(1)]) == []

    def test_newest_is_by_order_of_commit_not_by_step(self) -> None:
        checkpoints = [checkpoint(1, step=100), checkpoint(2, step=200), checkpoint(3, step=50)]
        assert kept(LastN(1), checkpoints) == [3]
        assert evicted(Answer([]), checkpoints) == [1, 2]

    def test_all_that_share_the_highest_number_stay(self) -> None:
        twins = [replace(checkpoint(4), path=f"run/{name}.pt") for name in "ab"]
        assert evicted(Answer([]), [checkpoint(1), *twins]) == [1]

    def test_input_is_left_alone(self) -> None:
        checkpoints = with_losses(1.0, 3.0, 2.0)[::-1]
        before = list(checkpoints)
        evict(BestK(1, "loss") | LastN(1), checkpoints)
        assert checkpoints == before

    def test_steps_may_be_zero_or_absent(self) -> None:
        checkpoints = [checkpoint(1, step=0), checkpoint(2), checkpoint(3, step=1)]
        assert kept(EveryN(10), checkpoints) == [1]


class TestConstruction:
    @pytest.mark.parametrize("count", [0, -1])
    @pytest.mark.parametrize("make", [LastN, EveryN, lambda k: BestK(k, "loss")])
    def test_counts_start_at_one(self, make: Any, count: int) -> None:
        with pytest.raises(ValueError, match=f"must be at least 1, not {count}"):
            make(count)

    @pytest.mark.parametrize("count", [2.0, "2", None, True])
    @pytest.mark.parametrize("make", [LastN, EveryN, lambda k: BestK(k, "loss")])
    def test_counts_are_ints(self, make: Any, count: Any) -> None:
        with pytest.raises(TypeError, match="must be an int, not"):
            make(count)

    def test_mode(self) -> None:
        with pytest.raises(ValueError, match=r'"min" .* or "max" .*, not \'lower\''):
            BestK(1, "loss", "lower")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r'mode must be "min" or "max", not 3'):
            BestK(1, "loss", 3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="not 'best'"):
            rank([], "loss", "best")  # type: ignore[arg-type]

    def test_metric(self) -> None:
        with pytest.raises(ValueError, match="not an empty string"):
            BestK(1, "")
        with pytest.raises(TypeError, match="metric must be a str"):
            BestK(1, None)  # type: ignore[arg-type]

    @pytest.mark.parametrize("other", [None, 3, "last", LastN, object(), Policy])
    def test_only_policies_combine(self, other: Any) -> None:
        with pytest.raises(TypeError, match="unsupported operand"):
            LastN(1) | other
        with pytest.raises(TypeError, match="unsupported operand"):
            other | LastN(1)

    def test_policies_are_plain_frozen_values(self) -> None:
        policy = BestK(3, "val_loss") | LastN(1)
        assert policy == BestK(3, "val_loss", "min") | LastN(1)
        assert hash(policy) == hash(BestK(3, "val_loss") | LastN(1))
        expected = "AnyOf(policies=(BestK(k=3, metric='val_loss', mode='min'), LastN(n=1)))"
        assert repr(policy) == expected
        with pytest.raises(FrozenInstanceError):
            policy.policies = ()  # type: ignore[misc]
