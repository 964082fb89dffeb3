"""A reward service that is down when a job starts makes it wait, visibly, and not fail."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.installation import Installation


@pytest.fixture
def without_reward_service(installation: Installation) -> Iterator[Any]:
    installation.end("reward")
    yield installation
    if "reward" not in installation.processes:
        installation.start_reward_service()


@pytest.mark.slow  # two trainers are started, one that finds no reward service and one that does
def test_a_job_waits_for_its_reward_service_and_goes_on_when_it_comes_up(
    without_reward_service: Any, reviews_base: Path, until: Callable[..., Any]
) -> None:
    installation = without_reward_service
    client = installation.client
    file_id = client.files.create(reviews_base / "prompts.jsonl").id
    spec = installation.spec(file_id, hyperparameters={"max_steps": 3})
    job_id = client.jobs.create(**spec).id

    def waits() -> Any:
        job = client.jobs.retrieve(job_id)
        assert job.status in {"queued", "running"}, job.error
        return job if job.status == "queued" and job.status_detail == "waiting_for_reward" else None

    job = until(waits, 60, "the job gives its slot back and waits")
    assert installation.reward_url in job.status_message
    installation.start_reward_service()
    done = installation.until_done(job_id)
    assert done.status == "succeeded"
    assert client.jobs.metrics(job_id).series["dar/rewards_mean"].step == [1, 2, 3]
