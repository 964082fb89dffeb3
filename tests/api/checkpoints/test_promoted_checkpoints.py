"""Checkpoints that users name, keep, or let go at a time; and the models that they are."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import update

from dar import Client
from dar.errors import ConfigurationError, ConflictError, InvalidRequestError, NotFoundError
from fakes.live_service import Lease, Live
from service.background.reconciler import Reconciler
from service.store import checkpoints
from service.store.tables import CheckpointRow

FILES = {"config.json": b"{}", "resume/state.json": b"{}"}


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    with Client(live.key("api_key"), live.url) as client:
        yield client


def finished(live: Live, **values: Any) -> tuple[str, list[str]]:
    """A job with checkpoints of steps 2 and 4, and their ids."""
    job_id, lease = live.running(**values)
    made = []
    for step in (2, 4):
        lease.say({"type": "metrics", "step": step, "values": {"dar/rewards_mean": step / 10}})
        made.append(lease.checkpoint(step, {**FILES, "model.safetensors": b"weights-%d" % step}))
    ended = lease.post("/complete", last_seq=lease.seq, checkpoint_id=made[-1])
    assert ended.status_code == 200, ended.text
    return job_id, made


def reconcile(live: Live) -> None:
    runtime = live.runtime
    Reconciler(
        runtime.database,
        runtime.artifacts,
        runtime.waker,
        runtime.notifier,
        ttl_seconds=60,
        pause_seconds=60,
    ).run_once()


def expire(live: Live, *ids: str) -> None:
    """Let the time of checkpoints be over."""
    with live.runtime.database.write() as transaction:
        over = transaction.now - timedelta(seconds=1)
        rows = update(CheckpointRow).where(CheckpointRow.id.in_(ids))
        transaction.execute(rows.values(expires_at=over))


def steps(live: Live, job_id: str) -> list[int]:
    return [one["step_number"] for one in live.job(job_id, "/checkpoints")["data"]]


def weights_of(lease: Lease | None) -> bytes:
    assert lease is not None
    return lease.http.get("/inputs/model/model.safetensors").content


def test_a_promoted_checkpoint_is_a_model_that_jobs_start_from_and_moves_with_its_name(
    live: Live, client: Client, tmp_path: Path
) -> None:
    job_id, (older, newer) = finished(live)
    model = client.checkpoints.promote(job_id, older, "support.bot-1")
    assert (model.id, model.job_id, model.checkpoint_id) == ("support.bot-1", job_id, older)
    assert client.models.retrieve("support.bot-1") == model
    assert client.checkpoints.retrieve(job_id, older).aliases == ["support.bot-1"]
    listed = [one["aliases"] for one in live.job(job_id, "/checkpoints")["data"]]
    assert listed == [[], ["support.bot-1"]]
    assert "the model 'support.bot-1'" in live.job(job_id, "/events")["data"][0]["message"]
    _, lease = live.running(model="support.bot-1")
    assert client.checkpoints.promote(job_id, newer, "support.bot-1").checkpoint_id == newer
    assert weights_of(lease) == b"weights-2"  # a job goes on with what it was submitted with
    live.submit(model="support.bot-1")
    assert weights_of(live.claim(slot="1")) == b"weights-4"
    with openai.OpenAI(api_key=live.key("api_key"), base_url=f"{live.url}/v1") as compatible:
        assert "support.bot-1" in [one.id for one in compatible.models.list()]
        assert compatible.models.retrieve("support.bot-1").owned_by == "project"
    folder = client.models.download("support.bot-1", tmp_path / "weights")
    assert (folder / "model.safetensors").read_bytes() == b"weights-4"
    assert not (folder / "resume").exists()
    with pytest.raises(ConfigurationError, match="base model"):
        client.models.download("base", tmp_path)


def test_a_promoted_checkpoint_stays_until_its_name_is_taken_back(
    live: Live, client: Client
) -> None:
    job_id, (older, _) = finished(live, dar={"checkpointing": {"keep_last": 1}})
    client.checkpoints.promote(job_id, older, "mine")
    client.checkpoints.promote(job_id, older, "yours")
    expire(live, older)
    reconcile(live)
    assert steps(live, job_id) == [4, 2]
    result = client.models.retrieve("mine")
    for delete in (
        lambda: client.checkpoints.delete(job_id, older),
        lambda: client.jobs.delete(job_id),
        lambda: client.models.delete(
            client.checkpoints.retrieve(job_id, older).fine_tuned_model_checkpoint
        ),
    ):
        with pytest.raises(ConflictError, match="'mine', 'yours'") as caught:
            delete()
        assert caught.value.error_code == "checkpoint_in_use"
    assert client.models.retrieve("mine") == result
    for name in ("mine", "yours"):
        assert client.models.delete(name).deleted
        with pytest.raises(NotFoundError):
            client.models.delete(name)
    reconcile(live)
    assert steps(live, job_id) == [4]


def test_a_name_that_another_model_may_have_is_refused(
    live: Live, client: Client, error_of: Callable[..., Any]
) -> None:
    job_id, (_, newer) = finished(live)
    path = f"/v1/fine_tuning/jobs/{job_id}/checkpoints/{newer}/promote"
    for alias, status, code in (
        ("base", 409, "model_of_installation"),
        ("ft-mine", 400, "invalid_request"),
        ("a/b", 400, "string_pattern_mismatch"),
        ("a" * 97, 400, "string_too_long"),
        ("", 400, "string_pattern_mismatch"),
        (None, 400, "string_type"),
    ):
        answer = live.http.post(path, json={"alias": alias})
        assert (answer.status_code, error_of(answer)["code"]) == (status, code), alias
        assert error_of(answer)["param"] == "alias"
    answer = live.http.post(path.replace(newer, "ckpt-x"), json={"alias": "a"})
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")
    assert error_of(live.http.post(path, json={"alias": "a", "x": 1}))["param"] == "x"


def test_a_damaged_checkpoint_is_told_where_its_name_is_used(
    live: Live, client: Client, error_of: Callable[..., Any]
) -> None:
    job_id, (older, newer) = finished(live)
    client.checkpoints.promote(job_id, older, "mine")
    with live.runtime.database.write() as transaction:
        row = checkpoints.get(transaction, job_id, older)
        checkpoints.set_aside(transaction, row, "a file is missing")
    answer = live.http.post("/v1/fine_tuning/jobs", json=live.spec(model="mine"))
    assert answer.status_code == 400
    assert "is damaged" in error_of(answer)["message"]
    with pytest.raises(NotFoundError, match="is damaged"):
        client.models.retrieve("mine")
    client.checkpoints.promote(job_id, newer, "mine")
    assert client.models.retrieve("mine").checkpoint_id == newer


def test_a_checkpoint_goes_when_its_time_is_over_unless_it_is_pinned_or_needed(
    live: Live, client: Client
) -> None:
    job_id, (older, newer) = finished(live)
    later = datetime.now(UTC) + timedelta(days=3)
    shown = client.checkpoints.update(job_id, older, expires_at=later, pinned=True)
    assert (shown.expires_at, shown.is_pinned) == (int(later.timestamp()), True)
    assert client.checkpoints.update(job_id, newer, expires_at=later).expires_at is not None
    reconcile(live)
    assert steps(live, job_id) == [4, 2]
    child = live.submit(model=client.jobs.retrieve(job_id).fine_tuned_model)["id"]
    expire(live, older, newer)
    reconcile(live)
    assert steps(live, job_id) == [4, 2]
    client.checkpoints.update(job_id, older, pinned=False)
    reconcile(live)
    assert steps(live, job_id) == [4]
    assert "has expired" in live.job(job_id, "/events")["data"][0]["message"]
    folder = live.settings.artifacts_path / live.runtime.artifacts.checkpoint(job_id, 1, 2)
    assert not folder.exists()
    client.jobs.cancel(child)
    assert client.checkpoints.update(job_id, newer, expires_at=None).expires_at is None
    reconcile(live)
    assert steps(live, job_id) == [4]
    expire(live, newer)
    reconcile(live)
    assert steps(live, job_id) == []
    assert client.jobs.retrieve(job_id).status == "succeeded"


def test_a_running_job_keeps_what_it_would_resume_from_past_its_time(
    live: Live, client: Client
) -> None:
    job_id, lease = live.running()
    first = lease.checkpoint(1, FILES)
    expire(live, first)
    reconcile(live)
    assert steps(live, job_id) == [1]
    lease.checkpoint(2, FILES)
    reconcile(live)
    assert steps(live, job_id) == [2]


def test_a_change_that_is_none_is_refused(
    live: Live, client: Client, error_of: Callable[..., Any]
) -> None:
    job_id, (older, _) = finished(live)
    path = f"/v1/fine_tuning/jobs/{job_id}/checkpoints/{older}"
    for body, param in (
        ({}, None),
        ({"expires_at": int(datetime.now(UTC).timestamp()) - 5}, "expires_at"),
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"expires_at": 10**15}, "expires_at"),
        ({"pinned": "yes"}, "pinned"),
        ({"step_number": 3}, "step_number"),
    ):
        answer = live.http.patch(path, json=body)
        assert (answer.status_code, error_of(answer)["param"]) == (400, param), body
    assert live.http.patch(f"{path}x", json={"pinned": True}).status_code == 404
    with pytest.raises(ConfigurationError, match="time zone"):
        client.checkpoints.update(job_id, older, expires_at=datetime(2030, 1, 1))  # noqa: DTZ001 - what is refused
    with pytest.raises(InvalidRequestError):
        client.checkpoints.update(job_id, older)
