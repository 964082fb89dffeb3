"""Reports about requests to reward services: sums per step, and at once what is new."""

from collections.abc import Callable
from typing import Any

import pytest

from dar.protocol.metrics import is_known, is_reproducible
from dar.protocol.reward_spec import RewardRetry
from dar.protocol.reward_stats import REQUEST_SECONDS
from dar.rewards.base import RequestRecord, RewardContext, RewardSample, SampleReward
from dar.rewards.http_reward import HttpOptions, HttpReward
from dar.rewards.scoring.step_report import StepObserver, quantile, sample_metrics


def record(**values: Any) -> RequestRecord:
    given: dict[str, Any] = {
        "component": "judge", "request_id": "rwq_1", "step": 3, "mode": "train", "attempt": 1, "samples": 4,
        "outcome": "ok", "status": 200, "seconds": 0.05, "queued_seconds": 0.5, "bytes_out": 10, "bytes_in": 20, "is_final": True,
        **values,
    }  # fmt: skip
    return RequestRecord(**given)


@pytest.fixture
def events() -> list[tuple[str, str, Any]]:
    return []


@pytest.fixture
def observer(events: list[tuple[str, str, Any]]) -> StepObserver:
    return StepObserver(lambda level, message, data: events.append((level, message, data)))


def test_requests_are_summed_up_by_component_and_outcome(observer: StepObserver) -> None:
    observer.request_done(record())
    observer.request_done(
        record(outcome="http_503", status=503, request_id="rwq_2", seconds=1.0, is_final=False)
    )
    observer.request_done(record(request_id="rwq_2", attempt=3, seconds=399.0))
    observer.request_done(record(outcome="http_503", status=503, attempt=4, quote="busy"))
    observer.request_done(record(component="brief"))
    taken = observer.take()
    sums = {(r.component, r.outcome): (r.count, r.retries, r.samples) for r in taken.requests}
    assert sums == {
        ("brief", "ok"): (1, 0, 4),
        ("judge", "ok"): (2, 2, 8),
        ("judge", "http_5xx"): (1, 3, 4),
    }
    ok = next(r for r in taken.requests if (r.component, r.outcome) == ("judge", "ok"))
    assert (ok.buckets[2], ok.buckets[len(REQUEST_SECONDS)]) == (1, 1)
    assert (ok.seconds, ok.queued_seconds) == (400.05, 1.0)
    [failed] = taken.failures
    assert (failed.code, failed.status, failed.attempts, failed.quote) == (
        "http_503",
        503,
        4,
        "busy",
    )
    assert taken.metrics["reward_requests/judge/requests"] == 3
    assert taken.metrics["reward_requests/judge/failed_requests"] == 1
    assert taken.metrics["reward_requests/judge/retries"] == 5
    assert taken.metrics["reward_requests/judge/p50_seconds"] == 0.05
    assert taken.metrics["reward_requests/judge/p95_seconds"] == 400.0
    assert all(map(is_known, taken.metrics))
    assert observer.take().requests == []


def test_samples_that_were_not_sent_are_counted_once(observer: StepObserver) -> None:
    observer.not_sent("judge", 2, 3)
    observer.not_sent("judge", 0, 1)
    taken = observer.take()
    assert taken.metrics == {
        "reward_requests/judge/cached": 6,
        "reward_requests/judge/cache_hits": 2,
    }
    assert all(map(is_known, taken.metrics))
    assert not any(map(is_reproducible, taken.metrics)), "a second run may remember more"
    assert observer.take().metrics == {}


def test_the_first_failure_of_each_class_is_told_at_once(
    observer: StepObserver, events: list[tuple[str, str, Any]]
) -> None:
    for outcome, status in (("http_500", 500), ("http_503", 503), ("timeout", None), ("ok", 200)):
        observer.request_done(record(outcome=outcome, status=status, is_final=False, quote="<b>"))
    observer.request_done(record(component="brief", outcome="http_500", status=500))
    assert [(data["component"], data["class"]) for _, _, data in events] == [
        ("judge", "http_5xx"),
        ("judge", "timeout"),
        ("brief", "http_5xx"),
    ]
    level, message, data = events[0]
    assert (level, data["answer"], data["status"]) == ("warn", "<b>", 500)
    assert "http_500" in message
    assert "is retried" in message


def test_changes_of_a_breaker_are_told_and_its_state_is_a_metric(
    observer: StepObserver, events: list[tuple[str, str, Any]]
) -> None:
    for state in ("closed", "open", "open", "half_open", "closed", "open"):
        observer.breaker_changed("judge", state, "5 of 10 failed")
    assert [data["state"] for _, _, data in events] == ["open", "half_open", "closed", "open"]
    assert observer.take().metrics == {"reward_requests/judge/breaker": 2}


def test_samples_are_counted_by_what_became_of_them() -> None:
    def failed(code: str) -> SampleReward:
        return SampleReward(None, "error", f"component judge: {code}: no", {"judge": None})

    rewards = [
        SampleReward(1.0, "reward", None, {"judge": 1.0, "judge/part": 9.0}),
        SampleReward(3.0, "reward", None, {"judge": 3.0}),
        SampleReward(None, "skip", None, {"judge": None}),
        failed("timeout"),
        failed("http_503"),
        failed("timeout"),
    ]
    values = sample_metrics(rewards)
    assert values == {
        "reward_requests/n_valid": 2, "reward_requests/n_skip": 1, "reward_requests/n_error": 3,
        "reward_requests/n_error/timeout": 2, "reward_requests/n_error/http_5xx": 1,
        "rewards/judge/mean": 2.0, "rewards/judge/std": 1.0, "rewards/judge/min": 1.0, "rewards/judge/max": 3.0,
        "rewards/judge/missing_fraction": 4 / 6,
    }  # fmt: skip
    assert all(map(is_known, values))


def test_names_that_are_not_registered_are_not_known() -> None:
    for name in (
        "reward_requests/judge/mean",
        "rewards//mean",
        "reward_requests/n_error/odd",
        "reward_requests/judge",
        "reward/judge/mean",
        "time/reward/judge",
    ):
        assert not is_known(name), name


def test_quantiles_are_values_that_occurred() -> None:
    assert [quantile([1.0, 2.0, 3.0, 4.0], share) for share in (0.0, 0.5, 0.95, 1.0)] == [
        1,
        2,
        4,
        4,
    ]
    assert quantile([7.0], 0.5) == 7.0


async def test_the_client_reports_every_attempt(
    observer: StepObserver, events: list[tuple[str, str, Any]], free_port: Callable[[], int]
) -> None:
    options = HttpOptions(retry=RewardRetry(attempts=2, base=0.01))
    url = f"http://127.0.0.1:{free_port()}/score"
    source = HttpReward("judge", url, options=options, observer=observer)
    sample = RewardSample("s0", "g0", 0, "p", None, "c", "stop", 1)
    await source.score([sample], RewardContext(step=1))
    await source.aclose()
    [failed] = observer.take().failures
    assert (failed.code, failed.attempts, failed.status) == ("connect", 2, None)
    assert len(events) == 1


def test_most_requests_at_once_and_the_limit_are_metrics(
    events: list[tuple[str, str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = StepObserver(lambda *told: events.append(told), concurrency={"judge": 4, "idle": 2})
    ends = iter([10.0, 10.5, 11.0, 12.0])
    monkeypatch.setattr("dar.rewards.scoring.step_report.time.monotonic", lambda: next(ends))
    for number, seconds in enumerate((1.0, 1.0, 1.5, 1.0)):  # 9-10, 9.5-10.5, 9.5-11, 11-12
        observer.request_done(record(request_id=f"rwq_{number}", seconds=seconds))
    values = observer.take().metrics
    assert values["reward_requests/judge/in_flight"] == 3
    assert (
        values["reward_requests/judge/concurrency"],
        values["reward_requests/idle/concurrency"],
    ) == (4, 2)
    assert (values["reward_requests/judge/breaker"], values["reward_requests/idle/breaker"]) == (
        0,
        0,
    )
    assert all(map(is_known, values))
    assert "reward_requests/judge/in_flight" not in observer.take().metrics
    assert events == []


def test_a_request_whose_result_is_only_waited_for_is_not_in_flight(
    observer: StepObserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dar.rewards.scoring.step_report.time.monotonic", lambda: 100.0)
    observer.request_done(record(request_id="rwq_1", seconds=90.0, in_flight_seconds=1.0))  # 10-11
    observer.request_done(record(request_id="rwq_2", seconds=80.0, in_flight_seconds=1.0))  # 20-21
    observer.request_done(record(request_id="rwq_3", seconds=79.5))  # 20.5-100
    assert observer.take().metrics["reward_requests/judge/in_flight"] == 2
