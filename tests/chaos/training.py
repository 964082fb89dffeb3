"""The row that trains: its weights are compared bit by bit with those of an undisturbed run."""

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from safetensors.numpy import load_file

from chaos.scoreboard import Result, Row
from dar.fault_points import INSTANTS, arm
from dar.processes import free_port
from dar.protocol.status import TERMINAL
from fakes.installation import Installation

KILLS = 12
FILES = ("model.safetensors", "resume/optimizer.safetensors")


def _training() -> Result:
    folder = Path(tempfile.mkdtemp(prefix="dar-chaos-"))
    faults = folder / "faults"
    installation = Installation(folder / "home", free_port)
    try:
        base = folder / "base"
        command = [sys.executable, "-m", "dar.training.demo", "base", "--steps", "12"]
        subprocess.run([*command, "--folder", str(base)], check=True, stdout=subprocess.DEVNULL)
        installation.start_broker()
        installation.start_service()
        installation.start_reward_service()
        installation.install_model(base)
        installation.start_worker(fault_points=faults)
        file_id = str(installation.client.files.create(base / "prompts.jsonl").id)
        expected, _ = _train(installation, file_id, folder / "undisturbed")
        found, kills = _train(installation, file_id, folder / "disturbed", _strikes(faults))
    finally:
        installation.stop()
        shutil.rmtree(folder, ignore_errors=True)
    unequal = [name for name in expected if expected[name] != found.get(name)]
    figures = {"kills": kills, "compared tensors": len(expected), "unequal": len(unequal)}
    return Result(not unequal and kills >= KILLS, figures, unequal[:5])


Strike = Callable[[Installation], bool]
"""Kills something, and gives whether it did."""


def _strikes(faults: Path) -> list[Strike]:
    """A kill at each instant of a checkpoint, between kills of worker and trainer at random."""
    chance = random.Random(6)

    def at(instant: str) -> Strike:
        def strike(_: Installation) -> bool:
            arm(faults, instant)
            return True

        return strike

    def worker(installation: Installation) -> bool:
        time.sleep(chance.uniform(0, 1))
        installation.end("worker", signal.SIGKILL)
        installation.start_worker(fault_points=faults)
        return True

    def trainer(installation: Installation) -> bool:
        time.sleep(chance.uniform(0, 1))
        for process in installation.trainers():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                return True
        return False

    instants = [name for name in INSTANTS if name.startswith("checkpoint.")]
    return [one for name in instants for one in (at(name), chance.choice((worker, trainer)))]


def _train(
    installation: Installation, file_id: str, folder: Path, strikes: Sequence[Strike] = ()
) -> tuple[dict[str, bytes], int]:
    """Train a job, and strike each time it has a newer checkpoint. Gives its tensors, and kills."""
    client, left = installation.client, list(strikes)
    spec = installation.spec(file_id, checkpointing={"every_steps": 2, "keep_last": 3})
    job_id = str(client.jobs.create(**spec).id)
    step = 0
    while (job := client.jobs.retrieve(job_id)).status not in TERMINAL:
        newest = max((one.step_number for one in client.checkpoints.list(job_id)), default=0)
        if left and newest > step and left[0](installation):
            step = newest
            del left[0]
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
    return tensors, len(strikes) - len(left)


def rows() -> list[Row]:
    """One row: it takes minutes, as each trainer imports torch."""
    return [
        Row(
            "training-bit-identical",
            f"a job that trains, killed {KILLS} times, half of them at the instants of a checkpoint",
            "weights and optimizer are those of an undisturbed run, bit by bit",
            _training,
        )
    ]
