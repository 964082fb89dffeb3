"""``dar demo``: a real job through the real system, on the public API only, in about two minutes.

What happens, in order: everything is started (`dar up`) and a base model is made, once, from random weights; a reward
service is started that likes pleased reviews (or balanced brackets); prompts are uploaded and a job is submitted with that
service's URL; the job is followed over REST; its weights are downloaded, loaded and sampled; base and result are scored by the
same service, or, where the optimum is known, compared with it.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from dar.cli.launch import require
from dar.cli.up import free_port
from dar.client import Client
from dar.demo import brackets
from dar.demo.screen import Scores, Screen, show_next, show_samples
from dar.demo.session import Session, StartedProcess, Stopwatch
from dar.demo.tasks import BRACKETS, REVIEWS, DemoTask
from dar.errors import DARError, TrainingError
from dar.protocol.jobs import Job
from dar.protocol.status import TERMINAL
from dar.rewards.base import RewardContext, RewardSample
from dar.rewards.scoring.scorer import scorer_from_functions
from dar.settings import Settings, load_settings

SAMPLES_PER_PROMPT = 6
LEAST_RISE = 0.4
"""The reviews demo has failed when the mean reward of fresh samples rose by less."""


def base_folder(cache_home: Path, task: DemoTask = REVIEWS) -> Path:
    """Where this version's base model is kept: a change to what makes it gives it another folder."""
    digest = hashlib.sha256(" ".join(task.base_command).encode())
    for name in task.sources:
        digest.update((files("dar.training") / name).read_bytes())
    return cache_home / "dar" / "demo" / digest.hexdigest()[:16]


def make_base(screen: Screen, folder: Path, task: DemoTask = REVIEWS) -> None:
    """Make the base model, unless it is there.

    Raises:
        TrainingError: It could not be made.
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


def _make_base(screen: Screen, folder: Path, task: DemoTask) -> None:
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
    """Put the base model where jobs find it."""
    target = models / task.model
    if target.is_dir():
        shutil.rmtree(target)
    shutil.copytree(base / "model", target)


def follow(screen: Screen, client: Client, job_id: str, steps: int) -> Job:
    """Watch a job to its end over REST.

    Raises:
        TrainingError: It did not succeed.
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
    """Completions of each prompt by each model, with the same seed; loaded by transformers alone."""
    command = [
        sys.executable,
        "-m",
        "dar.training.demo",
        "sample",
        "--count",
        str(SAMPLES_PER_PROMPT),
    ]
    result = subprocess.run(
        [*command, "--folder", *map(str, folders)],
        input=json.dumps(list(prompts)).encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    return [json.loads(line)["completions"] for line in result.stdout.splitlines()]


def score(url: str, secret: str, prompts: Sequence[str], completions: list[list[str]]) -> Scores:
    """Have the reward service score completions, as a job would.

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


def start_all(session: Session, settings: Settings) -> tuple[str, StartedProcess]:
    """Start service, Valkey and worker on a free port; returns the service's URL and what to wait for."""
    port = free_port()
    command = [sys.executable, "-m", "dar.cli", "up", "--home", str(settings.home)]
    return f"http://127.0.0.1:{port}", session.start("demo-up", [*command, "--port", str(port)])


def start_reward_service(session: Session, task: DemoTask) -> str:
    """Start the demo's reward service and wait for it; returns its URL."""
    port = free_port()
    command = [sys.executable, "-m", "dar.demo.reward", "--port", str(port)]
    command += ["--task", task.name]
    started = session.start("demo-reward", command)
    session.wait_for(f"http://127.0.0.1:{port}/healthz", started)
    return f"http://127.0.0.1:{port}/score"


def train(
    screen: Screen, client: Client, prompts_file: Path, reward_url: str, task: DemoTask
) -> Job:
    """Upload the prompts, submit the job, follow it to its end."""
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


def download(screen: Screen, client: Client, job: Job, folder: Path) -> None:
    """Fetch the weights of the newest checkpoint."""
    checkpoint = next(iter(client.checkpoints.list(job.id)))
    client.checkpoints.download(job.id, checkpoint.id, folder)
    screen.done("downloaded", f"step {checkpoint.step_number} → {folder}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a demo has shown."""

    verdict: str
    is_good: bool
    expected: str
    facts: dict[str, object]
    """For ``--json``, beside what every demo tells."""


def compare(
    screen: Screen, folders: Sequence[Path], prompts_file: Path, reward_url: str, secret: str
) -> Outcome:
    """Sample both models on the same prompts and have the reward service score what they say."""
    prompts = [json.loads(line)["prompt"] for line in prompts_file.read_text().splitlines()]
    before, after = (
        score(reward_url, secret, prompts, completions) for completions in sample(folders, prompts)
    )
    show_samples(screen, prompts, before, after)
    rise = after.mean - before.mean
    return Outcome(
        verdict=f"the mean reward of fresh samples rose by {rise:.2f}",
        is_good=rise > LEAST_RISE,
        expected=f"more than {LEAST_RISE} was expected",
        facts={"reward_before": round(before.mean, 4), "reward_after": round(after.mean, 4)},
    )


def compare_exactly(
    screen: Screen, folders: Sequence[Path], rewards: Sequence[float], task: DemoTask
) -> Outcome:
    """Compare both models with the optimum, which is known for brackets."""
    verdict = brackets.judge(folders, task.spec["hyperparameters"])
    brackets.show(screen, rewards, verdict)
    exact = {name: round(value, 4) for name, value in verdict.after.items()}
    return Outcome(
        verdict=str(verdict),
        is_good=verdict.is_near,
        expected=f"a reward within {brackets.MOST_REWARD_OFF} of the optimum's and at most "
        f"{brackets.MOST_KL_OFF} nats were expected",
        facts={
            "reward_before": round(verdict.before["reward"], 4),
            "reward_after": exact["reward"],
            "exact": exact,
        },
    )


def run(*, home: Path | None, as_json: bool, task: DemoTask = REVIEWS) -> None:
    """Run the demo; raises when training did not reach what it should.

    Raises:
        TrainingError: It did not.
    """
    for package, module in (("service", "fastapi"), ("worker", "torch")):
        require(package, module)
    watch = Stopwatch()
    settings = load_settings(home=home)
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    screen = Screen()
    screen.introduce(task.introduction)
    base = base_folder(settings.cache_home, task)
    with Session(settings.home) as session:
        url, stack = start_all(session, settings)
        with watch.part("base"):
            make_base(screen, base, task)
        install_model(base, settings.models_path, task)
        session.wait_for(f"{url}/readyz", stack)
        reward_url = start_reward_service(session, task)
        screen.done(
            "processes", f"service, Valkey, worker at {url}; reward service at {reward_url}"
        )
        key = settings.secret_from(settings.api_key, "api_key")
        secret = settings.secret_from(settings.reward_secret, "reward_secret")
        assert secret is not None  # the service has made it before it was ready
        with Client(api_key=key, base_url=url) as client:
            with watch.part("job"):
                job = train(screen, client, base / "prompts.jsonl", reward_url, task)
            weights = settings.home / "demo" / job.id
            download(screen, client, job, weights)
            rewards = brackets.rewards_of(client, job.id)
        folders = [base / "model", weights]
        if task is BRACKETS:
            outcome = compare_exactly(screen, folders, rewards, task)
        else:
            outcome = compare(screen, folders, base / "prompts.jsonl", reward_url, secret)
    show_next(screen, settings, job, weights)
    conclude(screen, outcome, job, weights, watch.seconds(), as_json=as_json)


def conclude(
    screen: Screen,
    outcome: Outcome,
    job: Job,
    weights: Path,
    seconds: dict[str, float],
    *,
    as_json: bool,
) -> None:
    """Say how it went, on stdout too if asked for.

    Raises:
        TrainingError: Not as it should.
    """
    verdict = f"{outcome.verdict} (in {seconds['total']:.0f} s)"
    screen.console.print(f"\n[bold]{verdict}[/bold]", soft_wrap=True)
    if as_json:
        result = {
            "job_id": job.id,
            "status": job.status,
            **outcome.facts,
            "steps": job.progress.step,
            "seconds": seconds,
            "checkpoint_dir": str(weights),
        }
        sys.stdout.write(json.dumps(result) + "\n")
    if not outcome.is_good:
        raise TrainingError(f"{verdict}, but {outcome.expected}")
