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
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dar.cli.demo_screen import Scores, Screen, show_next, show_samples
from dar.cli.demo_session import Session
from dar.cli.launch import require
from dar.cli.up import free_port
from dar.client import Client
from dar.errors import DARError, TrainingError
from dar.protocol.jobs import Job
from dar.protocol.status import TERMINAL
from dar.rewards.base import RewardContext, RewardSample
from dar.rewards.scorer import scorer_from_functions
from dar.settings import Settings

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
    unfinished = folder.with_name(f"{folder.name}.{time.time_ns()}")
    command = [sys.executable, "-m", "dar.training.demo", "base", "--steps", str(BASE_STEPS)]
    with (
        screen.bar("base model", BASE_STEPS) as bar,
        subprocess.Popen(
            [*command, "--folder", str(unfinished)], stdout=subprocess.PIPE
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            facts = json.loads(line)
            if "step" in facts:
                bar.at(facts["step"], f"loss {facts['loss']:.2f}")
    if process.returncode != 0:
        raise TrainingError(f"the base model could not be made: exit code {process.returncode}")
    unfinished.rename(folder)
    screen.done("base model", f"trained in {time.monotonic() - started:.0f} s, kept in {folder}")


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


def run(*, home: Path | None, as_json: bool) -> None:
    """Run the demo; exits with 1 when the reward rose too little."""
    for package, module in (("service", "fastapi"), ("worker", "torch")):
        require(package, module)
    started = time.monotonic()
    settings = Settings(home=home) if home is not None else Settings()
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    screen = Screen()
    screen.console.print(
        "A small model learns to write pleased reviews. Its reward comes from a service of yours, over HTTP.\n",
        soft_wrap=True,
    )
    with Session(settings.home) as session:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = [
            sys.executable,
            "-m",
            "dar.cli",
            "up",
            "--home",
            str(settings.home),
            "--port",
            str(port),
        ]
        stack = session.start("demo-up", command)
        base = base_folder(settings.cache_home)
        base_started = time.monotonic()
        make_base(screen, base)
        base_seconds = time.monotonic() - base_started
        install_model(base, settings.models_path)
        session.wait_for(f"{url}/readyz", *stack)
        result = train_and_compare(screen, session, settings, url, base)
    total_seconds = time.monotonic() - started
    result["seconds"] = {
        "base": round(base_seconds, 1),
        "job": result.pop("job_seconds"),
        "total": round(total_seconds, 1),
    }
    rise = result["reward_after"] - result["reward_before"]
    verdict = f"the mean reward of fresh samples rose by {rise:.2f} in {total_seconds:.0f} s"
    screen.console.print(f"\n[bold]{verdict}[/bold]")
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    if rise <= LEAST_RISE:
        raise TrainingError(f"{verdict}, but more than {LEAST_RISE} was expected")


def train_and_compare(
    screen: Screen, session: Session, settings: Settings, url: str, base: Path
) -> dict[str, Any]:
    """Run the job and score what came of it; returns the result but for its ``seconds``."""
    reward_port = free_port()
    reward_url = f"http://127.0.0.1:{reward_port}/score"
    secret_file = settings.home / "reward_secret"
    reward = session.start(
        "demo-reward",
        [
            sys.executable,
            "-m",
            "dar.cli.demo_reward",
            "--port",
            str(reward_port),
            "--secret-file",
            str(secret_file),
        ],
    )
    session.wait_for(f"http://127.0.0.1:{reward_port}/healthz", *reward)
    screen.done("processes", f"service, Valkey, worker at {url}; reward service at {reward_url}")
    client = Client(api_key=(settings.home / "api_key").read_text().strip(), base_url=url)
    file = client.files.create(base / "prompts.jsonl")
    component = {"name": "positive", "kind": "http", "url": reward_url}
    started = time.monotonic()
    job = client.jobs.create(
        model=MODEL,
        training_file=file.id,
        seed=7,
        suffix="positivity",
        method={"type": "dar", "dar": {**SPEC, "rewards": {"components": [component]}}},
    )
    screen.done("submitted", f"{job.id}, {file.num_rows} prompts")
    job = follow(screen, client, job.id)
    job_seconds = time.monotonic() - started
    screen.done(
        "trained", f"{job.progress.step} steps in {job_seconds:.0f} s → {job.fine_tuned_model}"
    )
    checkpoint = next(iter(client.checkpoints.list(job.id)))
    weights = settings.home / "demo" / job.id
    client.checkpoints.download(job.id, checkpoint.id, weights)
    screen.done("downloaded", f"step {checkpoint.step_number} → {weights}")
    prompts = [
        json.loads(line)["prompt"] for line in (base / "prompts.jsonl").read_text().splitlines()
    ]
    secret = secret_file.read_text().strip()
    texts = sample([base / "model", weights], prompts)
    before, after = (score(reward_url, secret, prompts, completions) for completions in texts)
    show_samples(screen, prompts, before, after)
    show_next(screen, settings, job, weights)
    return {
        "job_id": job.id,
        "status": job.status,
        "reward_before": round(before.mean, 4),
        "reward_after": round(after.mean, 4),
        "steps": job.progress.step,
        "job_seconds": round(job_seconds, 1),
        "checkpoint_dir": str(weights),
    }
