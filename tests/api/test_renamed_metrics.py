"""Metrics that were renamed: reports, rows and questions with the old names are still understood.

``reward/…`` and ``time/reward/…`` of earlier versions are ``reward_requests/…`` now.
"""

from collections.abc import Callable
from typing import Any

import pytest

from dar.protocol.metrics import METRICS, Metrics, current_name, is_known, is_reproducible
from fakes.live_service import Lease, Live

OLD = {
    "reward/n_valid": 12.0, "reward/n_skip": 1.0, "reward/n_error": 3.0, "reward/n_error/timeout": 3.0,
    "reward/letters/requests": 4.0, "reward/letters/in_flight": 2.0, "time/reward/letters/p50_seconds": 0.25,
    "rewards/letters/mean": 0.5, "dar/loss": 1.0,
}  # fmt: skip
NEW = {
    "reward_requests/n_valid": 16.0, "reward_requests/n_error": 0.0, "reward_requests/letters/requests": 5.0,
    "reward_requests/letters/p50_seconds": 0.5, "rewards/letters/mean": 0.75,
}  # fmt: skip


@pytest.fixture
def reported(live: Live) -> tuple[str, Lease]:
    """A job whose first step a worker of the previous version reported, and the second one of this
    version.
    """
    job_id, lease = live.running()
    for step, values in ((1, OLD), (2, NEW)):
        answer = lease.say({"type": "metrics", "step": step, "values": values})
        assert answer.status_code == 200, answer.text
    return job_id, lease


@pytest.mark.parametrize(
    ("old", "new", "values"),
    [
        ("reward/n_valid", "reward_requests/n_valid", [12.0, 16.0]),
        ("reward/n_error/timeout", "reward_requests/n_error/timeout", [3.0]),
        ("reward/letters/requests", "reward_requests/letters/requests", [4.0, 5.0]),
        ("time/reward/letters/p50_seconds", "reward_requests/letters/p50_seconds", [0.25, 0.5]),
    ],
)
def test_a_series_is_found_by_both_names_whichever_was_reported(
    live: Live, reported: tuple[str, Lease], old: str, new: str, values: list[float]
) -> None:
    for name in (old, new):
        series = live.job(reported[0], "/metrics", names=name)["series"]
        assert list(series) == [name]
        assert series[name]["value"] == values
    both = live.job(reported[0], "/metrics", names=f"{old},{new}")["series"]
    assert both[old] == both[new]


def test_all_series_events_and_lists_have_the_present_names(
    live: Live, reported: tuple[str, Lease]
) -> None:
    job_id = reported[0]
    names = set(live.job(job_id, "/metrics")["series"])
    assert names == {current_name(name) for name in (*OLD, *NEW)}
    assert "rewards/letters/mean" in names
    events = live.job(job_id, "/events")["data"]
    (first,) = [one for one in events if one["data"].get("step") == 1]
    assert first["data"]["reward_requests/n_valid"] == 12.0
    listed = live.http.get("/v1/fine_tuning/metrics/names").json()["data"]
    assert not [one for one in listed if one["name"].startswith(("reward/", "time/reward/"))]


def test_statistics_checkpoints_and_prometheus_count_what_has_the_old_names(
    live: Live, reported: tuple[str, Lease]
) -> None:
    job_id, lease = reported
    stats = live.job(job_id, "/reward_stats")
    assert (stats["rewards"], stats["skips"], stats["errors"]) == (28, 1, 3)
    assert stats["errors_by_class"] == {"timeout": 3}
    (component,) = stats["components"]
    assert (component["requests"], component["p50_seconds"]) == (9, 0.5)
    lease.metrics = {"reward/n_valid": 12.0, "dar/loss": 1.0}
    lease.checkpoint(2)
    (checkpoint,) = live.job(job_id, "/checkpoints")["data"]
    assert checkpoint["metrics"]["reward_requests/n_valid"] == 12.0
    lines = live.http.get("/metrics").text.splitlines()
    assert 'dar_reward_samples_total{result="ok"} 28.0' in lines
    assert 'dar_reward_errors_total{class="timeout"} 3.0' in lines
    assert f'dar_reward_inflight{{component="letters",job="{job_id}"}} 2.0' in lines


def test_counts_of_a_step_that_did_not_end_may_have_the_old_names(live: Live) -> None:
    job_id, lease = live.running()
    unfinished = {"reward/n_error": 8, "reward/letters/requests": 2}
    row = {"type": "rewards", "step": 1, "requests": [], "failures": [], "unfinished": unfinished}
    assert lease.say(row).status_code == 200
    stats = live.job(job_id, "/reward_stats")
    assert (stats["errors"], stats["components"][0]["requests"]) == (8, 2)


def test_a_name_that_never_existed_is_not_known(live: Live, error_of: Callable[..., Any]) -> None:
    job_id, _ = live.running()
    answer = live.http.get(
        f"/v1/fine_tuning/jobs/{job_id}/metrics", params={"names": "reward/n_ever"}
    )
    assert error_of(answer)["code"] == "unknown_metric"


def test_the_sdk_finds_a_series_by_its_old_name_and_says_the_new_one(
    live: Live, reported: tuple[str, Lease]
) -> None:
    answer = Metrics.model_validate(live.job(reported[0], "/metrics"))
    with pytest.warns(DeprecationWarning, match="is named reward_requests/n_valid now"):
        assert answer.series["reward/n_valid"].value == [12.0, 16.0]
    with pytest.raises(KeyError, match="reward/letters/retries"):
        answer.series["reward/letters/retries"]
    assert "reward/n_valid" not in answer.model_dump()["series"]


def test_no_registered_metric_has_a_name_that_is_renamed() -> None:
    assert all(current_name(metric.name) == metric.name for metric in METRICS)
    for old in ("reward/letters/requests", "time/reward/letters/p95_seconds"):
        assert is_known(old)
        assert is_known(f"eval_{old}")
        assert not is_reproducible(current_name(old))
    assert current_name("eval_reward/n_valid") == "eval_reward_requests/n_valid"
    assert current_name("rewards/reward/mean") == "rewards/reward/mean"
