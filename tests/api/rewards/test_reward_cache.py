"""What the service knows of remembered rewards: when they may be used, when never again, and how
often they were.
"""

from collections.abc import Callable
from typing import Any

import pytest

from fakes.live_service import Judge, Live
from service.store import reward_endpoints
from service.store.reward_tables import RewardEndpointRow

PATH = "/v1/reward_endpoints"
SAME: dict[str, float | None] = {"max_abs_diff": 0.0}


def naming(endpoint_id: str, **values: Any) -> dict[str, Any]:
    return {"rewards": {"components": [{"name": "j", "endpoint": endpoint_id, **values}]}}


def probed(live: Live, endpoint: dict[str, Any], **report: Any) -> None:
    """Have a probe found something at the endpoint's present revision."""
    found = {
        "ok": True,
        "errors": [],
        "warnings": [],
        "latency_ms": {},
        "determinism": SAME,
        **report,
    }
    revision = live.http.get(f"{PATH}/{endpoint['id']}").json()["revision"]
    with live.runtime.database.write() as transaction:
        reward_endpoints.note_probe(
            transaction, endpoint["id"], found, revision=revision, state="ok"
        )


def leased(live: Live, endpoint: dict[str, Any], slot: str = "0") -> dict[str, Any]:
    """What a new job of the endpoint gets to know of it."""
    live.submit(dar=naming(endpoint["id"]), skip_validation=True)
    access: dict[str, Any] = live.claim(slot=slot).body["rewards"]["j"]
    return access


@pytest.fixture
def endpoint(live: Live) -> dict[str, Any]:
    made: dict[str, Any] = live.register("https://judge.example/score")
    return made


def test_a_lease_tells_which_endpoint_and_revision_it_is(
    live: Live, endpoint: dict[str, Any]
) -> None:
    access = leased(live, endpoint)
    assert (access["endpoint_id"], access["revision"]) == (endpoint["id"], 1)
    assert access["is_deterministic"] is False, "nobody has probed it"


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({}, True),
        ({"determinism": {"max_abs_diff": 0.0, "same_id_max_abs_diff": None}}, True),
        ({"warnings": [{"code": "signature.unverified", "step": 6, "detail": "x"}]}, True),
        ({"determinism": {}}, False),
        ({"determinism": {"max_abs_diff": None}}, False),
        ({"determinism": {"max_abs_diff": 1e-9}}, False),
        ({"determinism": {"max_abs_diff": 0.0, "same_id_max_abs_diff": 0.5}}, False),
        ({"warnings": [{"code": "order.position", "step": 4, "detail": "x"}]}, False),
        ({"ok": False}, False),
    ],
)
def test_a_service_counts_as_deterministic_when_a_probe_found_it_so(
    live: Live, endpoint: dict[str, Any], report: dict[str, Any], expected: bool
) -> None:
    probed(live, endpoint, **report)
    assert leased(live, endpoint)["is_deterministic"] is expected


@pytest.mark.parametrize("change", ["purge_cache", "rotate_secret", "url"])
def test_a_probe_of_an_earlier_revision_does_not_count(
    live: Live, endpoint: dict[str, Any], change: str
) -> None:
    probed(live, endpoint)
    path = f"{PATH}/{endpoint['id']}"
    if change == "url":
        answer = live.http.patch(path, json={"url": "https://judge.example/v2"})
    else:
        answer = live.http.post(f"{path}/{change}")
    assert answer.json()["revision"] == 2
    access = leased(live, endpoint)
    assert (access["revision"], access["is_deterministic"]) == (2, False)
    probed(live, endpoint)
    assert leased(live, endpoint, slot="1")["is_deterministic"] is True
    last = live.http.get(f"{path}/stats").json()["last_probe"]
    assert (last["revision"], last["determinism"]) == (2, SAME)


def test_a_new_name_keeps_what_was_remembered(live: Live, endpoint: dict[str, Any]) -> None:
    probed(live, endpoint)
    live.http.patch(f"{PATH}/{endpoint['id']}", json={"name": "other"})
    access = leased(live, endpoint)
    assert (access["revision"], access["is_deterministic"]) == (1, True)


def test_a_probe_that_was_kept_before_there_were_revisions_is_shown_and_does_not_count(
    live: Live, endpoint: dict[str, Any]
) -> None:
    old = {"at": 1, "ok": True, "errors": [], "warnings": [], "latency_ms": {}}
    with live.runtime.database.write() as transaction:
        row = transaction.get(RewardEndpointRow, endpoint["id"])
        row.last_probe = old
    shown = live.http.get(f"{PATH}/{endpoint['id']}/stats").json()["last_probe"]
    assert shown == {**old, "determinism": {}, "revision": 0}
    assert leased(live, endpoint)["is_deterministic"] is False


def test_a_purge_is_a_revision_and_no_repair(
    live: Live, endpoint: dict[str, Any], error_of: Callable[..., Any]
) -> None:
    with live.runtime.database.write() as transaction:
        reward_endpoints.set_state(
            transaction, endpoint["id"], endpoint["revision"], "misconfigured"
        )
    shown = live.http.post(f"{PATH}/{endpoint['id']}/purge_cache").json()
    assert (shown["revision"], shown["state"], shown["url"]) == (
        2,
        "misconfigured",
        endpoint["url"],
    )
    assert shown == live.http.get(f"{PATH}/{endpoint['id']}").json()
    unknown = live.http.post(f"{PATH}/rwe_unknown/purge_cache")
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "not_found")


def test_an_endpoint_says_whether_it_is_remembered(
    live: Live, error_of: Callable[..., Any]
) -> None:
    made = live.register(
        "https://judge.example/score", cache={"enabled": True, "scope": "endpoint"}
    )
    assert made["cache"] == {"enabled": True, "scope": "endpoint", "ttl_seconds": 604800.0}
    dar = naming(made["id"], cache={"ttl_seconds": 60.0})
    job = live.submit(dar=dar, skip_validation=True)
    [component] = job["method"]["dar"]["rewards"]["components"]
    assert component["cache"] == {"enabled": True, "scope": "endpoint", "ttl_seconds": 60.0}
    inline = {"name": "a", "url": "https://judge.example/", "cache": {"scope": "endpoint"}}
    spec = live.spec(dar={"rewards": {"components": [inline]}}, skip_validation=True)
    error = error_of(live.http.post("/v1/fine_tuning/jobs", json=spec))
    assert error["param"] == "method.dar.rewards.components[0].cache.scope"
    for wrong in ({"enabled": "yes"}, {"scope": "all"}, {"ttl_seconds": 0}, {"ttl": "7d"}):
        answer = live.http.post(PATH, json={"name": "x", "url": "https://x/", "cache": wrong})
        assert answer.status_code == 400, wrong


def test_samples_that_were_not_sent_are_counted(live: Live) -> None:
    job_id, lease = live.running()
    for step in (1, 2):
        values = {
            "reward_requests/n_valid": 8.0, "reward_requests/letters/requests": 1.0,
            "reward_requests/letters/cached": 5.0, "reward_requests/letters/cache_hits": 3.0, "reward_requests/other/cached": 2.0,
        }  # fmt: skip
        answer = lease.say({"type": "metrics", "step": step, "values": values})
        assert answer.status_code == 200, answer.text
    [component] = live.job(job_id, "/reward_stats")["components"]
    assert (component["cached"], component["cache_hits"]) == (10, 6)
    lines = live.http.get("/metrics").text.splitlines()
    assert 'dar_reward_samples_total{result="cached"} 14.0' in lines
    assert "dar_reward_cache_hits_total 6.0" in lines


def test_a_real_probe_finds_out_whether_rewards_may_be_remembered(live: Live, judge: Judge) -> None:
    made = live.register(judge.url)
    assert live.http.post(f"{PATH}/{made['id']}/probe", json={"light": True}).json()["ok"]
    assert leased(live, made)["is_deterministic"] is True
    judge.answer = lambda asked: {
        "request_id": asked["request_id"],
        "rewards": [len(judge.seen) + place / 7 for place in range(len(asked["samples"]))],
    }
    report = live.http.post(f"{PATH}/{made['id']}/probe", json={"light": True}).json()
    assert report["determinism"]["max_abs_diff"] > 0
    assert leased(live, made, slot="1")["is_deterministic"] is False
