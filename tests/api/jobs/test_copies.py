"""Forks start from a checkpoint with changed settings, reruns repeat; the first job stays."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from dar.client import Client
from dar.protocol.ids import new_id
from fakes.live_service import Live
from service.jobs import copies
from service.store.tables import CheckpointRow, JobRow

PATH = "/v1/fine_tuning/jobs"
FILES = {"model.safetensors": b"weights", "config.json": b"{}", "resume/state.json": b"{}"}


def trained(live: Live, *steps: int, **values: Any) -> tuple[str, list[str]]:
    """A job with checkpoints at these steps, which has not ended."""
    job_id, lease = live.running(**values)
    return job_id, [lease.checkpoint(step, FILES) for step in steps]


def test_a_fork_starts_from_a_checkpoint_with_other_settings(live: Live, sdk: Client) -> None:
    job_id, [first, second] = trained(live, 1, 2, seed=5, metadata={"team": "a"}, suffix="mine")
    changes = {
        "method": {"dar": {"hyperparameters": {"alpha": 0.2, "n_epochs": 3}}},
        "metadata": {"team": None, "kind": "slow"},
    }
    fork = sdk.jobs.fork(job_id, changes=changes)
    source = live.job(job_id)
    assert fork.origin is not None
    assert fork.origin.model_dump() == {
        "kind": "fork",
        "job_id": job_id,
        "checkpoint_id": second,
        "step": 2,
    }
    assert (fork.status, fork.progress.step, fork.seed) == ("queued", 0, 5)
    assert fork.model == live.job(job_id, f"/checkpoints/{second}")["fine_tuned_model_checkpoint"]
    assert (fork.metadata, fork.suffix) == ({"kind": "slow"}, "mine")
    before, after = source["hyperparameters"], fork.hyperparameters
    assert (before["kl_budget"], before["max_steps"]) == (1.0, 4)
    assert "kl_budget" not in after
    assert (after["alpha"], after["beta"], after["n_epochs"]) == (0.2, 0.3, 3)
    assert after["max_steps"] is None
    assert sdk.jobs.fork(job_id, checkpoint=first).model.endswith("-step-1")
    made = sdk.jobs.config(fork.id).ingredients
    assert made is not None
    assert set(made.checkpoint_sha256) == {second}
    whole = sdk.jobs.fork(job_id, checkpoint="start", changes={"auto_start": False})
    assert (whole.model, whole.status) == ("base", "paused")
    budget = sdk.jobs.fork(
        fork.id,
        checkpoint="start",
        changes={"method": {"dar": {"hyperparameters": {"kl_budget": 2}}}},
    )
    assert (budget.hyperparameters["kl_budget"], budget.model) == (2, fork.model)
    assert live.job(job_id)["status"] == "running"


def test_a_repeated_fork_is_one_job_although_a_checkpoint_came_meanwhile(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, lease = live.running()
    lease.checkpoint(1, FILES)
    key = {"idempotency-key": "mine"}
    first = live.http.post(f"{PATH}/{job_id}/fork", headers=key)
    lease.checkpoint(2, FILES)
    again = live.http.post(f"{PATH}/{job_id}/fork", json={"checkpoint": "latest"}, headers=key)
    assert first.headers["location"] == f"{PATH}/{first.json()['id']}"
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["idempotency-replayed"] == "true"
    other = live.http.post(f"{PATH}/{job_id}/fork", json={"checkpoint": "start"}, headers=key)
    assert error_of(other)["code"] == "idempotency_mismatch"


def test_a_repeated_copy_is_the_stored_job_whatever_became_of_its_source(
    live: Live, sdk: Client
) -> None:
    job_id, [checkpoint_id] = trained(live, 1)
    key, retry = {"idempotency-key": "fork"}, {"x-stainless-retry-count": "1"}
    rerun_key = {"idempotency-key": "rerun"}
    body = {"checkpoint": checkpoint_id}
    fork = live.http.post(f"{PATH}/{job_id}/fork", json=body, headers=key).json()
    inferred = live.http.post(f"{PATH}/{job_id}/fork", json={"checkpoint": "start"}).json()
    sdk.jobs.cancel(fork["id"])
    sdk.jobs.cancel(inferred["id"])
    ended = live.submit()["id"]
    sdk.jobs.cancel(ended)
    rerun = live.http.post(f"{PATH}/{ended}/rerun", headers=rerun_key).json()
    sdk.jobs.cancel(rerun["id"])
    with live.runtime.database.write() as transaction:
        for source in (job_id, ended):
            transaction.get_one(JobRow, source).deleted_at = transaction.now
    for path, sent, headers, first in (
        (f"{job_id}/fork", body, key, fork),
        (f"{job_id}/fork", {"checkpoint": "start"}, retry, inferred),
        (f"{ended}/rerun", None, rerun_key, rerun),
    ):
        answer = live.http.post(f"{PATH}/{path}", json=sent, headers=headers)
        assert (answer.status_code, answer.json().get("id")) == (200, first["id"]), path
        assert answer.headers["idempotency-replayed"] in {"true", "inferred"}
    assert live.http.post(f"{PATH}/{ended}/rerun").status_code == 404


def test_a_fork_never_starts_from_a_checkpoint_that_took_the_name_of_its_own(
    live: Live, error_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, [checkpoint_id] = trained(live, 1)
    fork = copies.fork

    def overtaken(*args: Any) -> Any:
        """A fork whose step a later attempt writes again before the job is stored."""
        made = fork(*args)
        with live.runtime.database.write() as transaction:
            old = transaction.get_one(CheckpointRow, checkpoint_id)
            values = {one.name: getattr(old, one.name) for one in old.__table__.columns}
            later = {"id": new_id("ckpt-"), "attempt": 2, "created_at": transaction.now}
            transaction.add(CheckpointRow(**values | later))
        return made

    monkeypatch.setattr(copies, "fork", overtaken)
    answer = live.http.post(f"{PATH}/{job_id}/fork", json={"checkpoint": checkpoint_id})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "service_unavailable")
    monkeypatch.undo()
    assert live.http.get(PATH).json()["data"][0]["id"] == job_id
    newer = live.http.post(f"{PATH}/{job_id}/fork").json()
    assert newer["origin"]["checkpoint_id"] != checkpoint_id


def test_a_fork_that_cannot_be_is_refused_by_its_place(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, _ = trained(live, 1)
    cases: list[tuple[dict[str, Any], int, str | None]] = [
        ({"checkpoint": "ckpt-none"}, 404, None),
        ({"checkpoint": "start", "changes": {"model": "nothing"}}, 400, "model"),
        ({"checkpoint": ""}, 400, "checkpoint"),
        ({"checkpoints": "best"}, 400, "checkpoints"),
        ({"changes": []}, 400, "changes"),
        ({"changes": {"model": "base"}}, 400, "changes.model"),
        ({"changes": {"modle": "base"}}, 400, "changes.modle"),
        (
            {"changes": {"method": {"dar": {"hyperparameters": {"alpha": "much"}}}}},
            400,
            "changes.method.dar.hyperparameters.alpha",
        ),
        ({"changes": {"training_file": None}}, 400, "changes.training_file"),
        ({"changes": {"training_file": "file-none"}}, 400, "training_file"),
    ]
    for body, status, param in cases:
        answer = live.http.post(f"{PATH}/{job_id}/fork", json=body)
        assert (answer.status_code, error_of(answer)["param"]) == (status, param), body
    job = live.submit()
    for name in ("latest", "best"):
        answer = live.http.post(f"{PATH}/{job['id']}/fork", json={"checkpoint": name})
        assert (answer.status_code, error_of(answer)["code"]) == (409, "invalid_state")
        assert "fork it from its start" in error_of(answer)["message"]


def test_a_rerun_is_the_same_job_again_and_the_first_one_keeps_its_attempts(
    live: Live, sdk: Client, error_of: Callable[..., Any]
) -> None:
    job_id, lease = live.running(metadata={"team": "a"})
    early = live.http.post(f"{PATH}/{job_id}/rerun")
    assert (early.status_code, error_of(early)["code"]) == (409, "invalid_state")
    lease.post("/fail", kind="user", code="training_failed", message="it diverged")
    before, attempts = live.job(job_id), live.job(job_id, "/attempts")
    again = sdk.jobs.rerun(job_id)
    assert again.id != job_id
    assert again.origin is not None
    assert (again.origin.kind, again.origin.job_id) == ("rerun", job_id)
    for name in ("model", "seed", "method", "metadata", "training_file"):
        assert getattr(again, name) == before[name], name
    assert (again.attempt, again.status) == (0, "queued")
    assert live.job(job_id) == before
    assert live.job(job_id, "/attempts") == attempts
    assert sdk.jobs.config(again.id).config_sha256 == sdk.jobs.config(job_id).config_sha256
    file_id = before["training_file"]
    sdk.jobs.cancel(again.id)
    assert live.http.delete(f"/v1/files/{file_id}").status_code == 200
    gone = live.http.post(f"{PATH}/{job_id}/rerun")
    assert (gone.status_code, error_of(gone)["code"]) == (400, "file_not_found")


def test_copies_and_the_config_have_the_labels_that_a_job_has_now(live: Live, sdk: Client) -> None:
    job = live.submit(metadata={"team": "a"})
    sdk.jobs.update(job["id"], metadata={"team": "b", "kind": "slow"})
    now = {"team": "b", "kind": "slow"}
    assert sdk.jobs.config(job["id"]).spec["metadata"] == now
    fork = sdk.jobs.fork(job["id"], checkpoint="start", changes={"metadata": {"kind": None}})
    assert fork.metadata == {"team": "b"}
    sdk.jobs.cancel(job["id"])
    assert sdk.jobs.rerun(job["id"]).metadata == now


def test_a_rerun_has_the_commit_of_the_hub_model_that_the_first_job_had(
    serve: Callable[..., Live],
) -> None:
    live, commit = serve(hub_models=("team/*",)), "b" * 40
    job_id, lease = live.running(model="team/policy")
    assert lease.post("/revisions", revisions={"team/policy": commit}).status_code == 200
    lease.post("/fail", kind="user", code="training_failed", message="it diverged")
    again = live.http.post(f"{PATH}/{job_id}/rerun").json()
    assert live.job(again["id"], "/config")["model_source"]["revisions"] == {"team/policy": commit}
    claimed = live.claim("1")
    assert claimed is not None
    assert claimed.body["model"]["revisions"] == {"team/policy": commit}


def test_the_config_of_a_job_makes_the_same_job_and_names_what_it_is_made_of(
    live: Live, sdk: Client
) -> None:
    rows = b'{"prompt": "hi"}\n{"prompt": "ho"}\n'
    job = sdk.jobs.create(live.spec(training_file=live.upload(rows).json()["id"]))
    config = sdk.jobs.config(job.id)
    assert config.spec["seed"] == job.seed
    assert (config.total_steps, config.model_source["name"]) == (4, "base")
    made = config.ingredients
    assert made is not None
    assert made.training_file_sha256 == hashlib.sha256(rows).hexdigest()
    assert len(made.code_sha256) == len(str(made.model_sha256)) == 64
    same = sdk.jobs.create(config.spec, suffix="other", metadata={"a": "b"})
    assert sdk.jobs.config(same.id).config_sha256 == config.config_sha256
    other = sdk.jobs.create(config.spec, seed=job.seed + 1)
    assert sdk.jobs.config(other.id).config_sha256 != config.config_sha256
    folder = live.settings.home / "models" / "base"
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    changed = sdk.jobs.config(sdk.jobs.create(config.spec).id)
    assert changed.ingredients is not None
    assert changed.ingredients.model_sha256 != made.model_sha256
    assert live.http.get(f"{PATH}/ftjob-none/config").status_code == 404
