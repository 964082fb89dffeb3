"""What is said of a job before and while it runs, against the job as it was."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from fakes.installation import Installation, eventually

SLACK = 4.0
"""Other work on the machine changes the time of a step; alone, it is within a factor of 2."""


@pytest.mark.slow  # whole jobs are trained
def test_the_first_estimate_of_a_job_is_near_what_it_takes(
    installation: Installation, reviews_base: Path
) -> None:
    client = installation.client
    file_id = client.files.create(reviews_base / "prompts.jsonl").id
    settings = {"alpha": 0.1, "beta": 0.3, "max_steps": 40}
    spec = installation.spec(file_id, hyperparameters=settings)
    job_id = client.jobs.create(**spec).id
    job = eventually(
        lambda: (found := client.jobs.retrieve(job_id)).estimated_finish and found, 90, "a step"
    )
    seen = datetime.now(UTC).timestamp()
    assert job.progress.step < job.progress.total_steps / 3
    done = installation.until_done(job_id)
    assert done.status == "succeeded", done.error
    real = datetime.now(UTC).timestamp() - seen
    assert real / SLACK < job.estimated_finish - seen < real * SLACK, (job.progress.step, real)

    report = client.jobs.validate(spec)
    assert report.allowed_to_proceed, report.problems
    assert report.estimate is not None
    assert report.estimate.seconds is not None
    steps_left = job.progress.total_steps - job.progress.step
    all_steps = real * job.progress.total_steps / steps_left
    assert all_steps / SLACK < report.estimate.seconds < all_steps * SLACK, (
        all_steps,
        report.estimate,
    )
    assert done.usage is not None
    assert report.estimate.reward_calls is not None
    calls = done.usage.reward_calls
    assert calls / 2 <= report.estimate.reward_calls <= calls * 2, (calls, report.estimate)
    assert report.memory.fits is not False
