"""Jobs whose trainer is several processes.

The training is real, on a model of a few thousand weights.
"""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from fakes.scripted_installation import ScriptedInstallation

GOLDEN = Path(__file__).parents[1] / "training" / "golden"
PROMPTS = b'{"prompt": "w10 w20"}\n{"prompt": "w30"}\n{"prompt": "w5 w6 w7"}\n'


@pytest.fixture
def model(installation: ScriptedInstallation) -> str:
    folder = installation.home / "models" / "golden"
    shutil.copytree(GOLDEN / "tokenizer", folder, dirs_exist_ok=True)
    config = json.loads((GOLDEN / "end_to_end.json").read_text())["model_config"]
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(GOLDEN / "policy.safetensors", folder / "model.safetensors")
    return folder.name


def siblings(installation: ScriptedInstallation) -> list[psutil.Process]:
    trainers = installation.trainers()
    pids = {trainer.pid for trainer in trainers}
    return [trainer for trainer in trainers if trainer.ppid() in pids]


def shared(reward_url: str, steps: int, **resources: Any) -> dict[str, Any]:
    """A job of two processes, with a checkpoint every second step."""
    return {
        "hyperparameters": {
            "max_steps": steps,
            "batch_size": 2,
            "dar_k": 2,
            "learning_rate": 1e-3,
            "kl_budget": None,
        },
        "sampling": {"max_new_tokens": 6},
        "rewards": {"components": [{"name": "r", "url": reward_url}]},
        "checkpointing": {"every_steps": 2},
        "resources": {"processes": 2, **resources},
    }


@pytest.mark.slow  # two real attempts of two processes, each of which imports torch
def test_a_job_ends_when_its_second_process_dies_and_resumes_from_its_checkpoint(
    installation: ScriptedInstallation, reward_url: str, model: str
) -> None:
    installation.start_worker(real=True)
    job_id = installation.submit_spec(PROMPTS, shared(reward_url, 30), model=model)
    installation.until(lambda: len(installation.checkpoints(job_id)) >= 1, seconds=60)
    (sibling,) = siblings(installation)
    secret = (installation.home / "reward_secret").read_text().strip()
    assert secret not in " ".join(sibling.environ().values())
    killed_at = time.monotonic()
    sibling.send_signal(signal.SIGKILL)
    installation.until(lambda: not sibling.is_running() and not siblings(installation))
    assert time.monotonic() - killed_at < 5

    job = installation.wait(job_id, "succeeded", "failed", seconds=120)
    assert job["status"] == "succeeded", job["error"]
    messages = " ".join(installation.messages(job_id))
    assert "process 1 of the job ended with SIGKILL" in messages
    assert installation.steps(job_id) == list(range(1, 31))
    logs = {path.name for path in (installation.home / "worker" / "slot-0" / "logs").iterdir()}
    assert {f"{job_id}-1.log", f"{job_id}-1-1.log"} <= logs


@pytest.mark.slow  # a real attempt of two processes, each of which imports torch, and DeepSpeed too
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_a_job_is_cut_into_shards_as_its_strategy_says(
    installation: ScriptedInstallation, reward_url: str, model: str, strategy: str
) -> None:
    installation.start_worker(real=True)
    dar = shared(reward_url, 2, strategy=strategy)
    job_id = installation.submit_spec(PROMPTS, dar, model=model)
    job = installation.wait(job_id, "succeeded", "failed", seconds=120)
    assert job["status"] == "succeeded", job["error"]
    assert installation.steps(job_id) == [1, 2]
    (checkpoint,) = installation.checkpoints(job_id)
    assert {file["name"] for file in checkpoint["files"]} >= {"config.json", "model.safetensors"}
