"""A database of an earlier version opens and migrates, and its jobs go on."""

import json
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dar.protocol.spec import JobSpec
from dar.settings import Settings
from dar.training.checkpoint.checkpoint import digest
from dar.training.checkpoint.fingerprint import reward_terms
from service import migrate
from service.jobs.submission import body_digest
from service.store.database import Database

if TYPE_CHECKING:
    from continuity.conftest import Stored

JOBS = "/v1/fine_tuning/jobs"
REMOVED = {"batch": "by", "limits": "adaptive", "combine": "mode"}
"""Object of a spec -> its field that only ever had one value, and is gone."""
ADDED = {
    "fine_tuning.job": {
        "best_checkpoint",
        "estimated_finish",
        "etag",
        "failures",
        "forecast",
        "hyperparameters",
        "is_startable",
        "is_stoppable",
        "links.config",
        "method",
        "origin",
        "progress.calibration_completions",
        "progress.calibration_tokens",
        "usage",
    },
    "fine_tuning.job.checkpoint": {"aliases", "expires_at", "is_best", "is_pinned", "reward"},
    "fine_tuning.job.sample": {"prompt_id"},
    "metrics": {"resolution"},
    "model": {"created"},
}
"""Type of an object -> the fields that it shows besides those of the stored views.

Later versions have added them, or the stored views leave them out because they are long or change
with time.
"""


def without_removed(value: Any) -> Any:
    if isinstance(value, list):
        return [without_removed(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: without_removed(
            {key: one for key, one in item.items() if key != REMOVED.get(name)}
            if isinstance(item, dict)
            else item
        )
        for name, item in value.items()
    }


def without_added(
    shown: Any, expected: Any, added: dict[str, set[str]], kind: str = "", prefix: str = ""
) -> Any:
    """``shown`` without the fields that ``expected`` does not have, whose paths go to ``added``."""
    if isinstance(expected, list) and len(expected) == len(shown):
        pairs = zip(shown, expected, strict=True)
        return [without_added(*pair, added, kind, prefix) for pair in pairs]
    if not (isinstance(expected, dict) and isinstance(shown, dict)):
        return shown
    if "object" in expected:
        kind, prefix = expected["object"], ""
    if more := {f"{prefix}{name}" for name in shown.keys() - expected.keys()}:
        added.setdefault(kind, set()).update(more)
    return {
        name: without_added(shown[name], value, added, kind, f"{prefix}{name}.")
        for name, value in expected.items()
        if name in shown
    }


def test_the_stored_database_is_of_the_fourth_migration_and_comes_up_to_date(home: Path) -> None:
    database = Database(f"sqlite:///{home / 'dar.db'}")
    assert migrate.current(database) == "0004_reward_requests"
    migrate.upgrade(Settings(home=home), database)
    assert migrate.current(database) == migrate.head()
    database.close()
    with sqlite3.connect(home / "dar.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_every_object_is_shown_as_before(service: "Stored", facts: dict[str, Any]) -> None:
    user = service.client("api_key")
    added: dict[str, set[str]] = {}
    for path, expected in facts["views"].items():
        answer = user.get(path)
        assert answer.status_code == 200, answer.text
        shown = answer.json()
        assert without_removed(shown) == shown, path
        if expected.get("trained_tokens", 0) is None and shown["started_at"]:
            assert shown["trained_tokens"] == shown["progress"]["tokens"]
            expected = expected | {"trained_tokens": shown["trained_tokens"]}  # noqa: PLW2901 - shown since then while a job runs
        expected = without_removed(expected)  # noqa: PLW2901 - the same view in today's fields
        assert without_added(shown, expected, added) == expected, path
    assert added == ADDED
    listed = user.get(JOBS, params={"limit": 100}).json()["data"]
    assert {job["id"] for job in listed} == {job["id"] for job in facts["jobs"].values()}


def test_specs_keep_their_digests_with_the_removed_fields_and_without(
    service: "Stored", facts: dict[str, Any]
) -> None:
    for job in facts["jobs"].values():
        [stored] = service.row("SELECT spec FROM jobs WHERE id = ?", job["id"])
        assert '"mode":"weighted_sum"' in stored
        for spec in (json.loads(stored), without_removed(json.loads(stored))):
            parsed = JobSpec.model_validate(spec)
            assert body_digest(parsed) == job["stored_sha256"]
            assert digest(reward_terms(parsed.dar.rewards, None)) == job["reward_terms_sha256"]
        assert body_digest(JobSpec.model_validate(job["body"])) == job["body_sha256"]


def test_a_submission_sent_again_gives_the_same_job(
    service: "Stored", facts: dict[str, Any]
) -> None:
    user, jobs = service.client("api_key"), facts["jobs"]
    neutral, sparse = jobs["queued_neutral"], jobs["queued_sparse"]
    assert neutral["body"] != sparse["body"]
    assert without_removed(neutral["body"]) == sparse["body"]
    pairs = [(name, job["body"], job["id"]) for name, job in jobs.items()]
    pairs += [("queued_neutral", sparse["body"], neutral["id"])]
    pairs += [("queued_sparse", neutral["body"], sparse["id"])]
    for key, body, job_id in pairs:
        answer = user.post(JOBS, json=body, headers={"idempotency-key": key})
        assert (answer.status_code, answer.json().get("id")) == (200, job_id), answer.text
        assert answer.headers["idempotency-replayed"] == "true"
    other = neutral["body"] | {"seed": 6}
    answer = user.post(JOBS, json=other, headers={"idempotency-key": "queued_neutral"})
    assert answer.json()["error"]["code"] == "idempotency_mismatch"


def say(lease: Any, held: dict[str, Any], rows: list[dict[str, Any]], first: int) -> Any:
    numbered = [{"seq": seq, "at": 1.7e9 + seq, **row} for seq, row in enumerate(rows, start=first)]
    return lease.post("/batch", json={"attempt": held["attempt"], "rows": numbered})


def test_a_running_attempt_goes_on_to_the_end_of_its_job(
    service: "Stored", facts: dict[str, Any]
) -> None:
    held, tokens, rows = (
        facts["attempts"]["running"],
        facts["callback_tokens"],
        facts["rows_of_step_3"],
    )
    lease, attempt = service.lease(held), {"attempt": held["attempt"]}
    assert lease.post("/heartbeat", json=attempt).status_code == 200
    [told] = lease.get("/directives", params={"wait": 0}).json()["directives"]
    assert (told["request_id"], told["result"]) == ("rwq_done", facts["done_result"])
    # rows that were committed are known, in content too; the next ones go on
    assert say(lease, held, rows, 1).json() == {"acked_seq": held["seq"]}
    changed = [{**rows[0], "step": 4}, *rows[1:]]
    assert say(lease, held, changed, 1).json()["error"]["code"] == "integrity"
    further = [{"type": "metrics", "step": 4, "values": {"dar/loss": 0.125}}]
    assert say(lease, held, further, held["seq"] + 1).json() == {"acked_seq": held["seq"] + 1}
    # a callback is still taken
    result = {"type": "reward.result", "request_id": "rwq_waiting", "rewards": [0.5, 1.0]}
    for expected in ("accepted", "duplicate"):
        given = service.client(tokens["rwq_waiting"]).post(
            "/v1/reward_callbacks/rwq_waiting", json=result
        )
        assert given.json() == {"status": expected}, given.text
    for name, status in (("rwq_done", 409), ("rwq_closed", 410)):
        body = result | {"request_id": name}
        answer = service.client(tokens[name]).post(f"/v1/reward_callbacks/{name}", json=body)
        assert answer.status_code == status, answer.text
    # an upload goes on where it was
    upload = facts["upload"]
    path = f"/checkpoints/{upload['checkpoint_id']}"
    body = attempt | {"manifest": upload["manifest"], "manifest_sha256": upload["manifest_sha256"]}
    state = lease.post("/checkpoints", json=body).json()
    assert state["checkpoint_id"] == upload["checkpoint_id"]
    assert state["received"]["model.safetensors"] == len("weights")
    for name, content in upload["files"].items():
        offset = state["received"][name]
        where = attempt | {"offset": offset}
        rest = content.encode()[offset:]
        assert lease.put(f"{path}/files/{name}", params=where, content=rest).status_code == 200
    assert lease.post(f"{path}/commit", json=attempt).json()["status"] == "available"
    end = attempt | {"last_seq": held["seq"] + 1, "checkpoint_id": upload["checkpoint_id"]}
    assert lease.post("/complete", json=end).json()["status"] == "succeeded"


def test_an_attempt_that_lost_its_job_stays_out(service: "Stored", facts: dict[str, Any]) -> None:
    held = facts["attempts"]["late"]
    answer = service.lease(held).post("/heartbeat", json={"attempt": held["attempt"]})
    assert answer.json()["error"]["code"] == "fenced"


@pytest.mark.parametrize(
    ("name", "wanted", "status"),
    [("pausing", "pause", "paused"), ("cancelling", "cancel", "cancelled")],
)
def test_a_request_that_the_attempt_has_not_seen_still_reaches_it(
    service: "Stored", facts: dict[str, Any], name: str, wanted: str, status: str
) -> None:
    held = facts["attempts"][name]
    lease = service.lease(held)
    [told] = lease.get("/directives", params={"wait": 0}).json()["directives"]
    assert told["type"] == wanted
    body = {"attempt": held["attempt"], "reason": status}
    assert lease.post("/release", json=body).json()["status"] == status


def test_waiting_jobs_are_claimed_with_all_that_they_need(
    service: "Stored", facts: dict[str, Any]
) -> None:
    for name in ("queued_sparse", "queued_neutral", "queued_endpoint", "queued_on_a_model"):
        job, lease = facts["jobs"][name], service.claim()
        assert (lease["job_id"], lease["attempt"], lease["seed"]) == (job["id"], 1, 5)
        assert body_digest(JobSpec.model_validate(lease["spec"])) == job["stored_sha256"]
        inputs = service.lease(lease).get("/inputs").json()["files"]
        files = {file["name"] for file in inputs}
        is_on_a_model = name == "queued_on_a_model"
        model = "model/model.safetensors" if is_on_a_model else "model/config.json"
        assert files == {"training_file", model}
        if name == "queued_endpoint":
            access, endpoint = lease["rewards"]["letters"], facts["endpoint"]
            assert (access["url"], access["secrets"]) == (endpoint["url"], endpoint["secrets"])
            assert access["headers"] == {"authorization": "Bearer s3cret-of-the-header"}
        service.lease(lease).post(
            "/fail", json={"attempt": 1, "kind": "user", "code": "x", "message": "enough"}
        )


@pytest.mark.parametrize("name", ["paused", "paused_reward", "failed"])
def test_a_job_at_rest_is_resumed_from_its_checkpoint(
    service: "Stored", facts: dict[str, Any], name: str
) -> None:
    user, job = service.client("api_key"), facts["jobs"][name]
    for waiting in ("queued_sparse", "queued_neutral", "queued_endpoint", "queued_on_a_model"):
        user.post(f"{JOBS}/{facts['jobs'][waiting]['id']}/cancel")
    assert user.post(f"{JOBS}/{job['id']}/resume").json()["status"] == "queued"
    lease = service.claim()
    assert (lease["job_id"], lease["attempt"]) == (job["id"], 2)
    [checkpoint] = user.get(f"{JOBS}/{job['id']}/checkpoints").json()["data"]
    assert lease["resume_checkpoint_id"] == checkpoint["id"]
    http = service.lease(lease)
    assert http.get("/inputs/resume/model.safetensors").content == b"weights"
    assert body_digest(JobSpec.model_validate(lease["spec"])) == job["stored_sha256"]
