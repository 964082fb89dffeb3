"""A reward service that refuses requests in the middle of a job: what is too large is halved,
everything else pauses the job at once.

The test is slow because the pause ends a real trainer, and the next one spends some six CPU seconds
on importing torch.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dar.protocol.jobs import Job
from fakes.installation import Installation

REFUSED, STEPS, GROUPS, K = 2, 3, 6, 4
CONCURRENCY = 2
MOST_SAMPLES = 4
"""What the service takes at once."""


class Picky:
    """Takes small requests alone, and is gone from one step on until it is mended."""

    def __init__(self) -> None:
        self.is_gone = True
        self.answered: list[tuple[int, int, int]] = []
        """Step, samples and status of each answer."""
        self.lock = threading.Lock()

    def __call__(self, _: Mapping[str, str], body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        samples = asked["samples"]
        step, count = asked["step"], len(samples)
        status = 413 if count > MOST_SAMPLES else 200
        if step == REFUSED and self.is_gone:
            status = 410
        with self.lock:
            self.answered.append((step, count, status))
        if status != 200:
            return status, {"detail": "not like this"}
        assert len({sample["group_id"] for sample in samples}) == 1
        rewards = [sample["completion"].count("e") for sample in samples]
        return 200, {"request_id": asked["request_id"], "rewards": rewards}


@pytest.mark.slow  # whole jobs are trained
@pytest.mark.timeout(240)
def test_a_service_that_is_gone_pauses_the_job_and_what_was_learned_about_sizes_outlives_that(
    installation: Installation,
    reviews_base: Path,
    serve: Callable[..., str],
    until: Callable[..., Any],
) -> None:
    client = installation.client
    service = Picky()
    component = {
        "name": "letters",
        "url": serve(service),
        "batch": {"max_samples": 16},
        "limits": {"concurrency": CONCURRENCY},
    }
    spec = installation.spec(
        client.files.create(reviews_base / "prompts.jsonl").id,
        hyperparameters={"max_steps": STEPS, "batch_size": GROUPS},
        rewards={"components": [component]},
    )
    job_id = client.jobs.create(**spec, skip_validation=True).id

    def paused() -> Job | None:
        job: Job = client.jobs.retrieve(job_id)
        assert job.status in {"queued", "running", "paused"}, job.error
        return job if job.status == "paused" else None

    job = until(paused, 60, "HTTP 410 pauses the job")
    assert (job.status_detail, job.error.code) == ("reward", "http_410")
    assert "not like this" in job.status_message
    assert next(iter(client.checkpoints.list(job_id))).step_number == REFUSED - 1
    time.sleep(1.2)  # twice what the service takes to look after paused jobs
    assert paused(), "a refusal does not pass by itself"
    before = len(service.answered)
    gone = [status for _, _, status in service.answered].count(410)
    assert 1 <= gone <= CONCURRENCY, "there was no storm of retries"
    service.is_gone = False
    client.jobs.resume(job_id)
    done = installation.until_done(job_id)
    assert (done.status, done.error) == ("succeeded", None)
    series = client.jobs.metrics(job_id).series
    assert series["dar/loss"].step == list(range(1, STEPS + 1))
    stats = client.jobs.reward_stats(job_id)
    assert (stats.rewards, stats.errors) == (STEPS * GROUPS * K, 0)
    first, later = service.answered[:before], service.answered[before:]
    assert {status for _, _, status in first} == {200, 410, 413}
    assert {count for step, count, _ in first if step == REFUSED} == {MOST_SAMPLES}
    assert {answer[1:] for answer in later} == {(MOST_SAMPLES, 200)}, "the limit is remembered"
