"""Reward code that was written for other trainers scores a job as it is: a server of OpenRLHF's
contract, and functions of TRL's.

The test is slow because it trains a whole job, and a trainer spends some six CPU seconds on
importing torch.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dar.rewards.server import reward_server
from fakes import loopback
from fakes.installation import Installation

STEPS, GROUPS, K = 2, 3, 4


# --- what their authors wrote ---------------------------------------------------------------------


def openrlhf_style(_: Mapping[str, str], body: bytes) -> tuple[int, Any]:
    """A remote reward model: POST of query, prompts and labels, an answer with as many rewards."""
    data = json.loads(body)
    assert set(data) == {"query", "prompts", "labels"}
    rewards = []
    for query, prompt, label in zip(data["query"], data["prompts"], data["labels"], strict=True):
        assert query.startswith(prompt)
        rewards.append(float(query[len(prompt) :].count(label or "e")))
    return 200, {"rewards": rewards}


def short(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """A reward function of TRL."""
    return [-float(len(completion)) for completion in completions]


def as_labelled(
    completions: list[str], ground_truth: list[str], **kwargs: Any
) -> list[float | None]:
    """A reward function of TRL with a column of the data set; None where it does not apply."""
    return [
        None if truth is None else float(completion.startswith(truth))
        for completion, truth in zip(completions, ground_truth, strict=True)
    ]


def trl_style(_: Mapping[str, str], body: bytes) -> tuple[int, Any]:
    """A server around that function, from before there was a protocol of ours: keyword arguments
    in, a list out.
    """
    return 200, as_labelled(**json.loads(body))


# --- the job --------------------------------------------------------------------------------------


@pytest.fixture
def decorated(installation: Installation) -> Iterator[str]:
    """`short`, made a reward service by the decorator."""
    app = reward_server(secret_file=installation.home / "reward_secret")(short)
    with loopback.serving(app) as url:
        yield f"{url}/score"


@pytest.mark.slow  # whole jobs are trained
@pytest.mark.timeout(180)
def test_rewards_of_openrlhf_and_trl_score_a_job_unchanged(
    installation: Installation,
    reviews_base: Path,
    serve: Callable[..., str],
    decorated: str,
    tmp_path: Path,
) -> None:
    client = installation.client
    rows = [json.loads(line) for line in (reviews_base / "prompts.jsonl").read_text().splitlines()]
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text(
        "".join(
            json.dumps({"prompt": row["prompt"], "ground_truth": "aeiou"[number % 5]}) + "\n"
            for number, row in enumerate(rows)
        )
    )
    truths = {row["prompt"]: "aeiou"[number % 5] for number, row in enumerate(rows)}
    components = [
        {"name": "vowels", "url": serve(openrlhf_style), "protocol": "openrlhf"},
        {"name": "short", "url": decorated, "weight": 0.1},
        {"name": "begins", "url": serve(trl_style), "protocol": "trl", "weight": 2.0},
    ]
    spec = installation.spec(
        client.files.create(labelled).id,
        hyperparameters={"max_steps": STEPS, "batch_size": GROUPS},
        rewards={"components": components},
    )
    job = installation.until_done(client.jobs.create(**spec).id)
    assert (job.status, job.error) == ("succeeded", None)
    samples = list(client.jobs.samples(job.id, limit=100))
    assert len(samples) == STEPS * GROUPS * K
    for sample in samples:
        truth, text = truths[sample.prompt], sample.completion
        expected = {
            "vowels": float(text.count(truth)),
            "short": -float(len(text)),
            "begins": float(text.startswith(truth)),
        }
        assert sample.components == expected
        assert sample.reward == pytest.approx(
            expected["vowels"] + 0.1 * expected["short"] + 2 * expected["begins"]
        )
    stats = client.jobs.reward_stats(job.id)
    assert (stats.rewards, stats.skips, stats.errors) == (STEPS * GROUPS * K, 0, 0)
