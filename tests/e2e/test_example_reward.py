"""A job whose reward is an example's, started as its guide says."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar.processes import answers
from fakes.installation import Installation

EXAMPLE = Path(__file__).parents[2] / "examples" / "lexicon_reward.py"


@pytest.mark.slow  # a whole job is trained
def test_a_job_is_trained_towards_an_examples_reward(
    installation: Installation,
    free_port: Callable[[], int],
    reviews_base: Path,
    until: Callable[..., Any],
    tmp_path: Path,
) -> None:
    port = free_port()
    lexicon = {
        "the": 1.0,
        "was": -1.0,
        "and": 0.5,
        "i": -2.0,
    }  # what a model writes that is hardly trained
    words = tmp_path / "words.txt"
    words.write_text("".join(f"{word} {weight}\n" for word, weight in lexicon.items()))
    secret = str(installation.home / "reward_secret")
    options = ["--port", str(port), "--lexicon", str(words), "--secret-file", secret]
    installation.start("lexicon", str(EXAMPLE), *options)
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
    assert job.status == "succeeded", job.error
    expected = runpy.run_path(str(EXAMPLE))["lexicon_reward"](lexicon)
    rewards = [sample.reward for sample in samples]
    assert any(rewards)
    assert rewards == pytest.approx(expected([sample.completion for sample in samples]))
