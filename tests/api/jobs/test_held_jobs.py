"""Jobs that are submitted without being started."""

from collections.abc import Callable
from typing import Any

from dar.client import Client
from fakes.live_service import Live

PATH = "/v1/fine_tuning/jobs"


def test_a_job_that_is_not_started_waits_until_it_is(
    live: Live, sdk: Client, error_of: Callable[..., Any]
) -> None:
    held = sdk.jobs.create(live.spec(), auto_start=False)
    assert (held.status, held.status_detail, held.is_startable) == ("paused", "by_user", True)
    assert "start it" in str(held.status_message)
    assert live.claim() is None
    [event] = live.job(held.id, "/events")["data"]
    assert (event["data"]["status"], event["data"]["status_detail"]) == ("paused", "by_user")
    other = live.submit()
    for _ in range(2):
        started = sdk.jobs.start(held.id)
        assert (started.status, started.is_startable) == ("queued", False)
    leases = [live.claim("0"), live.claim("1")]
    assert [lease and lease.body["job_id"] for lease in leases] == [other["id"], held.id]
    assert leases[1] is not None
    assert "auto_start" not in leases[1].body["spec"]  # a worker of an earlier version reads it
    assert sdk.jobs.start(held.id).status == "running"
    leases[1].post("/release", reason="drained")
    sdk.jobs.pause(held.id)
    answer = live.http.post(f"{PATH}/{held.id}/start")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "invalid_state")
    assert "resume it" in error_of(answer)["message"]
    sdk.jobs.cancel(held.id)
    assert live.http.post(f"{PATH}/{held.id}/start").status_code == 409
    assert live.http.post(f"{PATH}/ftjob-none/start").status_code == 404


def test_a_held_job_is_another_submission_than_a_started_one(
    live: Live, error_of: Callable[..., Any]
) -> None:
    spec, key = live.spec(), {"idempotency-key": "one"}
    held = live.http.post(PATH, json=spec | {"auto_start": False}, headers=key).json()
    again = live.http.post(PATH, json=spec | {"auto_start": False}, headers=key)
    assert again.json()["id"] == held["id"]
    other = live.http.post(PATH, json=spec, headers=key)
    assert error_of(other)["code"] == "idempotency_mismatch"
    wrong = live.http.post(PATH, json=spec | {"auto_start": "no"})
    assert error_of(wrong)["param"] == "auto_start"
