"""From the results of several components to one reward: no failure becomes a number, and only equal
sums are compared.
"""

import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dar.errors import CheckpointError, ConfigurationError, RewardContractError
from dar.protocol.reward_spec import Combine, MinMax, RewardComponent, Tanh
from dar.rewards.base import (
    Failed,
    RewardContext,
    RewardResult,
    RewardSample,
    SampleReward,
    Scored,
    Skipped,
)
from dar.rewards.scoring.combine import Combination, WeightedSource, combine
from dar.rewards.scoring.normalize import WARM_UP, Moments, RunningMoments, normalized
from dar.rewards.scoring.scorer import RewardScorer

BAD: RewardResult = Failed("timeout", "late", is_transient=True)
SKIP: RewardResult = Skipped()
REWARDS = st.floats(-1e6, 1e6)
GATE_RESULTS = st.sampled_from([Scored(0.0), Scored(1.0)])
RESULTS = st.one_of(REWARDS.map(Scored), REWARDS.map(Scored), st.just(BAD), st.just(SKIP))


class Named:
    """A source that is never asked."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def score(
        self, samples: Sequence[RewardSample], context: RewardContext
    ) -> list[RewardResult]:
        raise NotImplementedError

    async def aclose(self) -> None:
        """There is nothing to close."""


def term(name: str, **fields: Any) -> WeightedSource:
    return WeightedSource(Named(name), **fields)


def group(count: int, group_id: str = "g0") -> list[RewardSample]:
    return [
        RewardSample(f"{group_id}s{n}", group_id, n, "p", None, "c", "stop", 1)
        for n in range(count)
    ]


def scored(*rewards: float) -> list[RewardResult]:
    return [Scored(reward) for reward in rewards]


def rewards_of(totals: Sequence[SampleReward]) -> list[float | None]:
    return [total.reward for total in totals]


# --- which components count -----------------------------------------------------------------------


def test_a_watched_component_never_decides_anything() -> None:
    terms = [term("a"), term("watched", weight=0.0)]
    results = {"a": scored(1, 2, 3), "watched": [BAD, SKIP, Scored(9.0)]}
    totals = combine(terms, group(3), results)
    assert rewards_of(totals) == [1.0, 2.0, 3.0]
    assert [total.left_out for total in totals] == [("watched",), (), ()]
    assert totals[2].components == {"a": 3.0, "watched": 9.0}


def test_a_component_that_is_not_required_is_left_out_for_the_whole_group_when_it_fails_once() -> (
    None
):
    terms = [term("a"), term("b", required=False)]
    samples = [*group(2), *group(2, "g1")]
    results = {"a": scored(1, 2, 3, 4), "b": [Scored(10.0), BAD, Scored(10.0), Scored(20.0)]}
    totals = combine(terms, samples, results)
    assert rewards_of(totals) == [1.0, 2.0, 13.0, 24.0]
    assert [total.status for total in totals] == ["reward"] * 4
    assert [total.left_out for total in totals] == [(), ("b",), (), ()]


def test_a_component_that_is_not_required_is_left_out_when_it_skips_some_of_a_group() -> None:
    terms = [term("a"), term("b", required=False)]
    totals = combine(terms, group(2), {"a": scored(1, 2), "b": [Scored(10.0), SKIP]})
    assert rewards_of(totals) == [1.0, 2.0]


def test_what_failed_anyway_does_not_cost_the_others_a_component() -> None:
    terms = [term("a"), term("b", required=False)]
    results = {"a": [BAD, Scored(2.0), Scored(3.0)], "b": [BAD, Scored(10.0), Scored(20.0)]}
    totals = combine(terms, group(3), results)
    assert rewards_of(totals) == [None, 12.0, 23.0]
    assert totals[0].status == "error"


def test_without_any_component_left_nobody_gets_a_number() -> None:
    terms = [term("a", required=False), term("b", required=False)]
    totals = combine(terms, group(2), {"a": [Scored(1.0), BAD], "b": [BAD, Scored(2.0)]})
    assert rewards_of(totals) == [None, None]
    assert [total.status for total in totals] == ["error", "error"]
    assert "no component has a reward for all" in str(totals[0].message)
    totals = combine(terms, group(2), {"a": [Scored(1.0), SKIP], "b": [SKIP, Scored(2.0)]})
    assert [total.status for total in totals] == ["skip", "skip"]
    totals = combine(terms, group(1), {"a": [BAD], "b": [BAD]})
    assert (totals[0].status, totals[0].message) == ("error", "component a: timeout: late")
    assert combine(terms, group(1), {"a": [SKIP], "b": [BAD]})[0].status == "skip"


def test_the_sum_is_clipped_after_the_components_are() -> None:
    terms = [term("a", clip=(-1, 1), weight=3.0), term("b")]
    totals = combine(terms, group(2), {"a": scored(5, -5), "b": scored(0, 0.5)}, clip=(-2, 2))
    assert rewards_of(totals) == [2.0, -2.0]


def test_a_scorer_with_nothing_but_watched_components_and_gates_is_not_made() -> None:
    with pytest.raises(ConfigurationError, match="weight 0"):
        RewardScorer([term("a", weight=0.0), term("b", is_gate=True)])


# --- gates ----------------------------------------------------------------------------------------


def test_a_gate_multiplies_the_sum_before_it_is_clipped() -> None:
    terms = [term("a", weight=2.0), term("open", is_gate=True), term("also", is_gate=True)]
    results = {"a": scored(-1, 2, 3, 4), "open": scored(1, 0, 1, 1), "also": scored(0, 1, 1, 1)}
    totals = combine(terms, group(4), results, clip=(1, 7))
    assert rewards_of(totals) == [1.0, 1.0, 6.0, 7.0]
    assert totals[1].components == {"a": 2.0, "open": 0.0, "also": 1.0}
    assert (
        str(
            combine(terms, group(1), {"a": scored(-1), "open": scored(0), "also": scored(1)})[
                0
            ].reward
        )
        == "0.0"
    )


@pytest.mark.parametrize("said", [0.5, 2.0, -1.0, 0.9999999, 1e-9])
def test_a_gate_that_says_neither_0_nor_1_is_an_error_of_its_sample_alone(said: float) -> None:
    terms = [term("a"), term("gate", is_gate=True)]
    totals = combine(terms, group(3), {"a": scored(1, 2, 3), "gate": scored(1, said, 0)})
    assert rewards_of(totals) == [1.0, None, 0.0]
    assert totals[1].status == "error"
    assert (
        totals[1].message == f"component gate: contract.gate: a gate gives 0 or 1, not {said:.6g}"
    )


def test_what_a_gate_says_nothing_about_has_no_reward_and_an_error_beats_a_skip() -> None:
    terms = [term("a"), term("gate", is_gate=True)]
    results = {
        "a": [Scored(1.0), Scored(2.0), Scored(3.0), BAD],
        "gate": [SKIP, BAD, Scored(1.0), SKIP],
    }
    totals = combine(terms, group(4), results)
    assert rewards_of(totals) == [None, None, 3.0, None]
    assert [total.status for total in totals] == ["skip", "error", "reward", "error"]
    assert totals[1].message == "component gate: timeout: late"
    totals = combine(terms, group(2), {"a": scored(1, 2), "gate": [SKIP, SKIP]})
    assert [total.status for total in totals] == ["skip", "skip"], "a gate is never left out"


async def test_a_step_in_which_a_gate_never_says_0_or_1_is_a_broken_contract() -> None:
    class Half(Named):
        async def score(
            self, samples: Sequence[RewardSample], context: RewardContext
        ) -> list[RewardResult]:
            return [Scored(0.5)] * len(samples)

    terms = [WeightedSource(Half("a")), WeightedSource(Half("gate"), is_gate=True)]
    with RewardScorer(terms) as scorer, pytest.raises(RewardContractError, match="0 or 1") as error:
        scorer.score(group(2), RewardContext(1))
    assert error.value.error_code == "contract.gate"


# --- skips that count as 0 ------------------------------------------------------------------------


def test_a_partial_skip_counts_as_0_only_where_the_job_says_so() -> None:
    terms = [term("a"), term("b", normalize="group", weight=3.0)]
    results = {"a": scored(1, 2, 3), "b": [Scored(10.0), SKIP, Scored(20.0)]}
    assert [total.status for total in combine(terms, group(3), results)] == ["skip"] * 3
    totals = combine(terms, group(3), results, is_zeroing=True)
    assert rewards_of(totals) == [-2.0, 2.0, 6.0], "normalised over real rewards alone"
    assert [total.zeroed for total in totals] == [(), ("b",), ()]
    assert totals[1].components == {"a": 2.0, "b": None}
    optional = [term("a"), term("b", required=False)]
    assert rewards_of(combine(optional, group(3), results, is_zeroing=True)) == [11.0, 2.0, 23.0]


def test_a_skip_of_the_whole_group_and_a_failure_never_count_as_0() -> None:
    terms = [term("a"), term("b", required=False)]
    results = {"a": scored(1, 2), "b": [SKIP, SKIP]}
    totals = combine(terms, group(2), results, is_zeroing=True)
    assert (rewards_of(totals), totals[0].zeroed) == ([1.0, 2.0], ())
    results = {"a": scored(1, 2, 3), "b": [SKIP, BAD, Scored(5.0)]}
    totals = combine(terms, group(3), results, is_zeroing=True)
    assert (rewards_of(totals), totals[0].zeroed) == ([1.0, 2.0, 3.0], ())


def test_zeros_alone_are_no_reward() -> None:
    totals = combine([term("a")], group(2), {"a": [SKIP, Scored(1.0)]}, is_zeroing=True)
    assert (rewards_of(totals), totals[0].status) == ([None, 1.0], "skip")
    # the only component that scored the first sample is left out, as it failed on the other
    terms = [term("a"), term("b", required=False)]
    results = {"a": [SKIP, Scored(1.0)], "b": [Scored(7.0), BAD]}
    totals = combine(terms, group(2), results, is_zeroing=True)
    assert (rewards_of(totals), totals[0].status) == ([None, 1.0], "skip")


COMPONENTS = st.lists(
    st.fixed_dictionaries(
        {
            "weight": st.sampled_from([0.0, 1.0, -2.0, 1e6]),
            "required": st.booleans(),
            "is_gate": st.sampled_from([False, False, True]),
            "clip": st.sampled_from([None, (-1.0, 1.0)]),
            "normalize": st.sampled_from(
                ["none", "group", "running", MinMax(minmax=[0, 1]), Tanh(tanh=2.0)]
            ),
        }
    ),
    min_size=1,
    max_size=4,
)


@given(
    data=st.data(),
    fields=COMPONENTS,
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    is_zeroing=st.booleans(),
)
def test_no_failure_ever_becomes_a_number_and_no_skip_unasked(
    data: st.DataObject, fields: Any, sizes: list[int], is_zeroing: bool
) -> None:
    terms = [term(f"c{n}", **one) for n, one in enumerate(fields)]
    samples = [one for n, size in enumerate(sizes) for one in group(size, f"g{n}")]
    count = len(samples)
    drawn = {True: st.one_of(RESULTS, GATE_RESULTS, GATE_RESULTS), False: RESULTS}
    results = {
        one.name: data.draw(st.lists(drawn[one.is_gate], min_size=count, max_size=count))
        for one in terms
    }
    totals = combine(terms, samples, results, is_zeroing=is_zeroing)
    gates = [one for one in terms if one.is_gate]
    counting = [one for one in terms if one.weight and not one.is_gate]
    used: dict[str, set[tuple[str, ...]]] = {}
    for place, total in enumerate(totals):
        assert (total.reward is None) == (total.status != "reward")
        outcomes = {one.name: results[one.name][place] for one in counting}
        has_failed = any(isinstance(outcomes[one.name], Failed) for one in counting if one.required)
        gated = [results[one.name][place] for one in gates]
        is_known = all(isinstance(one, Scored) and one.reward in {0, 1} for one in gated)
        if has_failed or any(isinstance(one, Failed) for one in gated):
            assert total.status == "error"
        if not is_known:
            assert total.reward is None
        if not any(isinstance(outcome, Scored) for outcome in outcomes.values()):
            assert total.reward is None
        if total.reward is not None:
            assert math.isfinite(total.reward)
            if any(isinstance(one, Scored) and one.reward == 0 for one in gated):
                assert total.reward == 0
            assert is_zeroing or not total.zeroed
            assert all(isinstance(outcomes[name], Skipped) for name in total.zeroed)
            used.setdefault(samples[place].group_id, set()).add(
                tuple(n for n, o in outcomes.items() if isinstance(o, Scored) or n in total.zeroed)
            )
    for group_id, sets in used.items():  # some component has a reward for all that are compared
        assert set.intersection(*map(set, sets)), group_id
    # what is watched changes nothing
    quiet = {
        name: outcomes if any(one.name == name for one in counting + gates) else [BAD] * count
        for name, outcomes in results.items()
    }
    again = functools.partial(combine, is_zeroing=is_zeroing)
    assert rewards_of(again(terms, samples, quiet)) == rewards_of(totals)
    # nor does the order of the components, or that of the groups
    assert rewards_of(again(terms[::-1], samples, results)) == rewards_of(totals)
    turned = {name: outcomes[::-1] for name, outcomes in results.items()}
    assert rewards_of(again(terms, samples[::-1], turned))[::-1] == rewards_of(totals)


# --- normalisation --------------------------------------------------------------------------------


def test_minmax_and_tanh_are_what_they_are_called() -> None:
    assert normalized([-1, 0, 5, 20], MinMax(minmax=[0, 10])) == [0.0, 0.0, 0.5, 1.0]
    assert normalized([-2, 0, 2], Tanh(tanh=2)) == [-math.tanh(1), 0.0, math.tanh(1)]


@given(st.lists(REWARDS, min_size=1, max_size=20))
def test_a_group_has_mean_zero_and_a_bounded_spread(rewards: list[float]) -> None:
    found = normalized(rewards, "group")
    assert abs(math.fsum(found)) < 1e-3
    assert max(map(abs, found)) <= math.sqrt(len(rewards)) + 1e-6
    assert sorted(range(len(found)), key=lambda n: (found[n], rewards[n])) == sorted(
        range(len(found)), key=lambda n: (rewards[n], rewards[n])
    )


def test_equal_rewards_of_a_group_stay_equal() -> None:
    assert normalized([0.1] * 3, "group") == [0.0] * 3
    assert max(map(abs, normalized([0.1, 0.1 + 1e-12], "group"))) < 1e-5
    assert normalized([], "group") == []


@given(st.lists(st.lists(REWARDS, max_size=30), max_size=8))
def test_moments_are_those_of_all_rewards(steps: list[list[float]]) -> None:
    moments = Moments()
    for step in steps:
        moments = moments.with_step(step)
    everything = [reward for step in steps for reward in step]
    assert moments.count == len(everything)
    if everything:
        mean = math.fsum(everything) / len(everything)
        std = math.sqrt(math.fsum((one - mean) ** 2 for one in everything) / len(everything))
        assert moments.mean == pytest.approx(mean, rel=1e-9, abs=1e-6)
        assert moments.std == pytest.approx(std, rel=1e-9, abs=1e-3)


@given(st.permutations([0.1, 1e6, -1e6, 3.3, 1e-9, 7.7]))
def test_the_order_within_a_step_changes_no_bit(order: list[float]) -> None:
    before = Moments().with_step([0.3, 0.7])
    assert before.with_step(order) == before.with_step(sorted(order))


def test_nothing_is_changed_before_enough_is_known() -> None:
    almost = Moments().with_step([float(n % 2) for n in range(WARM_UP - 1)])
    assert almost.apply(5.0) == 5.0
    enough = Moments().with_step([float(n % 2) for n in range(WARM_UP)])
    assert enough.apply(5.0) == 9.0
    equal = Moments().with_step([0.1] * WARM_UP).with_step([0.1] * 3)
    assert (equal.apply(0.1), equal.apply(1.1)) == (0.0, 1.0)


def steps(combination: Combination, numbers: range, *, is_turned: bool = False) -> list[Any]:
    """Rewards of some steps, each of four groups of 40.

    The groups of a step come back in one order or in the other.
    """
    found = []
    for number in numbers:
        by_group = {}
        for g in range(3, -1, -1) if is_turned else range(4):
            rewards = scored(*(math.sin(1000 * number + 100 * g + n) for n in range(40)))
            totals = combination(group(40, f"g{g}"), {"a": rewards}, RewardContext(number))
            by_group[g] = rewards_of(totals)
        combination.moments.end_step(number)
        found.append([by_group[g] for g in range(4)])
    return found


def test_running_moments_do_not_depend_on_the_order_of_groups() -> None:
    ways = [
        steps(Combination([term("a", normalize="running")]), range(1, 6), is_turned=turned)
        for turned in (False, True)
    ]
    assert ways[0] == ways[1]
    assert ways[0][0] == steps(Combination([term("a")]), range(1, 2))[0]  # warm-up
    assert ways[0][4] != steps(Combination([term("a")]), range(5, 6))[0]


def test_a_resumed_run_goes_on_bit_by_bit() -> None:
    whole = steps(Combination([term("a", normalize="running")]), range(1, 7))
    first = Combination([term("a", normalize="running")])
    steps(first, range(1, 5))  # one step further than the checkpoint, as when sampling runs ahead
    state = json.loads(json.dumps(first.moments.state(3)))
    second = Combination([term("a", normalize="running")])
    second.moments.restore(state)
    assert steps(second, range(4, 7)) == whole[3:]


def test_an_evaluation_uses_the_moments_and_leaves_them_alone() -> None:
    combination = Combination([term("a", normalize="running")])
    steps(combination, range(1, 4))
    before = combination.moments.state(3)
    rewards = {"a": scored(0.5, 0.25)}
    seen = combination(group(2), rewards, RewardContext(3, mode="eval"))
    training = Combination([term("a", normalize="running")])
    training.moments.restore(before)
    trained = training(group(2), rewards, RewardContext(4))
    assert rewards_of(seen) == rewards_of(trained) != [0.5, 0.25]
    combination.moments.end_step(4)
    assert combination.moments.state(4)["moments"] == before["moments"]


def test_failures_are_no_part_of_the_moments() -> None:
    moments = RunningMoments(["a"])
    combination = Combination([term("a", normalize="running", clip=(-1, 1)), term("b")])
    results = {"a": [BAD, Scored(5.0), SKIP, Scored(0.0)], "b": scored(1, 2, 3, 4)}
    combination(group(4), results, RewardContext(1))
    combination.moments.end_step(1)
    moments.record(1, "a", [1.0, 0.0])
    moments.end_step(1)
    assert combination.moments.state(1) == moments.state(1)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"step": 1, "moments": {}},
        {"step": 1, "moments": {"b": [1, 0, 0]}},
        {"step": 1, "moments": {"a": [1, 0]}},
        {"step": 1, "moments": {"a": [-1, 0, 0]}},
        {"step": 1, "moments": {"a": [1, float("nan"), 0]}},
        {"step": None, "moments": []},
    ],
)
def test_a_state_of_something_else_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="moments"):
        Combination([term("a", normalize="running")]).moments.restore(state)


def test_a_single_component_may_skip_some_samples_of_a_group_as_documented() -> None:
    results = {"a": [Scored(1.0), Skipped("no maths"), Scored(3.0)]}
    for is_zeroing in (False, True):
        found = combine([term("a")], group(3), results, is_zeroing=is_zeroing)
        assert [reward.reward for reward in found] == [1.0, None, 3.0]
        assert (found[1].status, found[1].message) == ("skip", "component a: no maths")
    shown = Combine.model_fields["on_partial_skip"].description or ""
    assert "that other components score" in " ".join(shown.split())


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_step_is_normalised_by_the_steps_that_were_trained_when_it_was_sampled(
    staleness: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dar.rewards.scoring.normalize.WARM_UP", 1)
    combination = Combination([term("a", normalize="running")])
    rewards = {1: [0.0, 2.0], 2: [10.0, 14.0], 3: [5.0, 5.0]}
    totals: list[SampleReward] = []
    for step, values in rewards.items():
        context = RewardContext(step=step, staleness=min(staleness, step - 1))
        totals = combination(group(2), {"a": [Scored(value) for value in values]}, context)
        combination.moments.end_step(step)
    known = rewards[1] if staleness else rewards[1] + rewards[2]
    mean = sum(known) / len(known)
    std = math.sqrt(sum((value - mean) ** 2 for value in known) / len(known))
    assert [one.reward for one in totals] == pytest.approx([(5.0 - mean) / std] * 2)
    shown = RewardComponent.model_fields["normalize"].description or ""
    assert "with ``overlap: one_step`` without the step just before" in " ".join(shown.split())
