"""What becomes of completions without a reward: the failure policy of a job, group by group."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dar.errors import TrainingError
from dar.protocol.reward_spec import FailurePolicy
from dar.rewards.base import SampleReward
from dar.rewards.scoring.failures import under_policy

GOOD = SampleReward(1.0, "reward", None, {})
BETTER = SampleReward(2.0, "reward", None, {})
FAILED = SampleReward(None, "error", "component a: timeout: late", {})
SKIPPED = SampleReward(None, "skip", None, {})


def policy(on_error: Any, **fields: Any) -> FailurePolicy:
    return FailurePolicy.model_validate({"on_error": on_error, **fields})


def rewards_of(group: list[SampleReward]) -> list[float | None]:
    return [one.reward for one in group]


def test_a_fallback_stands_in_for_errors_alone_and_says_so() -> None:
    found = under_policy(policy({"fallback_value": -5.0}), [GOOD, FAILED, SKIPPED])
    assert rewards_of(found) == [1.0, -5.0, None]
    assert found[1] == replace(FAILED, reward=-5.0, is_fallback=True)
    assert found[1].status == "error"
    assert [one.is_fallback for one in found] == [False, True, False]


def test_a_failed_sample_is_left_out_alone() -> None:
    assert under_policy(policy("drop_sample"), [GOOD, FAILED, BETTER]) == [GOOD, FAILED, BETTER]


def test_a_group_is_dropped_with_its_failed_sample() -> None:
    found = under_policy(policy("drop_group"), [GOOD, FAILED, BETTER])
    assert rewards_of(found) == [None, None, None]
    assert [one.status for one in found] == ["skip", "error", "skip"]
    assert "timeout" in str(found[0].message)
    assert under_policy(policy("drop_group"), [GOOD, BETTER]) == [GOOD, BETTER]


def test_a_job_may_be_failed_by_one_sample() -> None:
    with pytest.raises(TrainingError, match=r"fail_job: component a: timeout") as failed:
        under_policy(policy("fail_job"), [GOOD, FAILED])
    assert failed.value.error_code == "missing_reward"
    assert under_policy(policy("fail_job"), [GOOD, SKIPPED, BETTER]) == [GOOD, SKIPPED, BETTER]


def test_a_group_with_too_few_rewards_is_left_out() -> None:
    found = under_policy(policy("drop_sample", min_valid=3), [GOOD, FAILED, BETTER])
    assert rewards_of(found) == [None, None, None]
    assert "only 2 of 3" in str(found[0].message)


OUTCOMES = st.sampled_from([GOOD, BETTER, FAILED, SKIPPED])
ON_ERROR = st.sampled_from(["drop_sample", "drop_group", {"fallback_value": 0.5}])


@given(st.lists(OUTCOMES, min_size=1, max_size=6), ON_ERROR)
def test_only_a_fallback_turns_an_error_into_a_number(
    group: list[SampleReward], on_error: Any
) -> None:
    found = under_policy(policy(on_error), group)
    for before, after in zip(group, found, strict=True):
        assert after.reward in {before.reward, None} or after.is_fallback
        assert after.is_fallback == (
            isinstance(on_error, dict) and before.status == "error" and after.reward is not None
        )


@given(st.lists(OUTCOMES, min_size=1, max_size=6), ON_ERROR)
def test_a_policy_applied_twice_changes_no_reward(group: list[SampleReward], on_error: Any) -> None:
    once = under_policy(policy(on_error), group)
    assert rewards_of(under_policy(policy(on_error), once)) == rewards_of(once)
