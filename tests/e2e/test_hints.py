"""A job whose settings do not fit its rewards says so in its events, once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar.protocol.hints import HINTS
from fakes.installation import Installation


@pytest.mark.slow  # a whole job is trained, by two trainers
def test_a_job_names_the_alpha_and_beta_that_fit_once_although_it_is_paused(
    installation: Installation, reviews_base: Path, until: Callable[..., Any]
) -> None:
    client = installation.client
    file_id = client.files.create(reviews_base / "prompts.jsonl").id
    settings = {"max_steps": 400, "alpha": 20.0, "beta": 30.0}
    job_id = client.jobs.create(**installation.spec(file_id, hyperparameters=settings)).id
    installation.until_step(job_id, HINTS.advantages_steps + 2)
    client.jobs.pause(job_id)
    paused = until(
        lambda: (job := client.jobs.retrieve(job_id)).status == "paused" and job, 60, "it pauses"
    )
    client.jobs.resume(job_id)
    installation.until_step(job_id, paused.progress.step + HINTS.advantages_steps + 2)
    hints = [
        event
        for event in client.jobs.events(job_id, limit=100)
        if event.data.get("kind") in {"small_advantages", "clipped_weights"}
    ]
    client.jobs.cancel(job_id)
    (hint,) = hints
    assert (hint.level, hint.data["step"]) == ("warn", HINTS.advantages_steps)
    assert hint.data["fitting_alpha_plus_beta"] == pytest.approx(hint.data["advantage_std"], rel=1)
    assert "std(reward) is " in hint.message
    assert "the learning rate is " in hint.message
