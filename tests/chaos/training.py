"""The row that trains: its weights are compared bit by bit with those of an undisturbed run."""

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from safetensors.numpy import load_file

from chaos.scoreboard import Result, Row
from dar.processes import free_port
from dar.protocol.status import TERMINAL
from fakes.installation import Installation

KILLS = 12
FILES = ("model.safetensors", "resume/optimizer.safetensors")


def _training() -> Result:
    folder = Path(tempfile.mkdtemp(prefix="dar-chaos-"))
    installation = Installation(folder / "home", free_port)
    try:
        base = folder / "base"
        command = [sys.executable, "-m", "dar.training.demo", "base", "--steps", "12"]
        subprocess.run([*command, "--folder", str(base)], check=True, stdout=subprocess.DEVNULL)
        installation.start_broker()
        installation.start_service()
        installation.start_reward_service()
        installation.install_model(base)
        installation.start_worker()
        file_id = str(installation.client.files.create(base / "prompts.jsonl").id)
        expected, _ = _train(installation, file_id, folder / "undisturbed", kills=0)
        found, kills = _train(installation, file_id, folder / "disturbed", kills=KILLS)
    finally:
        installation.stop()
        shutil.rmtree(folder, ignore_errors=True)
    unequal = [name for name in expected if expected[name] != found.get(name)]
    figures = {"kills": kills, "compared tensors": len(expected), "unequal": len(unequal)}
    return Result(not unequal and kills >= KILLS, figures, unequal[:5])


def _train(
    installation: Installation, file_id: str, folder: Path, *, kills: int
) -> tuple[dict[str, bytes], int]:
    """Train a job and kill worker or trainer after progress. Gives its tensors, and the kills."""
    chance = random.Random(6)
    client = installation.client
    spec = installation.spec(file_id, checkpointing={"every_steps": 2, "keep_last": 3})
    job_id = str(client.jobs.create(**spec).id)
    done, step = 0, 0
    while (job := client.jobs.retrieve(job_id)).status not in TERMINAL:
        newest = max((one.step_number for one in client.checkpoints.list(job_id)), default=0)
        if done < kills and newest > step:
            time.sleep(chance.uniform(0, 1))
            step, done = newest, done + _kill(installation, chance)
        time.sleep(0.1)
    if job.status != "succeeded":
        raise RuntimeError(f"the job is {job.status}: {job.error}")
    final = next(iter(client.checkpoints.list(job_id)))
    client.checkpoints.download(job_id, final.id, folder, include_optimizer=True)
    tensors = {
        f"{name}: {key}": value.tobytes()
        for name in FILES
        for key, value in load_file(folder / name).items()
    }
    return tensors, done


def _kill(installation: Installation, chance: random.Random) -> int:
    if chance.random() < 0.5:
        installation.end("worker", signal.SIGKILL)
        installation.start_worker()
        return 1
    for trainer in installation.trainers():
        with contextlib.suppress(psutil.NoSuchProcess):
            trainer.kill()
            return 1
    return 0


def rows() -> list[Row]:
    """One row: it takes minutes, as each trainer imports torch."""
    return [
        Row(
            "training-bit-identical",
            f"a job that trains, killed {KILLS} times, each time after a newer checkpoint",
            "weights and optimizer are those of an undisturbed run, bit by bit",
            _training,
        )
    ]
