"""The unmodified ``openai`` client drives the service, and the test is the worker.

tests/e2e does the same with a worker that trains.
"""

from collections.abc import Iterator

import openai
import pytest

from fakes.live_service import Live

ROWS = b'{"prompt": "hi"}\n{"prompt": "ho"}\n'


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        api_key=live.key("api_key"), base_url=f"{live.url}/v1", max_retries=0
    ) as client:
        yield client


def test_a_job_is_submitted_followed_to_its_end_and_found_again(
    live: Live, client: openai.OpenAI
) -> None:
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    assert (file.purpose, file.status) == ("fine-tune", "processed")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == ROWS
    assert file.id in [listed.id for listed in client.files.list(limit=1)]

    jobs = client.fine_tuning.jobs
    made = jobs.create(**live.spec(training_file=file.id), metadata={"team": "a b"})
    assert made.status == "queued"
    lease = live.claim()
    assert lease is not None
    checkpoint_id = ""
    for step in (1, 2, 3, 4):
        lease.say({"type": "metrics", "step": step, "values": {"dar/loss": 1 / step}})
        if step % 2 == 0:
            checkpoint_id = lease.checkpoint(step)
    ended = lease.post("/complete", last_seq=4, checkpoint_id=checkpoint_id)
    assert ended.status_code == 200, ended.text

    job = jobs.retrieve(made.id)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.finished_at is not None
    assert job.fine_tuned_model in [model.id for model in client.models.list()]
    assert job.method is not None
    assert job.method.type == "dar"
    assert made.id in [listed.id for listed in jobs.list(limit=1)]
    assert [listed.id for listed in jobs.list(metadata={"team": "a b"})] == [made.id]
    assert not list(jobs.list(metadata={"team": "b"}))
    events = list(jobs.list_events(made.id, limit=3))
    assert [event.seq for event in events] == list(range(len(events), 0, -1))  # type: ignore[attr-defined] # an extra field of ours
    steps = [event.data["step"] for event in events if event.type == "metrics"]  # type: ignore[index] # metrics events carry data
    assert sorted(steps) == [1, 2, 3, 4]
    checkpoints = list(jobs.checkpoints.list(made.id, limit=1))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [4, 2]
    assert all(checkpoint.fine_tuning_job_id == made.id for checkpoint in checkpoints)


def test_a_running_job_is_paused_resumed_and_cancelled(live: Live, client: openai.OpenAI) -> None:
    jobs = client.fine_tuning.jobs
    job_id, lease = live.running()
    for _ in range(2):
        assert jobs.pause(job_id).status == "pausing"
    lease.post("/release", reason="paused")
    assert jobs.pause(job_id).status == "paused"
    for _ in range(2):
        assert jobs.resume(job_id).status == "queued"
    lease = live.claim()
    assert lease is not None
    assert jobs.cancel(job_id).status == "running"
    lease.post("/release", reason="cancelled")
    assert jobs.retrieve(job_id).status == "cancelled"
    assert jobs.cancel(job_id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        jobs.pause(job_id)


def test_a_bad_spec_and_a_wrong_key_are_the_clients_own_errors(
    live: Live, client: openai.OpenAI
) -> None:
    spec = live.spec(dar={"hyperparameters": {"alpha": -1, "max_steps": 4}})
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(**spec)
    assert caught.value.param == "method.dar.hyperparameters.alpha"
    assert caught.value.request_id is not None
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="dar-sk-wrong").models.list()
