"""The workers of an installation: their list, an operator's orders, and attempts with owners."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fakes.live_service import Lease, Live
from service.background.directives import Received

REPORT = {
    "version": "1.2",
    "machine": "machine-1",
    "devices": ["0", "1"],
    "disk_free": 10**10,
    "disk_total": 10**12,
    "memory_free": 10**9,
    "interval_seconds": 10.0,
}
PATH = "/v1/workers"


def claim(live: Live, slot: str = "0", **values: Any) -> Lease | None:
    """What the service answers to a worker that reports about itself."""
    asks = {"node": "node-1", "incarnation": "life-1", "boot_id": "boot-1", "report": REPORT}
    answer = live.worker().post("/v1/worker/leases/claim", json={**asks, "slot": slot, **values})
    if answer.status_code == 204:
        return None
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return Lease(body, live.client(body["token"], f"/v1/worker/leases/{body['lease_id']}"))


def listed(live: Live) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = live.http.get(PATH).json()["data"]
    return found


def order(live: Live, verb: str, **body: Any) -> list[dict[str, Any]]:
    answer = live.http.post(f"{PATH}/{verb}", json={"node": "node-1", **body})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def ready(live: Live) -> tuple[str, str]:
    answer = live.http.get("/readyz")
    assert answer.status_code == 200
    return answer.json()["status"], answer.json()["checks"]["workers"]


def test_workers_are_listed_with_what_they_report_and_do(live: Live) -> None:
    assert listed(live) == []
    assert ready(live) == ("ok", "ok")
    assert claim(live, slot="1") is None
    job_id = live.submit()["id"]
    assert claim(live) is not None
    live.claim(slot="old")  # it reports nothing
    busy, idle, old = listed(live)
    shown = {
        name: value for name, value in REPORT.items() if name not in {"machine", "interval_seconds"}
    }
    assert busy == busy | shown | {"node": "node-1", "slot": "0", "state": "busy", "job": job_id}
    assert (idle["state"], idle["job"], idle["reason"]) == ("idle", None, None)
    assert (old["state"], old["version"], old["devices"]) == ("idle", None, None)
    claim(live, slot="1", report={**REPORT, "is_leaving": True}, wants_job=False)
    assert listed(live)[1]["state"] == "gone"


def test_the_models_of_a_worker_are_listed_and_a_heartbeat_adds_one(live: Live) -> None:
    models = {"names": ["tiny"], "cache_bytes": 3, "cache_limit": 9}
    live.submit()
    lease = claim(live, report={**REPORT, "models": models})
    assert lease is not None
    live.claim(slot="old")

    def shown() -> list[tuple[Any, Any, Any]]:
        return [
            (one["models"], one["model_cache_bytes"], one["model_cache_limit"])
            for one in listed(live)
        ]

    assert shown() == [(["tiny"], 3, 9), (None, None, None)]
    news = {"names": ["tiny", "team/policy"], "cache_bytes": 5, "cache_limit": 9}
    assert lease.post("/heartbeat", models=news).status_code == 200
    assert lease.post("/heartbeat").status_code == 200
    assert shown()[0] == (["tiny", "team/policy"], 5, 9)


def test_the_commit_of_a_hub_model_is_that_of_the_first_attempt(live: Live) -> None:
    live.submit(model="team/policy")
    lease = claim(live)
    assert lease is not None
    assert lease.body["model"]["revisions"] == {}
    for commit in ("b" * 40, "c" * 40):
        answer = lease.post("/revisions", revisions={"team/policy": commit})
        assert answer.json() == {"revisions": {"team/policy": "b" * 40}}
    assert lease.post("/revisions", revisions={"team/policy": "main"}).status_code == 400
    lease.post("/release", reason="drained")
    assert lease.post("/revisions", revisions={"team/policy": "c" * 40}).status_code == 409
    again = claim(live)
    assert again is not None
    assert again.body["model"]["revisions"] == {"team/policy": "b" * 40}


def test_a_fault_is_told_in_the_list_in_readiness_and_in_metrics(live: Live) -> None:
    job_id = live.submit()["id"]
    lease = claim(live)
    assert lease is not None
    said = {"code": "disk_full", "message": "the worker's disk is full", "owner": "worker"}
    assert lease.post("/fail", kind="transient", **said).json()["status_detail"] == "backoff"
    fault = {"code": "device_failed", "message": "nvidia-smi fails"}
    claim(live, slot="1", report={**REPORT, "fault": fault}, wants_job=False)
    first, second = listed(live)
    assert (first["state"], first["faults"]) == ("failing", 1)
    assert first["reason"] == "disk_full: the worker's disk is full"
    assert first["retry_at"] > first["seen_at"]
    assert (second["state"], second["reason"]) == ("failing", "device_failed: nvidia-smi fails")
    status, check = ready(live)
    assert status == "degraded"
    assert check.startswith("2 of 2 can run no job: device_failed, disk_full")
    text = live.http.get("/metrics").text
    for line in (
        'dar_workers{state="failing"} 2.0',
        'dar_worker_failing{code="disk_full",node="node-1",slot="0"} 1.0',
        'dar_attempts_failed{owner="worker"} 1.0',
    ):
        assert line in text
    [attempt] = live.job(job_id, "/attempts")["data"]
    facts = {"number": 1, "status": "failed", "node": "node-1", "start_step": 0, **said}
    assert attempt == attempt | facts
    assert live.job(job_id)["failures"] == {"worker": 1}
    order(live, "admit", slot="0")
    assert listed(live)[0]["state"] == "idle"


def test_the_attempts_of_a_job_are_pages(live: Live) -> None:
    job_id, lease = live.running()
    for _ in range(2):
        lease.post("/release", reason="drained")
        lease = live.claim()
    newest = live.job(job_id, "/attempts", limit=2)
    assert [(one["number"], one["status"]) for one in newest["data"]] == [
        (3, "running"),
        (2, "drained"),
    ]
    rest = live.job(job_id, "/attempts", after=newest["last_id"])
    assert [one["number"] for one in rest["data"]] == [1]


@contextmanager
def listening(lease: Lease) -> Iterator[list[Any]]:
    """A long poll of the directives runs meanwhile; afterwards the list has its answer."""
    told: list[Any] = []
    listener = threading.Thread(
        target=lambda: told.append(lease.http.get("/directives", params={"wait": 20}).json())
    )
    listener.start()
    time.sleep(0.2)
    yield told
    listener.join(5)


def test_a_drained_worker_is_told_and_gets_no_job_before_it_is_admitted(live: Live) -> None:
    live.submit()
    lease = claim(live)
    assert lease is not None
    with listening(lease) as told:
        [shown] = order(live, "drain", reason="a new disk")
    assert (shown["state"], shown["reason"]) == ("draining", "a new disk")
    assert told == [{"directives": [{"id": 3, "type": "drain"}], "cursor": "3"}]
    assert lease.post("/release", reason="drained").json()["status"] == "queued"
    assert claim(live) is None
    assert claim(live, incarnation="life-2") is None, "a restart changes nothing"
    assert listed(live)[0]["state"] == "drained"
    [shown] = order(live, "admit")
    assert (shown["state"], shown["reason"]) == ("idle", None)
    assert claim(live, incarnation="life-2").attempt == 2


def test_a_drain_in_another_replica_is_found(serve: Callable[..., Live], live: Live) -> None:
    live.submit()
    lease = claim(live)
    assert lease is not None
    with listening(lease) as told:
        order(serve(), "drain", slot="0")
    assert [item["directives"] for item in told] == [[{"id": 3, "type": "drain"}]]


@pytest.mark.parametrize(
    ("verb", "told", "then"), [("stop", "4", "3.4"), ("pause", "2", "2.3"), ("cancel", "1", "1")]
)
def test_a_drain_follows_a_stop_or_pause_that_the_worker_knows_of(
    live: Live, verb: str, told: str, then: str
) -> None:
    job_id = live.submit()["id"]
    lease = claim(live)
    assert lease is not None
    live.http.post(f"/v1/fine_tuning/jobs/{job_id}/{verb}")

    def poll(after: str) -> str:
        params = {"after": after, "wait": 0}
        cursor: str = lease.http.get("/directives", params=params).json()["cursor"]
        return cursor

    def has_news(after: str) -> bool:
        """Whether the watcher of long polls wakes this one."""
        return live.runtime.notifier._changed({job_id: Received.parse(after)}) == [job_id]

    assert (has_news(""), poll(""), has_news(told), poll(told)) == (True, told, False, told)
    order(live, "drain")
    assert (has_news(told), poll(told)) == (told != then, then)
    assert (has_news(then), poll(then)) == (False, then)


def test_a_worker_of_an_earlier_version_does_not_poll_in_vain_before_its_first_step(
    live: Live,
) -> None:
    job_id, lease = live.running()
    live.http.post(f"/v1/fine_tuning/jobs/{job_id}/stop")
    assert live.runtime.notifier._changed({job_id: Received()}) == []
    lease.post("/heartbeat", progress={"phase": "training", "step": 1})
    assert live.runtime.notifier._changed({job_id: Received()}) == [job_id]


def test_a_worker_of_an_earlier_version_is_not_sent_what_it_does_not_know(live: Live) -> None:
    _, lease = live.running()
    order(live, "drain")
    assert lease.http.get("/directives", params={"wait": 0}).json()["directives"] == []
    lease.post("/release", reason="drained")
    assert live.claim() is None


def test_a_banned_worker_loses_its_job_at_once_and_the_job_loses_nothing(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id = live.submit()["id"]
    lease = claim(live)
    assert lease is not None
    lease.checkpoint(2)
    [shown] = order(live, "ban", reason="it lies")
    assert (shown["state"], shown["reason"], shown["job"]) == ("banned", "it lies", None)
    assert error_of(lease.post("/heartbeat"))["code"] == "fenced"
    job = live.job(job_id)
    assert (job["status"], job["failures"]) == ("queued", {})
    assert job["status_message"] == "the worker on node-1 was banned: it lies"
    assert claim(live) is None
    other = claim(live, node="node-2", report={**REPORT, "machine": "machine-2"})
    assert (other.attempt, other.body["resume_checkpoint_id"] is not None) == (2, True)
    order(live, "admit")
    assert claim(live) is None, "no job is left"
    assert [one["state"] for one in listed(live)] == ["idle", "busy"]


@pytest.mark.parametrize("ask", ["cancel", "pause"])
def test_a_ban_completes_what_a_user_has_asked_for(live: Live, ask: str) -> None:
    job_id = live.submit()["id"]
    assert claim(live) is not None
    live.http.post(f"/v1/fine_tuning/jobs/{job_id}/{ask}")
    order(live, "ban")
    assert live.job(job_id)["status"] == {"cancel": "cancelled", "pause": "paused"}[ask]


def test_orders_name_a_worker_and_need_the_scope_admin(
    live: Live, error_of: Callable[..., Any]
) -> None:
    for verb in ("drain", "ban", "admit"):
        unknown = error_of(live.http.post(f"{PATH}/{verb}", json={"node": "x", "slot": "1"}))
        assert (unknown["code"], "node 'x', slot '1'" in unknown["message"]) == ("not_found", True)
        refused = live.worker().post(f"{PATH}/{verb}", json={"node": "x"})
        assert (refused.status_code, error_of(refused)["code"]) == (403, "insufficient_scope")
    assert live.worker().get(PATH).status_code == 403


def test_a_second_machine_of_a_name_is_a_conflict(live: Live, error_of: Callable[..., Any]) -> None:
    live.submit()
    assert claim(live) is not None
    asks = {"node": "node-1", "slot": "0", "incarnation": "life-2", "boot_id": "boot-2"}
    other = {**REPORT, "machine": "machine-2"}
    for report in (None, other):
        answer = live.worker().post("/v1/worker/leases/claim", json={**asks, "report": report})
        assert (answer.status_code, error_of(answer)["code"]) == (409, "worker_name_taken")
