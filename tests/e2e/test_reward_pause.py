"""A reward service that goes away or refuses in mid-training pauses the job and frees its slot.

Nothing is lost, nothing made up.

The tests are slow because each starts real trainers, and a trainer spends some six CPU seconds on
importing torch.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from dar.protocol.jobs import Job
from fakes.installation import Installation
from fakes.reward_server import RewardServer, ScoreRequest

STEPS = 8
OUTAGE = 5
"""Step whose rewards meet the outage."""


class RewardService:
    """Scores as the installation's does, refuses when the test says so, and goes down altogether at
    a step.
    """

    def __init__(self) -> None:
        self.status = 200
        self.refuses_from: tuple[int, int] | None = None
        """Step from which on the status turns to another, and that one; once."""
        self.goes_down_at: int | None = None
        """Step at whose first request the service says 503, and is gone."""
        self.trained: list[int] = []
        """Status of each answer to a trainer."""
        self.probed = 0
        self._server = RewardServer(self)
        self.url = self._server.url
        self.come_back, self.close = self._server.come_back, self._server.close

    def __call__(self, request: ScoreRequest) -> None:
        status, answer = self.answer(request.content)
        if self.goes_down_at is not None and request.content["step"] >= self.goes_down_at:
            self.goes_down_at = None
            self._server.go_down()  # from now on connections are refused
            status = 503
        request.json(answer, status)

    def answer(self, asked: Any) -> tuple[int, Any]:
        if self.refuses_from is not None and asked["step"] >= self.refuses_from[0]:
            self.status, self.refuses_from = self.refuses_from[1], None
        if asked["mode"] == "validate":
            self.probed += 1
        else:
            self.trained.append(self.status)
        if self.status != 200:
            return self.status, {"detail": "who are you?"}
        texts = [sample["completion"] for sample in asked["samples"]]
        rewards = [text.count("e") / max(1, len(text)) for text in texts]
        return 200, {"request_id": asked["request_id"], "rewards": rewards}


@pytest.fixture
def service() -> Iterator[RewardService]:
    service = RewardService()
    yield service
    service.close()


@pytest.fixture(scope="module")
def file_id(installation: Installation, reviews_base: Path) -> str:
    return str(installation.client.files.create(reviews_base / "prompts.jsonl").id)


@pytest.fixture
def submit(installation: Installation, file_id: str, service: RewardService) -> Callable[..., str]:
    """Submits a job against the test's own reward service, which is given up soon."""
    component = {
        "name": "letters",
        "batch": {"max_samples": 256},
        "retry": {"attempts": 2, "base": 0.05},
    }

    def send(steps: int = STEPS, url: str = service.url, **failure: Any) -> str:
        rewards = {"components": [{**component, "url": url}], "failure": failure}
        spec = installation.spec(
            file_id,
            hyperparameters={"max_steps": steps},
            rewards=rewards,
            checkpointing={"every_steps": 3, "keep_last": 3},
        )
        return str(installation.client.jobs.create(**spec).id)

    return send


def weights(installation: Installation, job_id: str, folder: Path) -> Any:
    client = installation.client
    checkpoint = next(iter(client.checkpoints.list(job_id)))
    assert checkpoint.step_number == STEPS
    client.checkpoints.download(job_id, checkpoint.id, folder, include_optimizer=True)
    return {
        name: load_file(folder / name)
        for name in ("model.safetensors", "resume/optimizer.safetensors")
    }


def paused(installation: Installation, job_id: str, until: Callable[..., Any]) -> Job:
    def look() -> Any:
        job = installation.client.jobs.retrieve(job_id)
        assert job.status in {"queued", "running", "paused"}, job
        return job if job.status == "paused" else None

    job: Job = until(look, 60, "the job is paused")
    return job


@pytest.mark.slow  # whole jobs are trained
@pytest.mark.timeout(240)
def test_an_outage_pauses_the_job_until_the_service_is_back_and_changes_nothing(
    installation: Installation,
    submit: Callable[..., str],
    service: RewardService,
    until: Callable[..., Any],
    tmp_path: Path,
) -> None:
    client = installation.client
    service.goes_down_at = OUTAGE
    job_id = submit()
    job = paused(installation, job_id, until)
    assert (job.status_detail, job.error and job.error.code) == ("reward", "reward_unavailable")
    assert service.url in job.status_message
    assert job.actions == ["cancel", "resume"]
    checkpoint = next(iter(client.checkpoints.list(job_id)))
    assert checkpoint.step_number == OUTAGE - 1, "the last whole step is kept"
    undisturbed = submit(url=installation.reward_url)
    assert installation.until_done(undisturbed).status == "succeeded", "the slot is free"
    assert client.jobs.retrieve(job_id).status == "paused"
    probed = service.probed
    service.come_back()
    assert installation.until_done(job_id).status == "succeeded", "nobody had to resume it"
    assert service.probed > probed
    first, second = (weights(installation, one, tmp_path / one) for one in (undisturbed, job_id))
    for name, tensors in first.items():
        assert tensors.keys() == second[name].keys()
        assert all((tensors[key] == second[name][key]).all() for key in tensors), name
    assert client.jobs.metrics(job_id).series["dar/loss"].step == list(range(1, STEPS + 1))
    failures = client.jobs.reward_failures(job_id, step=OUTAGE)
    assert {(failure.code, failure.attempts) for failure in failures} == {("connect", 2)}
    stats = client.jobs.reward_stats(job_id)
    assert (stats.rewards, stats.errors) == (STEPS * 24, 0)
    events = client.jobs.events(job_id, rewound=True)
    kinds = [event.data.get("kind") for event in events if event.data]
    assert kinds.count("reward_error") == 2, "one of the 503, one of the refused connection"


@pytest.mark.slow  # whole jobs are trained
@pytest.mark.timeout(240)
def test_a_refusal_pauses_at_once_and_the_user_resumes_when_it_is_mended(
    installation: Installation,
    submit: Callable[..., str],
    service: RewardService,
    until: Callable[..., Any],
) -> None:
    service.refuses_from = (2, 404)
    job_id = submit(steps=3)
    job = paused(installation, job_id, until)
    assert (job.status_detail, job.error and job.error.code) == ("reward", "http_404")
    assert "who are you?" in job.status_message
    probed = service.probed
    time.sleep(1.5)
    assert service.trained == [200, 404], "a refusal is not tried again"
    assert service.probed == probed, "nobody asks for what only the user can mend"
    service.status = 200
    assert installation.client.jobs.resume(job_id).status in {"queued", "running"}
    done = installation.until_done(job_id)
    assert (done.status, done.error) == ("succeeded", None)
    assert service.trained[2:] == [200, 200], "no step is scored again"


@pytest.mark.slow  # whole jobs are trained
@pytest.mark.timeout(120)
def test_a_refusal_fails_the_job_where_its_spec_says_so(
    installation: Installation, submit: Callable[..., str], service: RewardService
) -> None:
    service.refuses_from = (2, 403)
    job = installation.until_done(submit(steps=3, on_budget="fail"))
    assert (job.status, job.error.code) == ("failed", "http_403")
    assert service.trained == [200, 403]


@pytest.mark.slow  # whole jobs are trained
@pytest.mark.timeout(240)
def test_a_running_job_is_paused_with_a_checkpoint_and_resumed(
    installation: Installation,
    submit: Callable[..., str],
    until: Callable[..., Any],
    tmp_path: Path,
) -> None:
    client = installation.client
    job_id = submit(steps=100_000)
    installation.until_step(job_id, 3)  # which is under way: two are done
    assert client.jobs.pause(job_id).status in {"pausing", "paused"}
    job = paused_by_user(installation, job_id, until)
    checkpoint = next(iter(client.checkpoints.list(job_id)))
    assert min(checkpoint.step_number, job.progress.step) >= 2
    assert checkpoint.step_number >= job.progress.step - 1
    assert client.jobs.resume(job_id).status == "queued"
    installation.until_step(job_id, checkpoint.step_number + 1)
    assert client.jobs.metrics(job_id).series["dar/loss"].step[: checkpoint.step_number] == list(
        range(1, checkpoint.step_number + 1)
    )
    client.jobs.cancel(job_id)
    until(lambda: client.jobs.retrieve(job_id).status == "cancelled", 20, "it is cancelled")


def paused_by_user(installation: Installation, job_id: str, until: Callable[..., Any]) -> Job:
    job: Job = until(
        lambda: (j := installation.client.jobs.retrieve(job_id)).status == "paused" and j,
        30,
        "the job is paused",
    )
    assert job.status_detail == "by_user"
    return job
