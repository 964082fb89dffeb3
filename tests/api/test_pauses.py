"""Pausing and resuming over HTTP, and what the API reports about rewards."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from fakes.live_service import Lease, Live

PATH = "/v1/fine_tuning/jobs"


def post(live: Live, job_id: str, verb: str) -> Any:
    """As OpenAI's client does: no body, and yet a content type."""
    headers = {"content-type": "application/json"}
    return live.http.post(f"{PATH}/{job_id}/{verb}", headers=headers)


def test_pausing_and_resuming_twice_is_doing_it_once(live: Live) -> None:
    job_id = live.submit()["id"]
    for verb, status, actions in (
        ("pause", "paused", ["cancel", "resume"]),
        ("resume", "queued", ["cancel", "pause"]),
    ):
        for _ in range(2):
            answer = post(live, job_id, verb)
            job = answer.json()
            assert (answer.status_code, job["status"], job["actions"]) == (200, status, actions)


def test_what_is_over_is_a_conflict(live: Live, error_of: Callable[..., Any]) -> None:
    job_id, lease = live.running()
    lease.post("/fail", kind="user", code="training_failed", message="no")
    assert error_of(post(live, job_id, "pause"))["code"] == "invalid_state"
    assert live.job(job_id)["actions"] == ["resume"]
    resumed = post(live, job_id, "resume").json()
    assert (resumed["status"], resumed["error"], resumed["finished_at"]) == ("queued", None, None)
    assert error_of(post(live, "nothing", "pause"))["code"] == "not_found"
    assert error_of(post(live, "nothing", "resume"))["code"] == "not_found"


def test_a_restart_needs_the_training_file(live: Live, error_of: Callable[..., Any]) -> None:
    job = live.submit()
    post(live, job["id"], "cancel")
    assert live.http.delete(f"/v1/files/{job['training_file']}").status_code == 200
    assert error_of(post(live, job["id"], "resume"))["code"] == "file_not_found"


def listen(client: Any, told: list[Any], after: str = "") -> threading.Thread:
    def wait() -> None:
        answer = client.get("/directives", params={"after": after, "wait": 20}).json()
        told.append((time.perf_counter(), answer))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    return thread


def test_a_pause_reaches_the_worker_within_a_second_and_a_cancellation_after_it(live: Live) -> None:
    job_id, lease = live.running()
    told: list[Any] = []
    thread = listen(lease.http, told)
    asked = time.perf_counter()
    job = post(live, job_id, "pause").json()
    thread.join(20)
    assert (job["status"], job["status_detail"]) == ("pausing", None)
    [(heard, answer)] = told
    assert heard - asked < 1
    assert answer == {"directives": [{"id": 2, "type": "pause"}], "cursor": "2"}
    thread = listen(lease.http, told, after="2")
    assert len(told) == 1, "what was told is not told again"
    post(live, job_id, "cancel")
    thread.join(20)
    assert told[1][1] == {"directives": [{"id": 1, "type": "cancel"}], "cursor": "1.2"}
    assert lease.post("/release", reason="paused").json()["status"] == "cancelled"


def test_a_pause_in_another_replica_is_found(serve: Callable[..., Any], live: Live) -> None:
    job_id, lease = live.running()
    replica = serve()
    told: list[Any] = []
    thread = listen(lease.http, told)
    post(replica, job_id, "pause")
    thread.join(20)
    assert told[0][1]["directives"] == [{"id": 2, "type": "pause"}]


def test_a_stop_reaches_the_worker_and_the_job_keeps_its_model(
    live: Live, error_of: Callable[..., Any]
) -> None:
    waiting = live.submit()["id"]
    assert error_of(post(live, waiting, "stop"))["code"] == "invalid_state"
    assert error_of(post(live, "nothing", "stop"))["code"] == "not_found"
    post(live, waiting, "cancel")
    job_id, lease = live.running()
    assert live.job(job_id)["is_stoppable"]
    told: list[Any] = []
    thread = listen(lease.http, told)
    job = post(live, job_id, "stop").json()
    assert (job["status"], job["status_detail"]) == ("running", "stopping")
    assert (job["actions"], job["is_stoppable"]) == (["cancel"], False)
    lease.post("/heartbeat", progress={"phase": "training", "step": 1})
    thread.join(20)
    # A worker that does not report about itself is of an earlier version, and knows only pauses.
    if not told[0][1]["directives"]:
        thread = listen(lease.http, told)
        thread.join(20)
    assert told[-1][1] == {"directives": [{"id": 4, "type": "pause"}], "cursor": "4"}
    lease.checkpoint(1)
    assert lease.post("/release", reason="paused").json()["status"] == "succeeded"
    job = live.job(job_id)
    assert (job["progress"]["step"], job["fine_tuned_model"] is None) == (1, False)
    assert post(live, job_id, "stop").json()["status"] == "succeeded"


def test_want_of_rewards_is_shown_with_its_reason(live: Live) -> None:
    job_id, lease = live.running()
    said = {"reason": "paused_reward", "code": "http_401", "message": "HTTP 401: who are you?"}
    assert lease.post("/release", **said).json() == {"status": "paused", "status_detail": "reward"}
    job = live.job(job_id)
    assert (job["status_detail"], job["status_message"]) == ("reward", said["message"])
    assert job["error"] == {"code": "http_401", "message": said["message"], "param": None}
    assert post(live, job_id, "resume").json()["error"] is None


def requests(outcome: str = "ok", retries: int = 0, count: int = 1) -> dict[str, Any]:
    return {
        "component": "letters", "outcome": outcome, "samples": 4 * count, "retries": retries,
        "buckets": [0, 0, count, 0, 0, 0, 0, 0, 0, 0, 0], "seconds": 0.08 * count, "queued_seconds": 0.5,
    }  # fmt: skip


def failed(**values: Any) -> dict[str, Any]:
    return {
        "component": "letters", "request_id": "rwq_1", "code": "http_503", "family": "http_5xx", "status": 503,
        "attempts": 4, "samples": 4, "seconds": 9.5, "quote": "busy", **values,
    }  # fmt: skip


def report(lease: Lease) -> None:
    """Two steps, the second with failures."""
    values = {
        "reward_requests/n_valid": 16.0,
        "reward_requests/n_skip": 0.0,
        "reward_requests/n_error": 0.0,
    }
    worse = {
        "reward_requests/n_valid": 11.0, "reward_requests/n_skip": 1.0, "reward_requests/n_error": 4.0, "reward_requests/n_error/http_5xx": 4.0,
        "rewards/dropped_groups": 1.0, "reward_requests/letters/requests": 4.0, "reward_requests/letters/failed_requests": 1.0,
        "reward_requests/letters/retries": 3.0, "reward_requests/letters/p50_seconds": 0.08, "reward_requests/letters/p95_seconds": 9.5,
        "time/idle_reward_seconds": 2.5, "rewards/fallback_fraction": 0.25, "rewards/zeroed_fraction": 0.125,
        "reward_requests/letters/in_flight": 3.0, "reward_requests/letters/concurrency": 8.0, "reward_requests/letters/breaker": 2.0,
    }  # fmt: skip
    failures = [failed(), failed(request_id="rwq_2", code="timeout", family="timeout", status=None)]
    breaker = {"kind": "reward_breaker", "component": "letters", "state": "open"}
    answer = lease.say(
        {"type": "metrics", "step": 1, "values": values},
        {"type": "rewards", "step": 1, "requests": [requests(count=4)], "failures": []},
        {"type": "metrics", "step": 2, "values": worse},
        {
            "type": "rewards",
            "step": 2,
            "requests": [requests(count=3), requests("http_5xx", retries=3)],
            "failures": failures,
        },
        {"type": "event", "level": "warn", "message": "open", "data": breaker},
    )
    assert answer.status_code == 200, answer.text


def test_the_requests_of_a_job_show_whether_its_endpoint_is_misconfigured(live: Live) -> None:
    endpoint = live.register("https://judge.example/score")["id"]
    path = f"/v1/reward_endpoints/{endpoint}"
    component = {"name": "letters", "endpoint": endpoint}
    _, lease = live.running(dar={"rewards": {"components": [component]}}, skip_validation=True)
    refused = failed(code="http_401", family="http_4xx", status=401)
    rejected = failed(code="http_422", family="http_4xx", status=422)

    def state_after(found: list[Any], failures: list[Any]) -> str:
        row = {"type": "rewards", "step": 1, "requests": found, "failures": failures}
        assert lease.say(row).status_code == 200
        return str(live.http.get(path).json()["state"])

    assert state_after([], [failed(), rejected]) == "ok"
    assert state_after([requests()], [refused]) == "misconfigured"
    assert state_after([], [failed()]) == "misconfigured", "it may still refuse"
    assert state_after([requests()], []) == "ok"
    assert state_after([], [refused]) == "misconfigured"
    assert live.http.patch(path, json={"headers": {"x-key": "new"}}).json()["state"] == "ok"
    assert state_after([], [refused]) == "ok", "this attempt still sends the old header"


def test_an_attempt_that_lost_its_job_changes_no_state_of_an_endpoint(live: Live) -> None:
    endpoint = live.register("https://judge.example/score")["id"]
    component = {"name": "letters", "endpoint": endpoint}
    job_id, lease = live.running(dar={"rewards": {"components": [component]}}, skip_validation=True)
    assert lease.post("/release", reason="drained").status_code == 200
    refused = failed(code="http_401", family="http_4xx", status=401)
    late = {"type": "rewards", "step": 1, "requests": [requests("http_4xx")], "failures": [refused]}
    assert lease.say(late).status_code == 200
    assert live.http.get(f"/v1/reward_endpoints/{endpoint}").json()["state"] == "ok"
    [stored] = live.job(job_id, "/reward_failures")["data"]
    assert stored["code"] == "http_401"


def test_reward_stats_sum_over_the_steps(live: Live) -> None:
    job_id, lease = live.running()
    empty = live.job(job_id, "/reward_stats")
    assert (empty["steps"], empty["rewards"]) == (0, 0)
    report(lease)
    assert live.job(job_id, "/reward_stats") == {
        "object": "fine_tuning.job.reward_stats", "job_id": job_id, "steps": 2,
        "rewards": 27, "skips": 1, "errors": 4, "errors_by_class": {"http_5xx": 4},
        "dropped_groups": 1, "refilled_groups": 0,
        "components": [
            {"component": "letters", "requests": 4, "failed_requests": 1, "retries": 3, "cached": 0, "cache_hits": 0, "p50_seconds": 0.08,
             "p95_seconds": 9.5},
        ],
    }  # fmt: skip


def test_reward_stats_count_the_step_in_which_failures_paused_the_job(live: Live) -> None:
    job_id, lease = live.running()
    counts = {
        "reward_requests/n_error": 8, "reward_requests/n_error/http_5xx": 8, "reward_requests/letters/requests": 2,
        "reward_requests/letters/failed_requests": 2, "reward_requests/letters/retries": 6,
        "reward_requests/letters/p50_seconds": 9.5,
    }  # fmt: skip
    row = {
        "type": "rewards", "step": 1, "requests": [requests("http_5xx", 6, 2)], "failures": [failed()],
        "unfinished": counts,
    }  # fmt: skip
    assert lease.say(row).status_code == 200
    stats = live.job(job_id, "/reward_stats")
    assert (stats["steps"], stats["rewards"], stats["errors"]) == (0, 0, 8)
    assert stats["errors_by_class"] == {"http_5xx": 8}
    [component] = stats["components"]
    assert (component["requests"], component["failed_requests"]) == (2, 2)
    assert (component["retries"], component["p50_seconds"]) == (6, 9.5)
    assert live.job(job_id)["progress"]["step"] == 0, "the step has not ended"
    assert "reward_requests/n_error" not in live.job(job_id, "/metrics")["series"]
    assert scraped(live)['dar_reward_errors_total{class="http_5xx"}'] == 8
    again = live.claim(incarnation="life-2")
    values = {
        "reward_requests/n_valid": 8.0,
        "reward_requests/n_error": 0.0,
        "reward_requests/letters/requests": 2.0,
    }
    assert again.say({"type": "metrics", "step": 1, "values": values}).status_code == 200
    repeated = live.job(job_id, "/reward_stats")
    assert (repeated["steps"], repeated["rewards"], repeated["errors"]) == (1, 8, 0)
    assert repeated["components"][0]["requests"] == 2


def test_reward_failures_are_pages_and_can_be_narrowed_to_a_step(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, lease = live.running()
    report(lease)
    assert live.job(job_id, "/reward_failures", step=1)["data"] == []
    page = live.job(job_id, "/reward_failures", step=2, limit=1)
    rest = live.job(job_id, "/reward_failures", after=page["last_id"])
    found = {item["request_id"]: item for item in page["data"] + rest["data"]}
    assert (page["has_more"], rest["has_more"], set(found)) == (True, False, {"rwq_1", "rwq_2"})
    one = found["rwq_1"]
    assert (one["step"], one["attempt"], one["error_class"]) == (2, 1, "http_5xx")
    assert (one["code"], one["status"], one["attempts"]) == ("http_503", 503, 4)
    assert (one["latency_seconds"], one["quote"]) == (9.5, "busy")
    assert found["rwq_2"]["status"] is None
    assert not any("rewound" in item for item in found.values())
    live.claim(incarnation="life-2")
    again = live.job(job_id, "/reward_failures")["data"]
    assert [item["rewound"] for item in again] == [True, True], "they show why the attempt ended"
    assert live.job(job_id, "/reward_failures", rewound=False)["data"] == []
    wrong = live.http.get(f"{PATH}/{job_id}/reward_failures", params={"step": 0})
    assert error_of(wrong)["param"] == "step"


def scraped(live: Live) -> dict[str, float]:
    answer = live.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    lines = [line.rpartition(" ") for line in answer.text.splitlines() if line[:1] != "#"]
    return {name: float(value) for name, _, value in lines}


def test_prometheus_gets_what_workers_report_once(live: Live) -> None:
    before = scraped(live)
    assert before["dar_reward_retries_total"] == 0
    job_id, lease = live.running()
    report(lease)
    lease.seq = 0
    report(lease)  # the same rows again, as after a lost reply
    values = scraped(live)
    expected = {
        'dar_reward_request_seconds_bucket{le="0.03",outcome="ok"}': 0,
        'dar_reward_request_seconds_bucket{le="0.1",outcome="ok"}': 7,
        'dar_reward_request_seconds_count{outcome="ok"}': 7,
        'dar_reward_request_seconds_count{outcome="http_5xx"}': 1,
        'dar_reward_samples_total{result="ok"}': 27,
        'dar_reward_samples_total{result="error"}': 4,
        'dar_reward_errors_total{class="http_5xx"}': 4,
        'dar_reward_breaker_changes_total{state="open"}': 1,
        "dar_reward_retries_total": 3,
        "dar_reward_queue_seconds_total": 1.5,
        "dar_reward_groups_dropped_total": 1,
        'dar_trainer_idle_seconds_total{cause="reward"}': 2.5,
        'dar_jobs{status="running"}': 1,
        "dar_reward_pauses_total": 0,
        "dar_reward_fallback_total": 4,
        "dar_reward_zeroed_total": 2,
        'dar_reward_callback_total{status="accepted"}': 0,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    labels = f'{{component="letters",job="{job_id}"}}'
    gauges = {
        f"dar_reward_inflight{labels}": 3,
        f"dar_reward_concurrency_limit{labels}": 8,
        f"dar_reward_breaker_state{labels}": 2,
    }
    assert {name: values.get(name) for name in gauges} == gauges
    assert values.keys() - gauges.keys() == before.keys(), "a job adds no counter"
    lease.say({"type": "metrics", "step": 3, "values": {"eval_dar/rewards_mean": 1.0}})
    assert gauges.items() <= scraped(live).items(), "an evaluation says nothing about them"
    lease.post("/release", reason="paused_reward")
    after = scraped(live)
    assert after.keys() == before.keys(), "gauges go with their job"
    assert (after["dar_reward_pauses_total"], after['dar_jobs{status="paused"}']) == (1, 1)


def test_a_worker_key_opens_the_metrics_too(live: Live) -> None:
    assert live.worker().get("/metrics").status_code == 200
    assert live.client(None).get("/metrics").status_code == 401
