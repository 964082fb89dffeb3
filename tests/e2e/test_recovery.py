"""Whatever dies in mid-training, the job ends with the weights, optimizer and metrics it would have
had.

The tests are slow because each starts real trainers, and a trainer spends some six CPU seconds on
importing torch.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from dar.protocol.metrics import is_reproducible
from fakes.installation import Installation

STEPS = 40
WITHIN = ("calibrating", "waiting_for_reward")
"""What a job shows during a calibration that waits for rewards."""
LONG = 100
"""Steps of a job that chooses alpha a second time, when its KL is at rest."""
PHASES = ("base", "policy")
"""Whose completions are scored."""


@pytest.fixture(scope="module")
def file_id(installation: Installation, reviews_base: Path) -> str:
    return str(installation.client.files.create(reviews_base / "prompts.jsonl").id)


def submit(installation: Installation, file_id: str) -> str:
    return str(installation.client.jobs.create(**installation.spec(file_id)).id)


@dataclass(frozen=True)
class Result:
    """What came of a job: its final checkpoint on disk and its metrics."""

    folder: Path
    metrics: dict[str, tuple[list[int], list[float | None]]]

    @classmethod
    def of(
        cls, installation: Installation, job_id: str, folder: Path, steps: int = STEPS
    ) -> "Result":
        client = installation.client
        checkpoint = next(iter(client.checkpoints.list(job_id)))
        assert checkpoint.step_number == steps
        client.checkpoints.download(job_id, checkpoint.id, folder, include_optimizer=True)
        series = client.jobs.metrics(job_id).series
        return cls(folder, {name: (one.step, one.value) for name, one in series.items()})


@pytest.fixture(scope="module")
def undisturbed(
    installation: Installation, file_id: str, tmp_path_factory: pytest.TempPathFactory
) -> Result:
    """What comes of the job when nothing happens to it."""
    job_id = submit(installation, file_id)
    assert installation.until_done(job_id).status == "succeeded"
    return Result.of(installation, job_id, tmp_path_factory.mktemp("undisturbed"))


def assert_equal(result: Result, undisturbed: Result) -> None:
    for name in ("model.safetensors", "resume/optimizer.safetensors"):
        tensors = load_file(result.folder / name)
        expected = load_file(undisturbed.folder / name)
        assert tensors.keys() == expected.keys()
        assert all((tensors[key] == expected[key]).all() for key in expected), name
    assert set(filter(is_reproducible, result.metrics)) == set(
        filter(is_reproducible, undisturbed.metrics)
    )
    for name, points in undisturbed.metrics.items():
        if is_reproducible(name):
            assert result.metrics[name] == points, name


def assert_every_step_once(installation: Installation, job_id: str) -> None:
    series = installation.client.jobs.metrics(job_id).series["dar/loss"]
    assert series.step == list(range(1, STEPS + 1))
    events = installation.client.jobs.events(job_id)
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert sorted(steps) == list(range(1, STEPS + 1))


@pytest.mark.slow  # whole jobs are trained
@pytest.mark.timeout(240)
def test_a_killed_worker_loses_nothing(
    installation: Installation,
    file_id: str,
    undisturbed: Result,
    tmp_path: Path,
    until: Callable[..., Any],
) -> None:
    job_id = submit(installation, file_id)
    installation.until_step(job_id, 8)
    installation.end("worker", signal.SIGKILL)
    assert installation.client.jobs.retrieve(job_id).status == "running"
    back_at = time.monotonic()
    installation.start_worker()
    until(
        lambda: installation.client.jobs.retrieve(job_id).attempt == 2,
        30,
        "the job is claimed again",
    )
    assert (
        time.monotonic() - back_at < 15
    )  # the promise is 5 s on a quiet machine; this one runs other tests
    job = installation.until_done(job_id)
    assert job.status == "succeeded"
    assert_every_step_once(installation, job_id)
    assert_equal(Result.of(installation, job_id, tmp_path), undisturbed)


@pytest.mark.slow  # whole jobs are trained
@pytest.mark.timeout(240)
def test_a_drained_worker_and_a_restarted_service_lose_nothing(
    installation: Installation, file_id: str, undisturbed: Result, tmp_path: Path
) -> None:
    job_id = submit(installation, file_id)
    installation.until_step(job_id, 4)
    assert installation.end("worker", signal.SIGTERM) == 0
    drained = installation.client.jobs.retrieve(job_id)
    assert drained.status == "queued"
    checkpoint = next(iter(installation.client.checkpoints.list(job_id)))
    # A drain costs no step but the one under way.
    assert checkpoint.step_number >= drained.progress.step
    installation.start_worker()
    installation.until_step(job_id, drained.progress.step + 4)
    installation.end("service", signal.SIGKILL)
    time.sleep(2)
    installation.start_service()
    assert installation.until_done(job_id).status == "succeeded"
    assert_every_step_once(installation, job_id)
    assert_equal(Result.of(installation, job_id, tmp_path), undisturbed)


class HeldService:
    """Scores as the installation's does; the requests of a calibration wait for the test."""

    def __init__(self) -> None:
        self.asked = {phase: threading.Event() for phase in PHASES}
        self.may_answer = {phase: threading.Event() for phase in PHASES}

    def __call__(self, _: Mapping[str, str], body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        if asked["mode"] == "eval":
            phase = "policy" if asked["step"] else "base"
            self.asked[phase].set()
            assert self.may_answer[phase].wait(120)
        texts = [sample["completion"] for sample in asked["samples"]]
        rewards = [text.count("e") / max(1, len(text)) for text in texts]
        return 200, {"request_id": asked["request_id"], "rewards": rewards}


@pytest.mark.slow  # whole jobs are trained
@pytest.mark.timeout(480)
def test_a_worker_that_is_killed_within_either_calibration_loses_nothing(
    installation: Installation,
    file_id: str,
    tmp_path: Path,
    serve: Callable[..., str],
    until: Callable[..., Any],
) -> None:
    """The first one samples the base model, the second one the trained policy."""
    service, client = HeldService(), installation.client
    spec = installation.spec(
        file_id, rewards={"components": [{"name": "e", "url": serve(service)}]}
    )
    kept = {"learning_rate": 1e-3, "batch_size": 6}
    spec["method"]["dar"]["hyperparameters"] = kept | {"max_steps": LONG, "kl_budget": 2.0}
    job_id = client.jobs.create(**spec).id
    for phase in PHASES:
        assert service.asked[phase].wait(120), phase
        job = until(
            lambda: (job := client.jobs.retrieve(job_id)).status_detail in WITHIN and job,
            30,
            "it calibrates",
        )
        assert (job.progress.step >= 60) == (phase == "policy")
        installation.end("worker", signal.SIGKILL)
        service.may_answer[phase].set()
        installation.start_worker()
    job = installation.until_done(job_id)
    assert job.status == "succeeded"
    assert job.forecast.phase == "policy"
    assert job.progress.calibration_completions > job.forecast.completions
    killed = Result.of(installation, job_id, tmp_path / "killed", LONG)
    again = client.jobs.create(**spec).id
    assert installation.until_done(again).forecast == job.forecast
    assert_equal(killed, Result.of(installation, again, tmp_path / "undisturbed", LONG))


def mean_share_of_the_letter(folders: list[Path], prompts: list[str]) -> list[float]:
    """What the reward service likes, in fresh samples of models that transformers loads by
    itself.
    """
    command = [
        sys.executable,
        "-m",
        "dar.training.demo",
        "sample",
        "--max-new-tokens",
        "12",
        "--folder",
    ]
    result = subprocess.run(
        [*command, *map(str, folders)],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        check=True,
    )
    means = []
    for line in result.stdout.splitlines():
        texts = [text for texts in json.loads(line)["completions"] for text in texts]
        means.append(sum(text.count("e") / max(1, len(text)) for text in texts) / len(texts))
    return means


@pytest.mark.slow  # whole jobs are trained
def test_the_downloaded_weights_load_and_score_higher(
    undisturbed: Result, reviews_base: Path
) -> None:
    rows = (reviews_base / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(row)["prompt"] for row in rows]
    before, after = mean_share_of_the_letter([reviews_base / "model", undisturbed.folder], prompts)
    assert after > 1.3 * before
