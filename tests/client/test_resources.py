"""The SDK against the real service."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar.client import Client
from dar.errors import (
    AuthenticationError,
    ConflictError,
    IdempotencyMismatchError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
)
from dar.protocol.jobs import Job
from dar.protocol.spec import JobSpec


def test_a_file_comes_back_as_it_was_sent(client: Client, prompts: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(prompts)
    file = client.files.create(path)
    assert (file.filename, file.num_rows, file.bytes) == ("mine.jsonl", 5, len(prompts))
    assert client.files.content(file.id) == prompts
    assert client.files.retrieve(file.id) == file
    assert client.files.delete(file.id).deleted
    with pytest.raises(NotFoundError) as caught:
        client.files.retrieve(file.id)
    assert caught.value.request_id


def test_a_file_can_be_bytes_or_an_open_file(client: Client, prompts: bytes) -> None:
    whole = client.files.create(prompts, filename="named.jsonl")
    opened = io.BytesIO(b"skipped" + prompts)
    opened.seek(7)
    assert whole.filename == "named.jsonl"
    assert client.files.create(opened).sha256 == whole.sha256


def test_a_bad_row_is_named(client: Client) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.files.create(b'{"prompt": "fine"}\n{"prompt": 3}\n')
    assert caught.value.problems[0].row == 2


def test_lists_go_on_over_their_pages(client: Client, prompts: bytes) -> None:
    made = [client.files.create(prompts).id for _ in range(5)]
    listed = [file.id for file in client.files.list(limit=2)]
    assert listed[:5] == made[::-1]
    assert [file.id for file in client.files.list(limit=100, order="asc")] == listed[::-1]


def test_a_job_is_submitted_from_a_spec_a_mapping_or_fields(
    client: Client, prompts: bytes, method: dict[str, Any]
) -> None:
    file = client.files.create(prompts)
    fields = {"model": "tiny", "training_file": file.id, "method": method, "seed": 3}
    spec = JobSpec.model_validate(fields)
    jobs = [
        client.jobs.create(spec),
        client.jobs.create(fields),
        client.jobs.create(**fields),
        client.jobs.create({**fields, "seed": 4}, seed=3),
    ]
    assert len({job.id for job in jobs}) == 4
    assert all(job.method == jobs[0].method and job.seed == 3 for job in jobs)
    for job in jobs:
        assert client.jobs.cancel(job.id).status == "cancelled"


def test_one_idempotency_key_is_one_job(
    client: Client, prompts: bytes, method: dict[str, Any]
) -> None:
    file = client.files.create(prompts)
    fields = {"model": "tiny", "training_file": file.id, "method": method}
    first = client.jobs.create(fields, idempotency_key="mine")
    assert client.jobs.create(fields, idempotency_key="mine").id == first.id
    with pytest.raises(IdempotencyMismatchError):
        client.jobs.create(fields, idempotency_key="mine", seed=1)
    client.jobs.cancel(first.id)


def test_errors_are_those_that_the_service_raised(
    client: Client, prompts: bytes, method: dict[str, Any]
) -> None:
    file = client.files.create(prompts)
    with pytest.raises(ModelNotFoundError) as unknown:
        client.jobs.create(model="nowhere", training_file=file.id, method=method)
    assert unknown.value.param == "model"
    wrong = {"type": "dar", "dar": {**method["dar"], "hyperparameters": {"beta": float("nan")}}}
    with pytest.raises(InvalidRequestError) as invalid:
        client.jobs.create(model="tiny", training_file=file.id, method=wrong)
    assert invalid.value.param == "method.dar.hyperparameters.beta"


def test_a_wrong_key_is_an_authentication_error(client: Client) -> None:
    with Client("dar-sk-wrong", client.base_url) as other, pytest.raises(AuthenticationError):
        other.jobs.list().page()


def test_jobs_are_filtered_by_label_and_status(client: Client, new_job: Callable[..., Job]) -> None:
    job = new_job(metadata={"team": "a b&c"})
    assert [found.id for found in client.jobs.list(metadata={"team": "a b&c"})] == [job.id]
    client.jobs.cancel(job.id)
    labels = {"team": "a b&c"}
    assert not list(client.jobs.list(metadata=labels, status="queued"))
    assert list(client.jobs.list(metadata=labels, status="cancelled"))


def test_a_job_is_paused_and_resumed(client: Client, new_job: Callable[..., Job]) -> None:
    job = new_job()
    for _ in range(2):
        assert client.jobs.pause(job.id).status == "paused"
    assert client.jobs.retrieve(job.id).actions == ["cancel", "resume"]
    for _ in range(2):
        assert client.jobs.resume(job.id).status == "queued"
    client.jobs.cancel(job.id)
    with pytest.raises(ConflictError):
        client.jobs.pause(job.id)
    assert client.jobs.resume(job.id).status == "queued"
    client.jobs.cancel(job.id)


def test_a_job_without_a_model_is_not_stopped(client: Client, new_job: Callable[..., Job]) -> None:
    job = new_job()
    assert not client.jobs.retrieve(job.id).is_stoppable
    with pytest.raises(ConflictError, match=r"no checkpoint yet.*cancel it"):
        client.jobs.stop(job.id)
    client.jobs.cancel(job.id)


def test_waiting_reports_changes_and_ends_with_the_job(
    client: Client, new_job: Callable[..., Job]
) -> None:
    job = new_job()
    seen: list[str] = []

    def note(job: Job) -> None:
        if not seen:
            client.jobs.cancel(job.id)
        seen.append(job.status)

    ended = client.jobs.wait(job.id, on_progress=note, poll_seconds=0.02)
    assert ended.status == "cancelled"
    assert seen == ["queued", "cancelled"]
    assert client.jobs.cancel(job.id).status == "cancelled"


def test_waiting_ends_in_time(client: Client, new_job: Callable[..., Job]) -> None:
    job = new_job()
    with pytest.raises(TimeoutError, match=f"{job.id} is queued: waiting for a worker"):
        client.jobs.wait(job.id, poll_seconds=0.01, timeout_seconds=0.05)
    client.jobs.cancel(job.id)


def test_waiting_ends_at_a_pause_that_only_the_user_can_end(
    client: Client, new_job: Callable[..., Job], caplog: pytest.LogCaptureFixture
) -> None:
    job = new_job()
    client.jobs.pause(job.id)
    paused = client.jobs.wait(job.id, poll_seconds=0.01, timeout_seconds=5)
    assert (paused.status, paused.status_detail) == ("paused", "by_user")
    shown = f"job {job.id} is paused (by_user): {paused.status_message}"
    assert caplog.messages == [shown]
    with pytest.raises(ConflictError, match=r"is paused \(by_user\): .* continues it") as raised:
        client.jobs.wait(job.id, on_pause="raise", poll_seconds=0.01, timeout_seconds=5)
    assert raised.value.error_code == "job_paused"
    with pytest.raises(TimeoutError, match=r"is paused \(by_user\): "):
        client.jobs.wait(job.id, on_pause="wait", poll_seconds=0.01, timeout_seconds=0.1)
    client.jobs.cancel(job.id)


def test_events_tell_the_history(client: Client, new_job: Callable[..., Job]) -> None:
    job = new_job()
    client.jobs.cancel(job.id)
    events = list(client.jobs.events(job.id, order="asc", limit=1))
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert len(events) >= 2


def test_a_file_in_use_is_not_deleted(client: Client, new_job: Callable[..., Job]) -> None:
    job = new_job()
    with pytest.raises(ConflictError):
        client.files.delete(job.training_file)
    client.jobs.cancel(job.id)


def test_models_are_listed(client: Client) -> None:
    assert "tiny" in [model.id for model in client.models.list()]
    assert client.models.retrieve("tiny").kind == "base"


def test_metrics_and_samples_of_a_job(client: Client, trained: Any) -> None:
    metrics = client.jobs.metrics(trained.job_id)
    assert metrics.series["dar/rewards_mean"].value == [0.5]
    assert metrics.series["dar/loss"].value == [None]
    assert not client.jobs.metrics(trained.job_id, after=metrics.cursor).series
    only = client.jobs.metrics(trained.job_id, names=["dar/loss"])
    assert list(only.series) == ["dar/loss"]
    samples = client.jobs.samples(trained.job_id, order="-reward", limit=2)
    assert [sample.reward for sample in samples] == [2.0, 1.0, 0.0]


def test_a_job_is_listed_with_its_checkpoints(client: Client, trained: Any) -> None:
    assert list(client.checkpoints.list(trained.job_id)) == [trained.checkpoint]


def test_how_the_rewards_of_a_job_came_is_told(client: Client, trained: Any) -> None:
    stats = client.jobs.reward_stats(trained.job_id)
    assert (stats.job_id, stats.errors) == (trained.job_id, 0)
    assert list(client.jobs.reward_failures(trained.job_id, step=1)) == []


def test_workers_are_listed_and_an_order_names_one(
    client: Client, prompts: bytes, method: dict[str, Any]
) -> None:
    assert all(worker.object == "worker" for worker in client.workers.list())
    for order in (client.workers.drain, client.workers.ban, client.workers.admit):
        with pytest.raises(NotFoundError, match="node 'here', slot '0'"):
            order("here", "0")
    file = client.files.create(prompts)
    job = client.jobs.create(model="tiny", training_file=file.id, method=method)
    assert (list(client.jobs.attempts(job.id)), job.failures) == ([], {})
