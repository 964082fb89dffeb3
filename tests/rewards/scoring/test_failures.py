"""The failure budget: when a job has too few rewards to go on."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dar.errors import RewardBudgetError, error_from_body
from dar.protocol.reward_spec import FailurePolicy
from dar.protocol.reward_stats import FAMILIES
from dar.protocol.samples import RewardStatus
from dar.rewards.base import SampleReward
from dar.rewards.scoring.failures import FailureBudget, family_of

WORDS: dict[str, RewardStatus] = {"r": "reward", "s": "skip", "e": "error"}


def group(statuses: str, code: str = "http_503") -> list[SampleReward]:
    """A group, one letter per sample: reward, skip or error."""
    return [
        SampleReward(
            1.0 if letter == "r" else None,
            WORDS[letter],
            f"component judge: {code}: reward service http://h/s: HTTP 503: oh no"
            if letter == "e"
            else None,
            {},
        )
        for letter in statuses
    ]


def policy(**values: object) -> FailurePolicy:
    return FailurePolicy.model_validate(
        {"window_groups": 10, "max_failed_fraction": 0.1, "max_empty_steps": 3, **values}
    )


def spent_at(budget: FailureBudget, groups: Sequence[str]) -> int | None:
    """Number of the group that was too much."""
    for number, statuses in enumerate(groups):
        try:
            budget.add_group(group(statuses))
        except RewardBudgetError:
            return number
    return None


GROUPS = st.lists(st.text("rse", min_size=4, max_size=4), max_size=40)
HARMLESS = st.lists(st.text("rs", min_size=1, max_size=8), max_size=60)


@given(HARMLESS)
def test_skips_are_never_counted_as_failures(groups: list[str]) -> None:
    budget = FailureBudget(policy(max_failed_fraction=1e-9))
    assert spent_at(budget, groups) is None
    assert budget.failed_fraction == 0


@given(GROUPS)
def test_the_budget_is_spent_when_a_full_window_would_hold_too_many_failures(
    groups: list[str],
) -> None:
    allowed = 0.1 * 10 * 4
    too_many = [
        number
        for number in range(len(groups))
        if "e" in groups[number]
        and sum(g.count("e") for g in groups[max(0, number - 9) : number + 1]) > allowed
    ]
    assert spent_at(FailureBudget(policy()), groups) == (too_many[0] if too_many else None)


@given(GROUPS, st.integers(0, 40))
def test_a_restored_budget_goes_on_as_if_nothing_had_happened(groups: list[str], cut: int) -> None:
    whole, first, second = (FailureBudget(policy()) for _ in range(3))
    spent = spent_at(whole, groups)
    cut = min(cut, len(groups) if spent is None else spent)
    assert spent_at(first, groups[:cut]) is None
    first.end_step(usable_groups=1)
    second.restore(json.loads(json.dumps(first.state())))
    again = spent_at(second, groups[cut:])
    if first.failed_fraction <= 0.05:
        assert again == (None if spent is None else spent - cut)
    else:
        assert again is None or again >= (len(groups) if spent is None else spent) - cut


def test_a_job_that_goes_on_from_a_checkpoint_has_at_least_half_of_its_budget() -> None:
    first, second = FailureBudget(policy()), FailureBudget(policy())
    assert spent_at(first, ["eerr", "errr", "errr"]) is None
    first.end_step(0)
    first.end_step(0)
    second.restore(first.state())
    assert second.failed_fraction <= 0.05
    assert spent_at(second, ["rrrr", "eerr"]) is None
    second.end_step(0)
    with pytest.raises(RewardBudgetError):
        second.end_step(0)


@given(st.lists(st.booleans(), max_size=20))
def test_empty_steps_in_a_row_spend_it(usable: list[bool]) -> None:
    budget = FailureBudget(policy())
    row = 0
    for is_usable in usable:
        row = 0 if is_usable else row + 1
        if row == 3:
            with pytest.raises(RewardBudgetError, match="the last 3 steps"):
                budget.end_step(int(is_usable))
            row = 0
        else:
            budget.end_step(int(is_usable))


def test_a_failure_at_the_beginning_is_no_reason_to_stop() -> None:
    assert spent_at(FailureBudget(policy()), ["eeee", "rrrr"]) is None


def test_what_a_dropped_step_has_counted_is_not_in_a_checkpoint() -> None:
    budget = FailureBudget(policy())
    budget.add_group(group("errr"))
    budget.end_step(1)
    edge = budget.state()
    budget.add_group(group("eerr"))
    assert budget.state() == edge == {"groups": [[1, 4]], "empty_steps": 0}


def test_a_spent_budget_starts_anew() -> None:
    budget = FailureBudget(policy())
    assert spent_at(budget, ["eeee", "errr"]) == 1
    assert budget.state() == {"groups": [], "empty_steps": 0}
    assert spent_at(budget, ["eeee"]) is None


def test_the_error_tells_what_failed_with_what_and_for_whom() -> None:
    budget = FailureBudget(policy())
    budget.add_group(group("rrre", "timeout"), ["s0", "s1", "s2", "s3"])
    with pytest.raises(RewardBudgetError) as caught:
        budget.add_group(group("eeee"), ["s4", "s5", "s6", "s7"])
    error = caught.value
    assert error.errors == {"http_503": 4, "timeout": 1}
    assert error.sample_ids == ("s3", "s4", "s5", "s6", "s7")
    assert error.is_outage
    assert error.error_code == "reward_budget_exhausted"
    for part in ("5 of the last 8 samples", "http_503 4, timeout 1", "HTTP 503: oh no", "s7"):
        assert part in error.message
    again = error_from_body(error.status, error.body())
    assert (type(again), again.message) == (RewardBudgetError, error.message)


def test_broken_answers_are_no_outage() -> None:
    with pytest.raises(RewardBudgetError) as caught:
        FailureBudget(policy(window_groups=1)).add_group(group("eee", "contract.length"))
    assert not caught.value.is_outage


@pytest.mark.parametrize(
    ("code", "family"),
    [
        ("timeout", "timeout"), ("deadline", "timeout"), ("http_408", "timeout"), ("connect", "connect"),
        ("connect_timeout", "connect"), ("breaker_open", "connect"), ("callback_late", "callback_late"), ("protocol", "connect"), ("tls.timeout", "connect"), ("tls.alert", "connect"), ("tls.broken", "connect"), ("tls.client_certificate", "tls"), ("tls.certificate", "tls"), ("dns", "dns"),
        ("http_404", "http_4xx"), ("http_429", "http_429"), ("http_503", "http_5xx"), ("contract.ids", "contract"),
        ("contract.nonfinite", "nonfinite"), ("nonfinite", "nonfinite"), ("contract.length", "length"),
        ("egress_denied", "egress"), ("judge_timeout", "other"), ("", "other"),
    ],
)  # fmt: skip
def test_every_code_belongs_to_a_class(code: str, family: str) -> None:
    assert family_of(code) == family


@given(st.text())
def test_whatever_a_service_calls_its_failures_the_classes_stay_few(code: str) -> None:
    assert family_of(code) in FAMILIES
