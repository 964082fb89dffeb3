"""A job whose reward is an example's, started as its guide says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar.cli.up import answers

EXAMPLE = Path(__file__).parents[2] / "examples" / "lexicon_reward.py"


@pytest.mark.slow  # a whole job is trained
def test_a_job_is_trained_towards_an_examples_reward(
    installation: Any, free_port: Callable[[], int], reviews_base: Path, until: Callable[..., Any]
) -> None:
    port = free_port()
    secret_file = str(installation.home / "reward_secret")
    installation.start("lexicon", str(EXAMPLE), "--port", str(port), "--secret-file", secret_file)
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/healthz"), 60, "the example is ready")
        file_id = installation.client.files.create(reviews_base / "prompts.jsonl").id
        component = {"name": "lexicon", "url": f"http://127.0.0.1:{port}/score"}
        spec = installation.spec(
            file_id, hyperparameters={"max_steps": 2}, rewards={"components": [component]}
        )
        job = installation.until_done(installation.client.jobs.create(**spec).id)
        samples = list(installation.client.jobs.samples(job.id, step=2))
    finally:
        installation.end("lexicon")
    assert (job.status, len(samples)) == ("succeeded", 24)
    assert all(-1 < sample.reward < 1 for sample in samples)
