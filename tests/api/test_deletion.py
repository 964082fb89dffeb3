"""What users delete goes at once for them, and soon from the disk and the tables."""

from collections.abc import Callable
from typing import Any

import pytest

from dar.client import Client
from fakes.command_line import run_command
from fakes.live_service import Lease, Live
from service.background.retention import Retention
from service.store import retention

PATH = "/v1/fine_tuning/jobs"
FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


def sample(step: int) -> dict[str, Any]:
    one = {"group": 0, "index": 0, "prompt": "p", "completion": "c" * 100, "finish_reason": "stop"}
    numbers = {"completion_tokens": 1, "reward": 0.5, "advantage": 0.1, "weight": 1.0}
    logs = {"logp_policy": -1.0, "logp_ref": -1.0, "logp_behavior": -1.0}
    rest = {"reward_status": "reward", "feedback": {}}
    return {"type": "samples", "step": step, "samples": [one | numbers | logs | rest]}


def finish(live: Live, **values: Any) -> tuple[dict[str, Any], list[str], Lease]:
    """A job that has succeeded, and its checkpoints."""
    job_id, lease = live.running(**values)
    lease.say({"type": "metrics", "step": 1, "values": {"dar/loss": 0.5}}, sample(1))
    made = [lease.checkpoint(2, FILES), lease.checkpoint(4, FILES)]
    ended = lease.post("/complete", last_seq=2, checkpoint_id=made[-1])
    assert ended.status_code == 200, ended.text
    return live.job(job_id), made, lease


def the_retention(live: Live) -> Retention:
    runtime = live.runtime
    return Retention(runtime.database, runtime.artifacts, live.settings, breath_seconds=0)


def test_a_deleted_job_is_gone_at_once_and_leaves_nothing(
    live: Live, error_of: Callable[..., Any]
) -> None:
    content = b'{"prompt": "a"}\n{"prompt": "b"}\n'
    file_id = live.upload(content).json()["id"]
    job, (checkpoint, _), lease = finish(live, training_file=file_id)
    path = f"{PATH}/{job['id']}"
    folder = live.settings.artifacts_path / "checkpoints" / job["id"]
    assert folder.is_dir()
    deleted = {"id": job["id"], "object": "fine_tuning.job", "deleted": True}
    assert live.http.delete(path).json() == deleted
    places = ("", "/events", "/metrics", "/samples", "/checkpoints", f"/checkpoints/{checkpoint}")
    for place in places:
        assert error_of(live.http.get(path + place))["code"] == "not_found", place
    for verb in ("cancel", "pause", "resume"):
        assert live.http.post(f"{path}/{verb}").status_code == 404
    assert live.http.delete(path).status_code == 404
    assert live.http.get(PATH).json()["data"] == []
    names = [model["id"] for model in live.http.get("/v1/models").json()["data"]]
    assert names == ["base"]
    assert lease.say({"type": "metrics", "step": 2, "values": {}}).status_code == 404
    retried = {"x-stainless-retry-count": "1"}
    with live.client(live.key("api_key"), **retried) as client:
        again = client.post(PATH, json=live.spec(training_file=file_id)).json()
    assert again["id"] != job["id"], "a retry makes a new job, as the first one is gone"
    live.http.post(f"{PATH}/{again['id']}/cancel")
    assert live.http.delete(f"{PATH}/{again['id']}").status_code == 200
    the_retention(live).run_once()
    assert not folder.exists()
    with live.runtime.database.read() as transaction:
        assert not any(retention.row_counts(transaction).values())


@pytest.mark.parametrize("state", ["queued", "paused", "running"])
def test_only_a_job_that_has_ended_is_deleted(
    live: Live, error_of: Callable[..., Any], state: str
) -> None:
    job_id = live.submit()["id"]
    if state == "running":
        assert live.claim() is not None
    elif state == "paused":
        live.http.post(f"{PATH}/{job_id}/pause")
    error = error_of(live.http.delete(f"{PATH}/{job_id}"))
    assert (error["code"], live.job(job_id)["status"]) == ("job_not_ended", state)


def test_what_another_job_starts_from_is_kept_while_it_may_need_it(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job, (older, newest), _ = finish(live)
    child = live.submit(model=job["fine_tuned_model"])["id"]
    checkpoint = f"{PATH}/{job['id']}/checkpoints/{newest}"
    places = (f"{PATH}/{job['id']}", checkpoint, f"/v1/models/{job['fine_tuned_model']}")
    for place in places:
        assert error_of(live.http.delete(place))["code"] == "checkpoint_in_use", place
    assert live.http.delete(f"{PATH}/{job['id']}/checkpoints/{older}").status_code == 200
    live.http.post(f"{PATH}/{child}/cancel")
    assert live.http.delete(places[0]).status_code == 200
    the_retention(live).run_once()
    error = error_of(live.http.post(f"{PATH}/{child}/resume"))
    assert error["code"] == "model_not_found"
    assert live.job(child)["status"] == "cancelled"


def test_a_job_keeps_the_checkpoint_that_it_would_resume_from(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, lease = live.running()
    older, newest = lease.checkpoint(1, FILES), lease.checkpoint(2, FILES)
    path = f"{PATH}/{job_id}/checkpoints"
    assert error_of(live.http.delete(f"{path}/{newest}"))["code"] == "checkpoint_in_use"
    assert live.http.delete(f"{path}/{older}").status_code == 200
    assert [one["id"] for one in live.job(job_id, "/checkpoints")["data"]] == [newest]
    assert live.http.delete(f"{path}/{older}").status_code == 404
    assert "deleted by a user" in live.job(job_id, "/events")["data"][0]["message"]


def test_a_model_is_deleted_and_its_job_stays(live: Live, error_of: Callable[..., Any]) -> None:
    job, (_, newest), _ = finish(live)
    name = job["fine_tuned_model"]
    with Client(api_key=live.key("api_key"), base_url=live.url) as client:
        assert client.models.delete(name).deleted
    assert live.http.get(f"/v1/models/{name}").status_code == 404
    assert newest not in str(live.job(job["id"], "/checkpoints"))
    assert live.job(job["id"])["status"] == "succeeded"
    assert error_of(live.http.delete(f"/v1/models/{name}"))["code"] == "not_found"
    assert error_of(live.http.delete("/v1/models/base"))["code"] == "model_of_installation"


def test_a_preview_tells_what_would_go_and_deletes_nothing(serve: Callable[..., Live]) -> None:
    live = serve(samples_bytes=1)
    finish(live)
    with Client(api_key=live.key("api_key"), base_url=live.url) as client:
        first, second = client.retention_preview(), client.retention_preview()
    assert first == second
    by_setting = {item.setting: item for item in first.items}
    assert first.samples_bytes > 100
    assert by_setting["samples_bytes"].rows == 1
    assert by_setting["samples_bytes"].bytes == first.samples_bytes - 1
    assert by_setting["jobs_kept_days"].rows == by_setting["digests_kept_days"].rows == 0
    assert first.rows["samples"] == 1
    the_retention(live).run_once()
    with Client(api_key=live.key("api_key"), base_url=live.url) as client:
        assert client.retention_preview().samples_bytes == 0
    environment = {"DAR_BASE_URL": live.url, "DAR_API_KEY": live.key("api_key")}
    ended = run_command("retention", environment=environment)
    assert ended.returncode == 0, ended.stderr
    assert "events_kept_days" in ended.stdout
    assert "samples have 0 bytes" in ended.stdout
