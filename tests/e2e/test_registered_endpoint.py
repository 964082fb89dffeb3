"""A job with a registered reward endpoint: its secret signs, its header is sent, and neither stays
anywhere.
"""

import base64
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dar.rewards.http.signing import decode_secret, verify
from fakes.installation import Installation
from fakes.reward_server import RewardServer, ScoreRequest


class Judge:
    """A reward service that gives out rewards to those alone who show its secrets."""

    def __init__(self) -> None:
        self.url = ""
        self.secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
        self.token = f"Bearer {secrets.token_hex(16)}"
        self.accepted = 0
        self.steps: list[int] = []
        """Of the requests that were accepted."""
        self.changes_at: int | None = None
        """Step from which on other secrets are asked for."""
        self.refused: list[str] = []

    def change_secrets(self) -> None:
        self.changes_at = None
        self.token = f"Bearer {secrets.token_hex(16)}"

    def __call__(self, request: ScoreRequest) -> None:
        status, answer = self.answer(request.headers, request.body)
        request.json(answer, status)

    def answer(self, headers: dict[str, str], body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        if self.changes_at is not None and asked["step"] >= self.changes_at:
            self.change_secrets()
        try:
            verify([decode_secret(self.secret)], headers, body)
            assert headers.get("authorization") == self.token
        except Exception as error:  # noqa: BLE001 - whatever is wrong, the test shows it
            # The question whether a paused job can go on may come at any time.
            if asked["mode"] == "train":
                self.refused.append(repr(error))
            return 401, {"seen": headers.get("authorization")}
        self.accepted += 1
        self.steps.append(asked["step"])
        rewards = [float(sample["completion"].count("e")) for sample in asked["samples"]]
        return 200, {"request_id": asked["request_id"], "rewards": rewards}


@pytest.fixture
def judge() -> Iterator[Judge]:
    made = Judge()
    with RewardServer(made) as server:
        made.url = server.url
        yield made


@pytest.mark.slow  # a whole job is trained
def test_a_job_is_scored_with_the_secrets_of_its_endpoint_and_they_stay_nowhere(
    installation: Installation, judge: Judge, reviews_base: Path
) -> None:
    client = installation.client
    endpoint = client.reward_endpoints.create(
        "judge", judge.url, headers={"authorization": judge.token}, signing_secret=judge.secret
    )
    file_id = client.files.create(reviews_base / "prompts.jsonl").id
    rewards = {"components": [{"name": "letters", "endpoint": endpoint.id}]}
    spec = installation.spec(file_id, hyperparameters={"max_steps": 2}, rewards=rewards)
    job = installation.until_done(client.jobs.create(**spec).id)
    assert (job.status, judge.refused) == ("succeeded", [])
    assert judge.accepted >= 2
    assert client.reward_endpoints.stats(endpoint.id).jobs == {"succeeded": 1}
    hidden = [judge.secret.removeprefix("whsec_"), judge.token.split()[1]]
    assert installation.files_with_secrets(hidden) == []


@pytest.mark.slow  # three trainers are started: two for the refused job, one for another
@pytest.mark.timeout(240)
def test_a_job_whose_secrets_are_refused_waits_until_its_user_has_stored_the_new_ones(
    installation: Installation, judge: Judge, reviews_base: Path, until: Callable[..., Any]
) -> None:
    client = installation.client
    old = [judge.secret, judge.token]
    endpoint = client.reward_endpoints.create(
        "judge", judge.url, headers={"authorization": judge.token}, signing_secret=judge.secret
    )
    file_id = client.files.create(reviews_base / "prompts.jsonl").id
    component = {"name": "letters", "endpoint": endpoint.id, "batch": {"max_samples": 256}}
    changes = {"hyperparameters": {"max_steps": 4}, "rewards": {"components": [component]}}
    judge.changes_at = 3
    job_id = client.jobs.create(**installation.spec(file_id, **changes)).id

    def paused() -> Any:
        job = client.jobs.retrieve(job_id)
        assert job.status in {"queued", "running", "paused"}, job.error
        return job if job.status == "paused" else None

    job = until(paused, 60, "the refusal pauses the job")
    assert (job.status_detail, job.error.code) == ("reward", "http_401")
    assert next(iter(client.checkpoints.list(job_id))).step_number == 2
    assert len(judge.refused) <= 2, "a refusal is not tried again"
    other = client.jobs.create(**installation.spec(file_id, hyperparameters={"max_steps": 2})).id
    assert installation.until_done(other).status == "succeeded", "the only slot is free"
    assert paused()

    judge.secret = client.reward_endpoints.rotate_secret(
        endpoint.id, keep_old_secret_active_for_24_hours=False
    ).signing_secret
    client.reward_endpoints.update(endpoint.id, headers={"authorization": judge.token})
    refused = len(judge.refused)
    client.jobs.resume(job_id)
    assert installation.until_done(job_id).status == "succeeded"
    assert len(judge.refused) == refused
    assert set(judge.steps) >= {1, 2, 3, 4}
    assert client.jobs.metrics(job_id).series["dar/loss"].step == [1, 2, 3, 4]
    stats = client.jobs.reward_stats(job_id)
    assert (stats.rewards, stats.errors) == (4 * 24, 0)
    hidden = [
        text.removeprefix("whsec_").removeprefix("Bearer ")
        for text in (*old, judge.secret, judge.token)
    ]
    assert installation.files_with_secrets(hidden) == []
