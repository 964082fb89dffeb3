"""The unmodified ``openai`` client drives the service, against a live server and a live worker."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from fakes.installation import Installation

pytestmark = pytest.mark.slow  # a whole installation trains jobs; tests/api has the client alone


@pytest.fixture(scope="module")
def client(installation: Installation) -> Iterator[openai.OpenAI]:
    key = (installation.home / "api_key").read_text().strip()
    with openai.OpenAI(api_key=key, base_url=f"{installation.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def file_id(client: openai.OpenAI, reviews_base: Path) -> str:
    with (reviews_base / "prompts.jsonl").open("rb") as file:
        return client.files.create(file=file, purpose="fine-tune").id


@pytest.fixture(scope="module")
def finished(installation: Installation, client: openai.OpenAI, file_id: str) -> str:
    """Id of a job that the client submitted and that ran to its end."""
    spec = installation.spec(
        file_id, hyperparameters={"max_steps": 6}, checkpointing={"every_steps": 3}
    )
    job = client.fine_tuning.jobs.create(**spec, metadata={"team": "a b"})
    assert job.status in {"queued", "running"}
    assert installation.until_done(job.id).status == "succeeded"
    return job.id


def test_a_file_is_uploaded_and_comes_back(
    client: openai.OpenAI, file_id: str, reviews_base: Path
) -> None:
    file = client.files.retrieve(file_id)
    assert file.purpose == "fine-tune"
    assert file.status == "processed"
    assert client.files.content(file_id).read() == (reviews_base / "prompts.jsonl").read_bytes()
    assert file_id in [listed.id for listed in client.files.list(limit=1)]


def test_a_job_runs_to_its_end(client: openai.OpenAI, finished: str) -> None:
    job = client.fine_tuning.jobs.retrieve(finished)
    assert job.status == "succeeded"
    assert job.finished_at is not None
    assert job.error is None
    assert job.fine_tuned_model is not None
    assert job.fine_tuned_model in [model.id for model in client.models.list()]
    assert job.method is not None
    assert job.method.type == "dar"


def test_a_job_without_rewards_trains_on_what_its_file_holds(
    installation: Installation, client: openai.OpenAI
) -> None:
    rows = [
        {
            "prompt": "The soup was",
            "completions": [" good.", " bad.", " hot."],
            "rewards": [1, 0, None],
        },
        {"prompt": "The film was", "completions": [" fun.", " dull."], "rewards": [1, 0]},
    ]
    content = "\n".join(map(json.dumps, rows)).encode()
    file_id = client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id
    hyperparameters = {"max_steps": None, "n_epochs": 4, "batch_size": 4}
    spec = installation.spec(file_id, hyperparameters=hyperparameters, rewards=None, sampling={})
    job = client.fine_tuning.jobs.create(**spec)
    assert installation.until_done(job.id).status == "succeeded"
    series = installation.client.jobs.metrics(job.id).series
    assert series["dar/loss"].step == [1, 2, 3, 4]  # no step takes a row twice
    assert series["rewards/missing_fraction"].value == pytest.approx([0.2] * 4)
    samples = list(installation.client.jobs.samples(job.id))
    assert {sample.completion for sample in samples} >= {" good.", " dull."}


def test_a_job_is_evaluated_on_its_validation_file(
    installation: Installation, client: openai.OpenAI
) -> None:
    def upload(prompts: list[str]) -> str:
        content = "\n".join(json.dumps({"prompt": prompt}) for prompt in prompts).encode()
        return client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id

    spec = installation.spec(
        upload(["The soup was", "The film was"]),
        hyperparameters={"max_steps": 3, "batch_size": 2},
        evaluation={"every_steps": 2, "max_prompts": 2},
    )
    validation = upload(["The room was", "The tea was", "The bus was"])
    job = client.fine_tuning.jobs.create(**spec | {"validation_file": validation})
    assert installation.until_done(job.id).status == "succeeded"
    series = installation.client.jobs.metrics(job.id).series
    rewards = series["eval_dar/rewards_mean"]
    assert rewards.step == [2, 3]  # every second step, and the last one
    assert all(0 < value < 1 for value in rewards.value)
    assert series["eval_rewards/letters/mean"].value == pytest.approx(rewards.value)
    assert series["dar/rewards_mean"].step == [1, 2, 3]


def test_jobs_are_listed_and_filtered_by_metadata(client: openai.OpenAI, finished: str) -> None:
    assert finished in [job.id for job in client.fine_tuning.jobs.list(limit=1)]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"team": "a b"})] == [finished]
    assert not list(client.fine_tuning.jobs.list(metadata={"team": "b"}))


def test_events_tell_the_whole_story_newest_first(client: openai.OpenAI, finished: str) -> None:
    events = list(client.fine_tuning.jobs.list_events(finished, limit=3))
    seqs = [event.seq for event in events]  # type: ignore[attr-defined] # an extra field of ours
    assert seqs == sorted(set(seqs), reverse=True)
    steps = [event.data["step"] for event in events if event.type == "metrics"]  # type: ignore[index] # metrics events carry data
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]


def test_checkpoints_are_listed_newest_first(client: openai.OpenAI, finished: str) -> None:
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(finished, limit=1))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [6, 3]
    assert all(checkpoint.fine_tuning_job_id == finished for checkpoint in checkpoints)


def test_a_running_job_is_cancelled(
    installation: Installation, client: openai.OpenAI, file_id: str, until: Callable[..., Any]
) -> None:
    spec = installation.spec(file_id, hyperparameters={"max_steps": 100_000})
    job = client.fine_tuning.jobs.create(**spec)
    installation.until_step(job.id, 1)
    client.fine_tuning.jobs.cancel(job.id)
    until(
        lambda: client.fine_tuning.jobs.retrieve(job.id).status == "cancelled",
        10,
        "the job is cancelled",
    )
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_a_running_job_is_paused_and_resumed(
    installation: Installation, client: openai.OpenAI, file_id: str, until: Callable[..., Any]
) -> None:
    spec = installation.spec(file_id, hyperparameters={"max_steps": 100_000})
    job_id = client.fine_tuning.jobs.create(**spec).id
    installation.until_step(job_id, 1)
    for _ in range(2):
        assert client.fine_tuning.jobs.pause(job_id).status in {"pausing", "paused"}
    until(
        lambda: client.fine_tuning.jobs.retrieve(job_id).status == "paused",
        20,
        "the job is paused",
    )
    assert client.fine_tuning.jobs.pause(job_id).status == "paused"
    for _ in range(2):
        assert client.fine_tuning.jobs.resume(job_id).status in {"queued", "running"}
    client.fine_tuning.jobs.cancel(job_id)
    until(
        lambda: client.fine_tuning.jobs.retrieve(job_id).status == "cancelled",
        20,
        "the job is cancelled",
    )
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.pause(job_id)


def test_a_bad_spec_is_a_bad_request_that_names_the_field(
    installation: Installation, client: openai.OpenAI, file_id: str
) -> None:
    spec = installation.spec(file_id, hyperparameters={"alpha": -1})
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(**spec)
    assert caught.value.param == "method.dar.hyperparameters.alpha"
    assert caught.value.request_id is not None


def test_a_wrong_key_is_refused(installation: Installation) -> None:
    with (
        openai.OpenAI(
            api_key="dar-sk-wrong", base_url=f"{installation.url}/v1", max_retries=0
        ) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
