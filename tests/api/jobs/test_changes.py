"""PATCH of a job: labels and limits, guarded by If-Match."""

from collections.abc import Callable
from typing import Any

import pytest

from dar.client import Client
from dar.errors import PreconditionFailedError
from fakes.live_service import Live

PATH = "/v1/fine_tuning/jobs"


def test_two_editors_do_not_overwrite_each_other(
    live: Live, sdk: Client, error_of: Callable[..., Any]
) -> None:
    job_id, lease = live.running(metadata={"team": "a"})
    first = sdk.jobs.retrieve(job_id)
    lease.say({"type": "metrics", "step": 1, "values": {"dar/loss": 0.5}})
    assert sdk.jobs.retrieve(job_id).etag == first.etag  # training changes neither
    changed = sdk.jobs.update(job_id, metadata={"team": "b"}, if_match=first.etag)
    assert (changed.metadata, changed.status) == ({"team": "b"}, "running")
    with pytest.raises(PreconditionFailedError) as caught:
        sdk.jobs.update(job_id, metadata={"team": "c"}, if_match=first.etag)
    assert caught.value.status == 412
    assert sdk.jobs.retrieve(job_id).metadata == {"team": "b"}
    late = live.http.patch(
        f"{PATH}/{job_id}", json={"metadata": {}}, headers={"if-match": str(first.etag)}
    )
    assert (late.status_code, error_of(late)["param"]) == (412, "If-Match")
    forced = live.http.patch(
        f"{PATH}/{job_id}", json={"metadata": None}, headers={"if-match": f'"x", {changed.etag}'}
    )
    assert forced.json()["metadata"] is None
    assert forced.headers["etag"] == forced.json()["etag"]
    assert live.http.get(f"{PATH}/{job_id}").headers["etag"] == forced.headers["etag"]
    assert [job.id for job in sdk.jobs.list(metadata={"team": "b"})] == []
    kinds = [event["data"].get("kind") for event in live.job(job_id, "/events")["data"]]
    assert kinds.count("update") == 2


def test_a_limit_is_in_force_for_a_running_job_at_once(live: Live, sdk: Client) -> None:
    job_id, lease = live.running()
    lease.checkpoint(1)
    changed = sdk.jobs.update(job_id, limits={"max_reward_calls": 2})
    assert changed.method is not None
    assert changed.method["dar"]["limits"] == {"max_seconds": None, "max_reward_calls": 2}
    both = sdk.jobs.update(job_id, limits={"max_seconds": 50})
    assert both.method is not None
    assert both.method["dar"]["limits"] == {"max_seconds": 50, "max_reward_calls": 2}
    sent = {"component": "letters", "outcome": "ok", "samples": 12, "retries": 0, "seconds": 0.2}
    sent |= {"buckets": [0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0], "queued_seconds": 0.0}
    told = lease.say({"type": "rewards", "step": 1, "requests": [sent], "failures": []})
    assert told.status_code == 200, told.text
    job = sdk.jobs.retrieve(job_id)
    assert job.status_detail == "stopping"
    assert job.usage is not None
    assert job.usage.reward_calls == 3


def test_a_job_that_has_ended_keeps_its_limits(
    live: Live, sdk: Client, error_of: Callable[..., Any]
) -> None:
    job = sdk.jobs.create(live.spec())
    sdk.jobs.cancel(job.id)
    assert sdk.jobs.update(job.id, metadata={"note": "wrong data"}).metadata == {
        "note": "wrong data"
    }
    answer = live.http.patch(f"{PATH}/{job.id}", json={"limits": {"max_seconds": 5}})
    assert (answer.status_code, error_of(answer)["code"]) == (409, "invalid_state")


def test_a_change_that_cannot_be_is_refused_by_its_place(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job = live.submit()
    for body, param in (
        ({"metadata": {"k": 3}}, "metadata.k"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
        ({"limits": {"max_seconds": 0}}, "limits.max_seconds"),
        ({"limits": {"max_minutes": 1}}, "limits.max_minutes"),
        ({"suffix": "x"}, "suffix"),
        ({"priority": 5}, "priority"),
    ):
        answer = live.http.patch(f"{PATH}/{job['id']}", json=body)
        assert (answer.status_code, error_of(answer)["param"]) == (400, param)
    assert live.job(job["id"]) == job
