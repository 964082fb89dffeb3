"""``dar demo``: a real job through the real system, on the public API only, in about two minutes.

What happens, in order: everything is started (`dar up`) and a base model is made, once, from random weights; a reward
service is started that likes pleased reviews; prompts are uploaded and a job is submitted with that service's URL; the job
is followed over REST; its weights are downloaded, loaded and sampled; base and result are scored by the same service.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dar.cli.demo_screen import Scores, Screen, show_next, show_samples
from dar.cli.demo_session import Session, StartedProcess, Stopwatch
from dar.cli.launch import require
from dar.cli.up import free_port
from dar.client import Client
from dar.errors import DARError, TrainingError
from dar.protocol.jobs import Job
from dar.protocol.status import TERMINAL
from dar.rewards.base import RewardContext, RewardSample
from dar.rewards.scorer import scorer_from_functions
from dar.settings import Settings, load_settings

BASE_STEPS = 220
MODEL = "reviews-base"
JOB_STEPS = 100
SAMPLES_PER_PROMPT = 6
LEAST_RISE = 0.4
"""The demo has failed when the mean reward of fresh samples rose by less."""

SPEC: dict[str, Any] = {
    "hyperparameters": {
        "alpha": 0.1,
        "beta": 0.3,
        "dar_k": 4,
        "dar_wclip": 20,
        "adv_norm": "none",
        "learning_rate": 3e-4,
        "batch_size": 16,
        "max_steps": JOB_STEPS,
        "warmup_steps": 5,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 10,
        "adam_beta2": 0.95,
    },
    "sampling": {"max_new_tokens": 24},
    "peft": None,
    "checkpointing": {"every_steps": 25, "keep_last": 3},
}
"""The job, but for its reward URL. alpha + beta of 0.4 suits rewards in [-1, 1]: few weights reach the clip."""


def base_folder(cache_home: Path) -> Path:
    """Where this version's base model is kept: a change to what makes it gives it another folder."""
    digest = hashlib.sha256(str(BASE_STEPS).encode())
    for name in ("demo.py", "demo_reviews.py"):
        digest.update((files("dar.training") / name).read_bytes())
    return cache_home / "dar" / "demo" / digest.hexdigest()[:16]


def make_base(screen: Screen, folder: Path) -> None:
    """Train the base model, unless it is there.

    Raises:
        TrainingError: It could not be trained.
    """
    if folder.is_dir():
        screen.done("base model", f"from {folder}")
        return
    started = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as unfinished:
        _train_base(screen, Path(unfinished) / "base")
        (Path(unfinished) / "base").rename(folder)
    screen.done("base model", f"trained in {time.monotonic() - started:.0f} s, kept in {folder}")


def _train_base(screen: Screen, folder: Path) -> None:
    command = [sys.executable, "-m", "dar.training.demo", "base", "--steps", str(BASE_STEPS)]
    with (
        screen.bar("base model", BASE_STEPS) as bar,
        subprocess.Popen([*command, "--folder", str(folder)], stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            facts = json.loads(line)
            if "step" in facts:
                bar.at(facts["step"], f"loss {facts['loss']:.2f}")
    if process.returncode != 0:
        raise TrainingError(f"the base model could not be made: exit code {process.returncode}")


def install_model(base: Path, models: Path) -> None:
    """Put the base model where jobs find it."""
    target = models / MODEL
    if target.is_dir():
        shutil.rmtree(target)
    shutil.copytree(base / "model", target)


def follow(screen: Screen, client: Client, job_id: str) -> Job:
    """Watch a job to its end over REST.

    Raises:
        TrainingError: It did not succeed.
    """
    cursor: str | None = None
    reward = ""
    with screen.bar("training", JOB_STEPS) as bar:
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


def start_reward_service(session: Session) -> str:
    """Start the demo's reward service and wait for it; returns its URL."""
    port = free_port()
    command = [sys.executable, "-m", "dar.cli.demo_reward", "--port", str(port)]
    started = session.start("demo-reward", command)
    session.wait_for(f"http://127.0.0.1:{port}/healthz", started)
    return f"http://127.0.0.1:{port}/score"


def train(screen: Screen, client: Client, prompts_file: Path, reward_url: str) -> Job:
    """Upload the prompts, submit the job, follow it to its end."""
    file = client.files.create(prompts_file)
    component = {"name": "positive", "kind": "http", "url": reward_url}
    job = client.jobs.create(
        model=MODEL,
        training_file=file.id,
        seed=7,
        suffix="positivity",
        method={"type": "dar", "dar": {**SPEC, "rewards": {"components": [component]}}},
    )
    screen.done("submitted", f"{job.id}, {file.num_rows} prompts")
    started = time.monotonic()
    job = follow(screen, client, job.id)
    seconds = time.monotonic() - started
    screen.done("trained", f"{job.progress.step} steps in {seconds:.0f} s → {job.fine_tuned_model}")
    return job


def download(screen: Screen, client: Client, job: Job, folder: Path) -> None:
    """Fetch the weights of the newest checkpoint."""
    checkpoint = next(iter(client.checkpoints.list(job.id)))
    client.checkpoints.download(job.id, checkpoint.id, folder)
    screen.done("downloaded", f"step {checkpoint.step_number} → {folder}")


def compare(
    screen: Screen, folders: Sequence[Path], prompts_file: Path, reward_url: str, secret: str
) -> list[Scores]:
    """Sample both models on the same prompts and have the reward service score what they say."""
    prompts = [json.loads(line)["prompt"] for line in prompts_file.read_text().splitlines()]
    before, after = (
        score(reward_url, secret, prompts, completions) for completions in sample(folders, prompts)
    )
    show_samples(screen, prompts, before, after)
    return [before, after]


def run(*, home: Path | None, as_json: bool) -> None:
    """Run the demo; exits with 1 when the reward rose too little."""
    for package, module in (("service", "fastapi"), ("worker", "torch")):
        require(package, module)
    watch = Stopwatch()
    settings = load_settings(home=home)
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    screen = Screen()
    screen.introduce()
    base = base_folder(settings.cache_home)
    with Session(settings.home) as session:
        url, stack = start_all(session, settings)
        with watch.part("base"):
            make_base(screen, base)
        install_model(base, settings.models_path)
        session.wait_for(f"{url}/readyz", stack)
        reward_url = start_reward_service(session)
        screen.done(
            "processes", f"service, Valkey, worker at {url}; reward service at {reward_url}"
        )
        key = settings.secret_from(settings.api_key, "api_key")
        secret = settings.secret_from(settings.reward_secret, "reward_secret")
        assert secret is not None  # the service has made it before it was ready
        with Client(api_key=key, base_url=url) as client:
            with watch.part("job"):
                job = train(screen, client, base / "prompts.jsonl", reward_url)
            weights = settings.home / "demo" / job.id
            download(screen, client, job, weights)
        folders = [base / "model", weights]
        before, after = compare(screen, folders, base / "prompts.jsonl", reward_url, secret)
    show_next(screen, settings, job, weights)
    rise = after.mean - before.mean
    seconds = watch.seconds()
    verdict = f"the mean reward of fresh samples rose by {rise:.2f} in {seconds['total']:.0f} s"
    screen.console.print(f"\n[bold]{verdict}[/bold]")
    if as_json:
        result = {
            "job_id": job.id,
            "status": job.status,
            "reward_before": round(before.mean, 4),
            "reward_after": round(after.mean, 4),
            "steps": job.progress.step,
            "seconds": seconds,
            "checkpoint_dir": str(weights),
        }
        sys.stdout.write(json.dumps(result) + "\n")
    if rise <= LEAST_RISE:
        raise TrainingError(f"{verdict}, but more than {LEAST_RISE} was expected")
