"""Rewards that come by callback, through kills of the worker and of the service while they are
pending.

The tests are slow because each starts real trainers, and a trainer spends some six CPU seconds on
importing torch.
"""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from safetensors.numpy import load_file

from fakes.installation import Installation
from fakes.reward_server import RewardServer, ScoreRequest

STEPS = 4
HELD_STEP = 4
"""Results of this step are held back until the test lets them go; a new attempt replays the one
before it too."""


@dataclass
class Judge:
    """A reward service that answers 202 and calls back later; it scores each request once."""

    url: str = ""
    is_holding: bool = False
    posts: Counter[str] = field(default_factory=Counter)
    scored: Counter[str] = field(default_factory=Counter)
    held: list[dict[str, Any]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, request: ScoreRequest) -> None:
        request.accept()
        self.take(request.content)

    def take(self, request: dict[str, Any]) -> None:
        with self.lock:
            self.posts[request["request_id"]] += 1
            if self.is_holding and request["step"] == HELD_STEP:
                self.held.append(request)
                return
        threading.Thread(target=self.call_back, args=(request,), daemon=True).start()

    def release(self) -> None:
        with self.lock:
            self.is_holding = False
            waiting, self.held = self.held, []
        for request in waiting:
            threading.Thread(target=self.call_back, args=(request,), daemon=True).start()

    def call_back(self, request: dict[str, Any]) -> None:
        """Score, and post the result until somebody takes it or says that nobody will."""
        with self.lock:
            self.scored[request["request_id"]] += 1
        texts = [sample["completion"] for sample in request["samples"]]
        rewards = [text.count("e") / max(1, len(text)) for text in texts]
        body = {
            "type": "reward.result",
            "request_id": request["request_id"],
            "rewards": rewards,
        }
        callback = request["reply"]["callback"]
        headers = {"authorization": f"Bearer {callback['token']}"}
        with httpx2.Client(trust_env=False, verify=False) as http:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                try:
                    answer = http.post(callback["url"], json=body, headers=headers)
                except httpx2.TransportError:
                    time.sleep(0.2)
                    continue
                if answer.status_code < 500:
                    self.told.append(answer.json().get("status", str(answer.status_code)))
                    return
                time.sleep(0.2)


@pytest.fixture
def judge() -> Iterator[Judge]:
    judge = Judge()
    with RewardServer(judge) as server:
        judge.url = server.url
        yield judge


def submit(installation: Installation, reviews_base: Path, url: str, reply: str) -> str:
    component = {
        "name": "letters",
        "url": url,
        "reply": reply,
        "batch": {"max_samples": 4},
        "timeouts": {"deadline": 120},
    }
    spec = installation.spec(
        installation.client.files.create(reviews_base / "prompts.jsonl").id,
        hyperparameters={"max_steps": STEPS, "batch_size": 3},
        rewards={"components": [component]},
        checkpointing={"every_steps": 2, "keep_last": 2},
    )
    # Judges of this test answer every request later, that of a dry run too.
    return str(installation.client.jobs.create(**spec, skip_validation=True).id)


def weights_of(installation: Installation, job_id: str, folder: Path) -> dict[str, Any]:
    checkpoint = next(iter(installation.client.checkpoints.list(job_id)))
    assert checkpoint.step_number == STEPS
    installation.client.checkpoints.download(job_id, checkpoint.id, folder)
    return dict(load_file(folder / "model.safetensors"))


@pytest.fixture(scope="module")
def expected(
    installation: Installation, reviews_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The weights that come of the same job when its rewards are answered at once."""
    job_id = submit(installation, reviews_base, installation.reward_url, "sync")
    assert installation.until_done(job_id).status == "succeeded"
    return weights_of(installation, job_id, tmp_path_factory.mktemp("sync"))


def assert_right(
    installation: Installation, job_id: str, expected: dict[str, Any], judge: Judge, folder: Path
) -> None:
    job = installation.until_done(job_id, 90)
    assert job.status == "succeeded", job.error
    found = weights_of(installation, job_id, folder)
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)
    assert set(judge.scored.values()) == {1}, "a request was scored twice"
    assert set(judge.posts.values()) == {1}, "a request was sent twice"
    assert set(judge.told) == {"accepted"}


def until_held(until: Callable[..., Any], judge: Judge) -> None:
    until(lambda: len(judge.held) == 3, 60, "all results of the step are pending")
    time.sleep(1.0)  # that the reward service has the requests is noted by then


@pytest.mark.slow  # whole jobs are trained
@pytest.mark.timeout(240)
def test_callbacks_give_the_weights_that_answers_at_once_give(
    installation: Installation,
    reviews_base: Path,
    expected: dict[str, Any],
    judge: Judge,
    tmp_path: Path,
) -> None:
    job_id = submit(installation, reviews_base, judge.url, "either")
    assert_right(installation, job_id, expected, judge, tmp_path)
    assert len(judge.posts) == 3 * STEPS


@pytest.mark.slow  # whole jobs are trained
@pytest.mark.timeout(240)
@pytest.mark.parametrize("answered", ["while it is dead", "after its return"])
def test_a_worker_that_is_killed_while_results_are_pending_asks_for_none_again(
    installation: Installation,
    reviews_base: Path,
    expected: dict[str, Any],
    judge: Judge,
    tmp_path: Path,
    until: Callable[..., Any],
    answered: str,
) -> None:
    judge.is_holding = True
    job_id = submit(installation, reviews_base, judge.url, "either")
    until_held(until, judge)
    installation.end("worker", signal.SIGKILL)
    if answered == "while it is dead":
        judge.release()
        until(lambda: len(judge.told) == 3 * HELD_STEP, 30, "the service has taken the results")
        installation.start_worker()
    else:
        installation.start_worker()
        until(
            lambda: installation.client.jobs.retrieve(job_id).status_detail == "waiting_for_reward",
            60,
            "the new trainer waits for the old results",
        )
        time.sleep(0.5)
        judge.release()
    assert_right(installation, job_id, expected, judge, tmp_path)
    assert installation.client.jobs.retrieve(job_id).attempt == 2


@pytest.mark.slow  # whole jobs are trained
@pytest.mark.timeout(240)
def test_a_service_that_is_killed_while_results_are_pending_loses_none(
    installation: Installation,
    reviews_base: Path,
    expected: dict[str, Any],
    judge: Judge,
    tmp_path: Path,
    until: Callable[..., Any],
) -> None:
    judge.is_holding = True
    job_id = submit(installation, reviews_base, judge.url, "either")
    until_held(until, judge)
    installation.end("service", signal.SIGKILL)
    judge.release()
    time.sleep(1.0)  # the callbacks find nobody, and are repeated
    installation.start_service()
    assert_right(installation, job_id, expected, judge, tmp_path)
    assert installation.client.jobs.retrieve(job_id).attempt == 1
