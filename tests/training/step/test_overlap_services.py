"""Reward services that fail, and what a job's failure policy makes of it, with rewards that
stream.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from dar.errors import TrainingError
from dar.protocol.hints import HINTS
from dar.rewards import http_reward
from dar.rewards.http import async_results
from dar.rewards.http.breaker import BreakerOptions
from dar.rewards.http.request import HttpOptions
from dar.rewards.http.retry import RetryBudgetOptions
from fakes import reward_chaos as chaos
from fakes.reward_server import RewardServer


@pytest.fixture
def high_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number of failures opens a breaker or uses up the retries of an endpoint.

    Polls come soon.
    """
    options = partial(
        HttpOptions,
        breaker=BreakerOptions(min_calls=1_000_000),
        budget=RetryBudgetOptions(minimum=1_000_000),
    )
    monkeypatch.setattr(http_reward, "HttpOptions", options)
    monkeypatch.setattr(async_results, "FIRST_POLL_SECONDS", 0.05)


SLOW = pytest.mark.slow  # each trains twice; one of each reply is in the fast lane


@pytest.mark.usefixtures("high_thresholds")
@pytest.mark.parametrize(
    ("overlap", "reply"),
    [
        pytest.param("none", "sync", marks=SLOW),
        ("stream", "sync"),
        pytest.param("one_step", "sync", marks=SLOW),
        ("stream", "either"),
    ],
)
def test_a_chaotic_service_gives_the_bits_of_a_perfect_one(
    run: Callable[..., Any], overlap: str, reply: str
) -> None:
    spoiled = chaos.Chaos(hang_seconds=2.5)
    impatient = {"timeouts": {"attempt": 1.0, "read": 1.0, "deadline": 120}}
    outcomes = []
    for manners, component in ((lambda _: False, {}), (spoiled, impatient)):
        with chaos.service(manners) as service:
            rewards = chaos.rewards_of(service.url, component={**component, "reply": reply})
            outcomes.append(run(reward_funcs=rewards, overlap=overlap, max_steps=4))
    chaos.assert_same(*outcomes)
    shown = [
        {step: [row.model_dump() for row in rows] for step, rows in sink.shown.items()}
        for _, sink in outcomes
    ]
    assert shown[0] == shown[1]
    assert all(row["reward"] is not None for row in shown[0][1])
    faults = {*chaos.PASSING, *chaos.BROKEN, *(["later"] if reply == "either" else [])}
    assert faults <= set(spoiled.met)


@pytest.fixture
def serve() -> Iterator[Callable[[chaos.Manners], RewardServer]]:
    with ExitStack() as stack:
        yield lambda manners: stack.enter_context(chaos.service(manners))


def test_dropped_groups_are_sampled_again_in_the_same_way_whatever_is_overlapped(
    run: Callable[..., Any], serve: Callable[..., Any]
) -> None:
    failing = chaos.Failing(prompts=("w55",), indices=(0, 1, 2))
    outcomes, services = [], []
    for overlap in ("none", "stream"):
        services.append(serve(failing))
        rewards = chaos.rewards_of(
            services[-1].url, failure={"refill": 1.5, "max_failed_fraction": 1}
        )
        outcomes.append(run(reward_funcs=rewards, overlap=overlap, max_steps=2))
    chaos.assert_same(*outcomes)
    for values in outcomes[0][1].reports.values():
        assert values["rewards/dropped_groups"] == values["rewards/refilled_groups"] > 0
        assert values["rewards/missing_fraction"] == 0
    again = {
        sample["group_id"]
        for request in services[0].requests
        for sample in request.samples
        if int(sample["group_id"][1:]) >= 12
    }
    assert again
    rewards = chaos.rewards_of(serve(failing).url, failure={"max_failed_fraction": 1})
    _, dropped = run(reward_funcs=rewards, max_steps=1)
    assert dropped.reports[1]["rewards/refilled_groups"] == 0
    assert dropped.reports[1]["rewards/missing_fraction"] > 0


def test_dropped_groups_are_sampled_again_one_step_ahead_too(
    run: Callable[..., Any], serve: Callable[..., Any]
) -> None:
    failing = chaos.Failing(prompts=("w55",), indices=(0, 1, 2))
    rewards = chaos.rewards_of(
        serve(failing).url, failure={"refill": 1.5, "max_failed_fraction": 1}
    )
    _, sink = run(reward_funcs=rewards, overlap="one_step", max_steps=2)
    for values in sink.reports.values():
        assert values["rewards/dropped_groups"] == values["rewards/refilled_groups"] > 0
        assert values["time/sampling_seconds"] > 0
    assert sink.reports[2]["dar/staleness"] == 1


def test_a_refill_that_fails_too_leaves_its_groups_out(
    run: Callable[..., Any], serve: Callable[..., Any]
) -> None:
    failing = chaos.Failing(prompts=("w55",), indices=(0, 1, 2, 3), again=True)
    rewards = chaos.rewards_of(
        serve(failing).url, failure={"refill": 4, "max_failed_fraction": 1, "window_groups": 1000}
    )
    _, sink = run(reward_funcs=rewards, max_steps=1)
    assert sink.reports[1]["rewards/refilled_groups"] > 0
    assert 0 < sink.reports[1]["rewards/missing_fraction"] < 0.5


@pytest.mark.parametrize(
    ("failure", "missing_per_group"),
    [
        ({}, 1),
        ({"on_error": "drop_group"}, 4),
        ({"min_valid": 4}, 4),
        ({"min_valid": 3}, 1),
    ],
)
def test_a_failed_sample_costs_what_the_policy_says(
    run: Callable[..., Any],
    serve: Callable[..., Any],
    failure: dict[str, Any],
    missing_per_group: int,
) -> None:
    service = serve(chaos.Failing(prompts=("w55",), indices=(2,)))
    rewards = chaos.rewards_of(service.url, failure={"max_failed_fraction": 1, **failure})
    _, sink = run(reward_funcs=rewards, max_steps=1)
    groups = {
        sample["group_id"]
        for request in service.requests
        for sample in request.samples
        if sample["prompt"] == "w55"
    }
    expected = len(groups) * missing_per_group / 48
    assert sink.reports[1]["rewards/missing_fraction"] == pytest.approx(expected)


def test_a_job_may_end_at_the_first_failure(
    run: Callable[..., Any], serve: Callable[..., Any]
) -> None:
    service = serve(chaos.Failing(prompts=("w55",), indices=(2,)))
    rewards = chaos.rewards_of(service.url, failure={"on_error": "fail_job"})
    with pytest.raises(TrainingError, match="judge_lost"):
        run(reward_funcs=rewards, max_steps=1)


def test_ties_of_a_job_spec_tell_nothing(
    run: Callable[..., Any], serve: Callable[..., Any]
) -> None:
    rewards = chaos.rewards_of(serve(lambda _: False).url, combine={"tie_eps": 2.0})
    _, sink = run(reward_funcs=rewards, max_steps=1)
    assert sink.reports[1]["rewards/zero_variance_fraction"] == 1
    assert sink.reports[1]["dar/advantages_std"] == 0


def test_a_service_that_cannot_keep_up_is_named_with_the_concurrency_it_needs(
    run: Callable[..., Any], serve: Callable[..., Any]
) -> None:
    def slowly(_: Any) -> bool:
        time.sleep(0.1 + random.random() / 100)
        return False

    def found(sink: Any) -> list[Any]:
        return [data for _, _, data in sink.events if data and data["kind"] == "reward_capacity"]

    rewards = chaos.rewards_of(serve(slowly).url, component={"limits": {"concurrency": 1}})
    saving = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    trainer, sink = run(reward_funcs=rewards, **saving)
    first, *_ = found(sink)
    assert (first["component"], first["concurrency"]) == ("hash", 1)
    assert first["needed_concurrency"] > 1
    # After an interruption it is repeated only if the need has grown by a quarter, as before it.
    _, later = run(trainer.checkpoints / f"step-{first['step']}", reward_funcs=rewards, **saving)
    least = HINTS.capacity_repeated * first["needed_concurrency"]
    assert all(one["needed_concurrency"] >= least for one in found(later))
