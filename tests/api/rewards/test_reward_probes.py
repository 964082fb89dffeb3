"""Probes of reward services, and what a submission finds out about them before it accepts a job."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from dar.client import Client
from dar.rewards.http.signing import decode_secret, verify
from dar.settings import environment
from fakes.live_service import Judge, Live
from service.rewards import probing

PATH = "/v1/reward_endpoints"
JOBS = "/v1/fine_tuning/jobs"
TOKEN = "Bearer s3cret-of-the-header"  # what `live.register` sends


def test_a_probe_asks_as_a_job_would_and_is_remembered(live: Live, judge: Judge) -> None:
    made = live.register(judge.url)
    report = live.http.post(f"{PATH}/{made['id']}/probe", json={"light": True}).json()
    assert (report["ok"], report["errors"]) == (True, [])
    headers, body = judge.seen[0]
    verify([decode_secret(made["signing_secret"])], headers, body)
    assert headers["authorization"] == TOKEN
    judge.status = 403
    failed = live.http.post(f"{PATH}/{made['id']}/probe", json={"light": True}).json()
    assert (failed["ok"], failed["errors"][0]["code"]) == (False, "http_403")
    stats = live.http.get(f"{PATH}/{made['id']}/stats").json()
    assert (stats["state"], stats["last_probe"]["ok"]) == ("misconfigured", False)
    assert live.http.get(f"{PATH}/{made['id']}").json()["state"] == "misconfigured"
    changed = live.http.patch(f"{PATH}/{made['id']}", json={"headers": {"authorization": "b"}})
    assert changed.json()["state"] == "ok"


def test_a_header_of_one_character_spoils_no_report(live: Live, judge: Judge) -> None:
    made = live.register(judge.url, headers={"x-version": "1", "x-flag": "e"})
    judge.status = 401
    report = live.http.post(f"{PATH}/{made['id']}/probe").json()
    assert report["errors"][0]["code"] == "http_401"


def test_an_inline_probe_sends_the_users_samples(
    live: Live, judge: Judge, error_of: Callable[..., Any]
) -> None:
    samples = [{"prompt": "hi", "completion": "ho", "ground_truth": 3}] * 2
    component = {"name": "a", "url": judge.url}
    body = {"component": component, "samples": samples, "light": True}
    assert live.http.post(f"{PATH}/probe", json=body).json()["ok"]
    headers, sent = judge.seen[0]
    asked = json.loads(sent)["samples"]
    assert {(item["completion"], item["ground_truth"]) for item in asked} == {("ho", 3)}
    verify([decode_secret(live.key("reward_secret"))], headers, sent)
    for wrong in ({"component": component, "samples": samples[:1]}, {"component": {"name": "a"}}):
        assert live.http.post(f"{PATH}/probe", json=wrong).status_code == 400
    builtin = {"component": {"name": "a", "kind": "builtin", "fn": "brevity"}}
    assert error_of(live.http.post(f"{PATH}/probe", json=builtin))["code"] == "not_inline"


def test_probes_are_rationed(live: Live, judge: Judge, error_of: Callable[..., Any]) -> None:
    body = {"component": {"name": "a", "url": judge.url}, "light": True}
    answers = [live.http.post(f"{PATH}/probe", json=body) for _ in range(7)]
    assert [answer.status_code for answer in answers] == [200] * 6 + [429]
    assert error_of(answers[-1])["code"] == "rate_limit_exceeded"
    assert 0 < int(answers[-1].headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    ("status", "answer", "code"),
    [
        (404, None, "http_404"),
        (302, None, "config.redirect"),
        (200, {"rewards": [1.0]}, "contract"),
        (200, {"rewards": ["1", "2"]}, "contract"),
    ],
)
def test_a_service_that_must_be_mended_first_refuses_the_job(
    live: Live, judge: Judge, error_of: Callable[..., Any], status: int, answer: Any, code: str
) -> None:
    judge.status = status
    if answer is not None:
        judge.answer = lambda asked: {"request_id": asked["request_id"], **answer}
    dar = {"rewards": {"components": [{"name": "a", "url": judge.url}]}}
    refused = live.http.post(JOBS, json=live.spec(dar=dar))
    error = error_of(refused)
    assert refused.status_code == 400
    assert error["code"].startswith(code)
    assert error["param"] == "method.dar.rewards.components[0].url"
    assert live.http.get(JOBS).json()["data"] == []
    live.submit(dar=dar, skip_validation=True)


@pytest.mark.parametrize("host", ["a..b", f"{'a' * 64}.example"])
def test_a_host_that_cannot_exist_refuses_the_job(
    live: Live, error_of: Callable[..., Any], host: str
) -> None:
    dar = {"rewards": {"components": [{"name": "a", "url": f"https://{host}/x"}]}}
    refused = live.http.post(JOBS, json=live.spec(dar=dar))
    error = error_of(refused)
    assert (refused.status_code, error["code"]) == (400, "config.url")
    assert "host name" in error["message"]
    assert live.http.get(JOBS).json()["data"] == []


def test_a_service_that_may_be_well_later_is_waited_for(live: Live, judge: Judge) -> None:
    judge.status = 503
    live.submit(dar={"rewards": {"components": [{"name": "a", "url": judge.url}]}})
    assert len(judge.seen) == 1  # nobody waits for retries at a submission
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/"
        components = [{"name": name, "url": f"{url}{name}"} for name in ("a", "b", "c")]
        started = time.monotonic()
        live.submit(dar={"rewards": {"components": components}})
        # All at once: one after the other they would take three times as long.
        assert time.monotonic() - started < 11


@pytest.mark.parametrize("protocol", ["dar.reward.v1", "openrlhf"])
def test_a_submission_asks_with_the_jobs_own_first_prompt(
    live: Live, judge: Judge, protocol: str
) -> None:
    def strict(asked: dict[str, Any]) -> Any:
        """Knows nothing to say without the row's truth, as a service of verifiable answers does."""
        truths = asked.get("labels") or [sample["ground_truth"] for sample in asked["samples"]]
        judge.status = 200 if set(truths) == {"42"} else 422
        rewards = [0.5] * len(truths)
        return {"request_id": asked.get("request_id"), "rewards": rewards}

    judge.answer = strict
    conversation = [{"role": "user", "content": "What is 6 x 7?"}]
    row = {"prompt": conversation, "ground_truth": "42", "level": 3}
    file = live.upload((json.dumps(row) + "\n").encode()).json()["id"]
    component = {"name": "a", "url": judge.url, "protocol": protocol}
    columns = {} if protocol == "openrlhf" else {"columns": ["level"]}
    live.submit(training_file=file, dar={"rewards": {"components": [component | columns]}})
    asked = json.loads(judge.seen[0][1])
    if protocol == "openrlhf":
        assert asked["prompts"] == ["user: What is 6 x 7?"] * 2
    else:
        assert [sample["messages"] for sample in asked["samples"]] == [conversation] * 2
        assert [sample["columns"] for sample in asked["samples"]] == [{"level": 3}] * 2


def test_a_service_that_skips_every_sample_is_named_in_the_events_of_each_job(
    live: Live, judge: Judge
) -> None:
    judge.answer = lambda asked: {
        "request_id": asked["request_id"],
        "rewards": [None] * len(asked["samples"]),
    }
    dar = {"rewards": {"components": [{"name": "silent", "url": judge.url}]}}
    for seed in range(2):  # the service is not probed for the second one
        job_id = live.submit(dar=dar, seed=seed)["id"]
        (event,) = [
            one
            for one in live.job(job_id, "/events")["data"]
            if one["data"].get("code") == "samples.skipped"
        ]
        assert (event["level"], event["data"]["component"]) == ("warn", "silent")
        assert "silent" in event["message"]
        assert "every sample was skipped" in event["message"]


def test_a_sweep_tries_its_service_once(live: Live, judge: Judge) -> None:
    dar = {"rewards": {"components": [{"name": "a", "url": judge.url}]}}
    for seed in range(5):
        live.submit(dar=dar, seed=seed)
    first = len(judge.seen)
    spec = live.spec(dar=dar)
    for _ in range(2):
        live.http.post(JOBS, json=spec, headers={"idempotency-key": "k"})
    assert len(judge.seen) == first > 0


def test_a_repetition_is_answered_without_trying_again(live: Live, judge: Judge) -> None:
    spec = live.spec(dar={"rewards": {"components": [{"name": "a", "url": judge.url}]}})
    first = live.http.post(JOBS, json=spec, headers={"idempotency-key": "k"})
    judge.status = 404
    live.runtime.passed_probes._until.clear()
    again = live.http.post(JOBS, json=spec, headers={"idempotency-key": "k"})
    assert again.json()["id"] == first.json()["id"]


def test_a_full_probe_reports_all_nine_steps_and_keeps_its_findings(
    live: Live, judge: Judge
) -> None:
    made = live.register(judge.url)
    report = live.http.post(f"{PATH}/{made['id']}/probe").json()
    assert report["ok"]
    assert [step["status"] for step in report["steps"]] == [
        *["ok"] * 5,
        "warn",
        "ok",
        "ok",
        "skipped",
    ]
    assert [finding["code"] for finding in report["warnings"]] == ["signature.unverified"]
    assert report["warnings"][0]["advice"]
    assert report["latency_ms"]["p99"] >= report["latency_ms"]["p50"] > 0
    assert report["determinism"] == {"max_abs_diff": 0.0, "same_id_max_abs_diff": 0.0}
    assert set(report["suggested"]) == {"limits", "timeouts", "batch", "hint"}
    assert report["exchange"][0]["request"]["headers"]["authorization"] == "[redacted]"
    assert "s3cret" not in json.dumps(report)
    kept = live.http.get(f"{PATH}/{made['id']}/stats").json()["last_probe"]
    assert kept["ok"]
    assert kept["warnings"] == report["warnings"]


def test_the_sdk_and_the_command_line_give_the_full_report(live: Live, judge: Judge) -> None:
    made = live.register(judge.url)
    with Client(live.key("api_key"), live.url) as client:
        report = client.reward_endpoints.probe(made["id"])
    assert report.ok
    assert len(report.steps) == 9
    given = environment(base_url=live.url, api_key=live.key("api_key"))
    command = [sys.executable, "-m", "dar.cli", "reward", "check"]
    done = subprocess.run(
        [*command, made["id"]], capture_output=True, text=True, env=given, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "signature.unverified" in done.stdout
    unknown = "rwe_01ARZ3NDEKTSV4RRFFQ69G5FAV"
    done = subprocess.run(
        [*command, unknown], capture_output=True, text=True, env=given, check=False
    )
    assert done.returncode == 5
    assert unknown in done.stderr


def test_a_probe_takes_callbacks_at_the_route_of_all_callbacks(live: Live, judge: Judge) -> None:
    threads: list[threading.Thread] = []
    statuses: dict[str, list[int]] = {}

    def call_back(asked: dict[str, Any]) -> None:
        path = f"{live.url}/v1/reward_callbacks/{asked['request_id']}"
        rewards = [float(len(sample["completion"])) for sample in asked["samples"]]
        result = {"type": "reward.result", "request_id": asked["request_id"], "rewards": rewards}
        headers = {"authorization": f"Bearer {asked['reply']['callback']['token']}"}
        for given in ({"authorization": "Bearer rwt_wrong"}, headers, headers):
            answer = httpx2.post(path, json=result, headers=given, trust_env=False, verify=False)
            statuses.setdefault(asked["request_id"], []).append(answer.status_code)

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        assert asked["reply"]["callback"]["url"].endswith(
            f"/v1/reward_callbacks/{asked['request_id']}"
        )
        threads.append(threading.Thread(target=call_back, args=(asked,)))
        threads[-1].start()
        return {"request_id": asked["request_id"], "status": "accepted"}

    judge.status, judge.answer = 202, answer
    component = {"name": "a", "url": judge.url, "reply": "either"}
    samples = [{"prompt": "p", "completion": text} for text in ("a", "bb")]
    body = {"component": component, "samples": samples, "light": True}
    report = live.http.post(f"{PATH}/probe", json=body).json()
    for thread in threads:
        thread.join()
    assert report["errors"] == []
    assert [step["status"] for step in report["steps"][:4]] == ["ok"] * 4
    assert {tuple(found[:2]) for found in statuses.values()} == {(401, 200)}
    # Repeated at once it is a duplicate; a probe that has ended by then knows nothing of it.
    assert {found[2] for found in statuses.values()} <= {200, 401}
    live.submit(dar={"rewards": {"components": [component]}})
    for thread in threads:
        thread.join()


def test_a_probe_ends_in_time_and_says_how_far_it_came(
    live: Live, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "FULL_SECONDS", 1.0)
    judge.delay = 0.4
    made = live.register(judge.url)
    report = live.http.post(f"{PATH}/{made['id']}/probe").json()
    assert (report["ok"], report["warnings"][0]["code"]) == (True, "unfinished")
    judge.delay = 3
    report = live.http.post(f"{PATH}/{made['id']}/probe").json()
    assert (report["ok"], report["errors"][0]["code"]) == (False, "timeout")
    assert live.http.get(f"{PATH}/{made['id']}").json()["state"] == "ok"
