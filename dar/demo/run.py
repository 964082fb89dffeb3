"""``dar demo``: a real job through the real system, on the public API only, in about two minutes.

The steps, in order:

1. Start everything (`dar up`), and train a base model from random weights if there is none yet.
2. Start a reward service that prefers pleased reviews (or balanced brackets).
3. Upload prompts and submit a job with the URL of that service. Follow the job over REST.
4. Download the weights and sample them.
5. Score the base model and the result with the same service. For brackets, compare both with the
   known optimum.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

from dar.client import Client
from dar.demo import brackets
from dar.demo.screen import DemoScreen, Scores, show_next, show_samples
from dar.demo.tasks import BRACKETS, REVIEWS, DemoTask
from dar.disk import OTHER_HOME_HINT, PRIVATE, make_folder
from dar.errors import DARError, TrainingError
from dar.processes import Child, Processes, answers, free_port, require
from dar.protocol.jobs import Job
from dar.protocol.status import TERMINAL
from dar.rewards.base import RewardContext, RewardSample
from dar.rewards.http.signing import secrets_in
from dar.rewards.scoring.scorer import scorer_from_functions
from dar.settings import environment, load_settings

START_SECONDS = 90.0
STOP_SECONDS = 600.0
SAMPLES_PER_PROMPT = 6
LEAST_RISE = 0.4
"""The reviews demo fails when the mean reward of fresh samples rises by less."""


def base_folder(cache_home: Path, task: DemoTask = REVIEWS) -> Path:
    """Where the base model is cached; a change of the code that makes it changes the folder."""
    digest = hashlib.sha256(" ".join(task.base_command).encode())
    for name in task.sources:
        digest.update((files("dar.training.demo") / name).read_bytes())
    return cache_home / "dar" / "demo" / digest.hexdigest()[:16]


def make_base(screen: DemoScreen, folder: Path, task: DemoTask = REVIEWS) -> None:
    """Make the base model unless the folder exists.

    Raises:
        TrainingError: The process that makes it failed.
    """
    if folder.is_dir():
        screen.done("base model", f"from {folder}")
        return
    started = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as unfinished:
        _make_base(screen, Path(unfinished) / "base", task)
        (Path(unfinished) / "base").rename(folder)
    screen.done("base model", f"made in {time.monotonic() - started:.0f} s, kept in {folder}")


def _make_base(screen: DemoScreen, folder: Path, task: DemoTask) -> None:
    command = [sys.executable, "-m", "dar.training.demo", *task.base_command]
    with (
        screen.bar("base model", task.base_steps) as bar,
        subprocess.Popen([*command, "--folder", str(folder)], stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            facts = json.loads(line)
            if "step" in facts:
                bar.at(facts["step"], f"loss {facts['loss']:.2f}")
    if process.returncode != 0:
        raise TrainingError(f"the base model could not be made: exit code {process.returncode}")


def install_model(base: Path, models: Path, task: DemoTask) -> None:
    """Copy the base model to the folder of models that jobs may name."""
    target = models / task.model
    if target.is_dir():
        shutil.rmtree(target)
    shutil.copytree(base / "model", target)


def follow(screen: DemoScreen, client: Client, job_id: str, steps: int) -> Job:
    """Show the progress of a job until it ends.

    Raises:
        TrainingError: The job did not succeed.
    """
    cursor: str | None = None
    reward = ""
    with screen.bar("training", steps) as bar:
        while True:
            job = client.jobs.retrieve(job_id)
            metrics = client.jobs.metrics(job_id, names=["dar/rewards_mean"], after=cursor)
            cursor = metrics.cursor
            series = metrics.series.get("dar/rewards_mean")
            if series is not None and series.value and series.value[-1] is not None:
                reward = f"reward {series.value[-1]:+.2f}"
            bar.at(job.progress.step, reward or job.status_message or job.status)
            if job.status in TERMINAL:
                break
            time.sleep(metrics.poll_after_ms / 1000)
    if job.status != "succeeded":
        raise TrainingError(
            f"job {job.id} {job.status}: {job.error.message if job.error else 'no reason given'}"
        )
    return job


def sample(folders: Sequence[Path], prompts: Sequence[str]) -> list[list[list[str]]]:
    """Sample completions of each prompt from each model, with one seed and transformers alone."""
    command = [sys.executable, "-m", "dar.training.demo", "sample"]
    options = ["--count", str(SAMPLES_PER_PROMPT), "--folder", *map(str, folders)]
    given = json.dumps(list(prompts)).encode()
    printed = subprocess.check_output([*command, *options], input=given)
    return [json.loads(line)["completions"] for line in printed.splitlines()]


def score(url: str, secret: str, prompts: Sequence[str], completions: list[list[str]]) -> Scores:
    """Score completions with the reward service, as a job would.

    Raises:
        DARError: A completion got no reward.
    """
    samples = [
        RewardSample(
            id=f"s{row}-{index}",
            group_id=f"g{row}",
            index=index,
            prompt=prompt,
            messages=None,
            completion=text,
            finish_reason="stop",
            completion_tokens=len(text.split()),
        )
        for row, (prompt, texts) in enumerate(zip(prompts, completions, strict=True))
        for index, text in enumerate(texts)
    ]
    with scorer_from_functions(url, secret=secret) as scorer:
        results = scorer.score(samples, RewardContext(step=1, mode="eval"))
    rewards = [result.reward for result in results if result.reward is not None]
    if len(rewards) < len(results):
        missing = next(result for result in results if result.reward is None)
        raise DARError(f"the reward service left completions unscored: {missing.message}")
    return Scores(completions, rewards)


class Stopwatch:
    """Wall time of the whole demo and of named parts."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._parts: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._parts[name] = time.monotonic() - started

    def seconds(self) -> dict[str, float]:
        """Seconds of each part and in ``total``, rounded to a tenth."""
        parts = {**self._parts, "total": time.monotonic() - self._started}
        return {name: round(value, 1) for name, value in parts.items()}


def start(processes: Processes, home: Path, name: str, *command: str) -> None:
    """Start ``python -m command`` in the home folder."""
    processes.start(
        Child(
            name=name,
            command=[sys.executable, "-m", *command],
            environment=environment(home=home),
            log=home / "logs" / f"{name}.log",
            stop_seconds=STOP_SECONDS,
        )
    )


def wait_for(processes: Processes, name: str, url: str) -> None:
    """Wait until a GET of ``url`` returns 200.

    Raises:
        ServiceUnavailableError: The process ended or took too long.
    """
    processes.wait_until(partial(answers, url), name, START_SECONDS, _sleep)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def start_stack(processes: Processes, home: Path) -> str:
    """Start service, Valkey and worker on a free port; returns the URL of the service."""
    port = str(free_port())
    start(processes, home, "demo-up", "dar.cli", "up", "--home", str(home), "--port", port)
    return f"http://127.0.0.1:{port}"


def start_reward_service(processes: Processes, home: Path, task: DemoTask) -> str:
    """Start the demo's reward service and wait for it; returns its URL."""
    port = str(free_port())
    start(processes, home, "demo-reward", "dar.demo.reward", "--port", port, "--task", task.name)
    wait_for(processes, "demo-reward", f"http://127.0.0.1:{port}/healthz")
    return f"http://127.0.0.1:{port}/score"


def train(
    screen: DemoScreen, client: Client, prompts_file: Path, reward_url: str, task: DemoTask
) -> Job:
    """Upload the prompts, submit the job and follow it until it ends."""
    file = client.files.create(prompts_file)
    component = {"name": task.reward, "kind": "http", "url": reward_url}
    job = client.jobs.create(
        model=task.model,
        training_file=file.id,
        seed=task.seed,
        suffix=task.suffix,
        method={"type": "dar", "dar": {**task.spec, "rewards": {"components": [component]}}},
    )
    screen.done("submitted", f"{job.id}, {file.num_rows} prompts")
    started = time.monotonic()
    job = follow(screen, client, job.id, task.steps)
    seconds = time.monotonic() - started
    screen.done("trained", f"{job.progress.step} steps in {seconds:.0f} s → {job.fine_tuned_model}")
    return job


def download(screen: DemoScreen, client: Client, job: Job, folder: Path) -> None:
    """Download the weights of the newest checkpoint."""
    checkpoint = next(iter(client.checkpoints.list(job.id)))
    client.checkpoints.download(job.id, checkpoint.id, folder)
    screen.done("downloaded", f"step {checkpoint.step_number} → {folder}")


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a demo found."""

    summary: str
    is_good: bool
    expected: str
    facts: dict[str, object]
    """Fields of ``--json`` besides those of every demo."""


def compare(
    screen: DemoScreen, folders: Sequence[Path], prompts_file: Path, reward_url: str, secret: str
) -> DemoResult:
    """Sample both models on the same prompts and score the samples with the reward service."""
    with prompts_file.open(encoding="utf-8") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines]
    before, after = (
        score(reward_url, secret, prompts, completions) for completions in sample(folders, prompts)
    )
    show_samples(screen, prompts, before, after)
    rise = after.mean - before.mean
    return DemoResult(
        summary=f"the mean reward of fresh samples rose by {rise:.2f}",
        is_good=rise > LEAST_RISE,
        expected=f"more than {LEAST_RISE} was expected",
        facts={"reward_before": round(before.mean, 4), "reward_after": round(after.mean, 4)},
    )


def compare_exactly(
    screen: DemoScreen, folders: Sequence[Path], rewards: Sequence[float], task: DemoTask
) -> DemoResult:
    """Compare both models with the optimum, which is known for brackets."""
    compared = brackets.compare(folders, task.spec["hyperparameters"])
    brackets.show(screen, rewards, compared)
    exact = {name: round(value, 4) for name, value in compared.after.items()}
    return DemoResult(
        summary=str(compared),
        is_good=compared.is_near,
        expected=f"a reward within {brackets.MOST_REWARD_OFF} of the optimum's and at most "
        f"{brackets.MOST_KL_OFF} nats were expected",
        facts={
            "reward_before": round(compared.before["reward"], 4),
            "reward_after": exact["reward"],
            "exact": exact,
        },
    )


def run(*, home: Path | None, as_json: bool, task: DemoTask = REVIEWS) -> None:
    """Run the demo.

    Raises:
        TrainingError: Training did not reach the expected result.
    """
    for package, module in (("service", "fastapi"), ("worker", "torch")):
        require(package, module)
    watch = Stopwatch()
    settings = load_settings(home=home)
    os.umask(PRIVATE)
    make_folder(settings.home, OTHER_HOME_HINT)
    screen = DemoScreen()
    screen.introduce(task.introduction)
    base = base_folder(settings.cache_home, task)
    home = settings.home
    with Processes(screen.note) as processes:
        url = start_stack(processes, home)
        with watch.part("base"):
            make_base(screen, base, task)
        install_model(base, settings.models_path, task)
        wait_for(processes, "demo-up", f"{url}/readyz")
        reward_url = start_reward_service(processes, home, task)
        screen.done("processes", f"service, Valkey, worker at {url}; rewards at {reward_url}")
        key = settings.secret_from(settings.api_key, "api_key")
        # The service writes the file before it is ready.
        secret, *_ = secrets_in(settings.secret_from(settings.reward_secret, "reward_secret") or "")
        with Client(api_key=key, base_url=url) as client:
            with watch.part("job"):
                job = train(screen, client, base / "prompts.jsonl", reward_url, task)
            weights = home / "demo" / job.id
            download(screen, client, job, weights)
            rewards = brackets.rewards_of(client, job.id)
        folders = [base / "model", weights]
        if task is BRACKETS:
            result = compare_exactly(screen, folders, rewards, task)
        else:
            result = compare(screen, folders, base / "prompts.jsonl", reward_url, secret)
    show_next(screen, settings, job, weights)
    conclude(screen, result, job, weights, watch.seconds(), as_json=as_json)


def conclude(
    screen: DemoScreen,
    result: DemoResult,
    job: Job,
    weights: Path,
    seconds: dict[str, float],
    *,
    as_json: bool,
) -> None:
    """Print the result, with ``as_json`` on stdout too.

    Raises:
        TrainingError: The result is not as expected.
    """
    summary = f"{result.summary} (in {seconds['total']:.0f} s)"
    screen.console.print(f"\n[bold]{summary}[/bold]", soft_wrap=True)
    if as_json:
        facts = {
            "job_id": job.id,
            "status": job.status,
            **result.facts,
            "steps": job.progress.step,
            "seconds": seconds,
            "checkpoint_dir": str(weights),
        }
        sys.stdout.write(json.dumps(facts) + "\n")
    if not result.is_good:
        raise TrainingError(f"{summary}, but {result.expected}")
