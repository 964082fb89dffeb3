"""How several processes come to be: the command line, the job spec, and launchers that leave one
alone.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dar.errors import InvalidRequestError, TrainingError
from dar.protocol.spec import Resources
from dar.rewards.server import reward_server
from dar.settings import environment
from dar.training import DARTrainer
from dar.training.parallel.launch import strategy_options
from fakes import loopback, tiny_models


@pytest.fixture
def reward_url() -> Iterator[str]:
    @reward_server
    def app(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        return [text.count("w4") / 8 for text in completions]

    with loopback.serving(app) as url:
        yield f"{url}/score"


@pytest.mark.slow  # accelerate, torchrun and two trainers import torch
@pytest.mark.parametrize(
    ("how", "adapter"),
    [
        (("--cpu",), ("--use_peft",)),
        (("--cpu",), ()),
        (("--use_deepspeed", "--zero_stage", "3", "--main_process_port", "0"), ("--use_peft",)),
    ],
)
def test_accelerate_launches_two_processes_on_a_cpu(
    how: tuple[str, ...],
    adapter: tuple[str, ...],
    reward_url: str,
    prompts: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    tiny_models.save(tiny_models.policy(), tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    launch = ["accelerate.commands.launch", "--num_processes", "2", *how, "-m", "dar.training"]
    options = {
        "model_name_or_path": tmp_path / "base",
        "dataset_name": tmp_path / "prompts.jsonl",
        "reward_url": reward_url,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "dar_k": 2,
        "max_new_tokens": 4,
        "learning_rate": 0.01,
        "report_to": "none",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", *launch, *flags, "--use_cpu", *adapter],
        env=environment() | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 2/2  reward") == 1  # one process speaks for both
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    state = json.loads((checkpoint / "resume" / "state.json").read_text())
    assert state["trainer"]["environment"]["processes"] == "2"
    if adapter:
        weights = load_file(checkpoint / "adapter_model.safetensors")
        assert any("lora_B" in name and tensor.any() for name, tensor in weights.items())
    else:
        before = load_file(tmp_path / "base" / "model.safetensors")
        after = load_file(checkpoint / "model.safetensors")
        assert any(not tensor.equal(before[name]) for name, tensor in after.items())


def test_one_process_of_several_that_were_wanted_is_refused(
    train: Callable[..., DARTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InvalidRequestError, match="torchrun --nproc-per-node"):
        train()


def test_shards_need_several_processes(train: Callable[..., DARTrainer]) -> None:
    with pytest.raises(InvalidRequestError, match="there is only one") as refused:
        train(settings={"fsdp": True})
    assert refused.value.param == "fsdp"


@pytest.mark.parametrize(
    ("processes", "strategy", "reason"),
    [(1, "fsdp", "the job has one"), (1, "zero3", "the job has one")],
)
def test_a_strategy_that_cannot_be_used_is_refused(
    processes: int, strategy: Any, reason: str
) -> None:
    with pytest.raises(TrainingError, match=reason) as refused:
        strategy_options(Resources(processes=processes, strategy=strategy))
    assert refused.value.param == "method.dar.resources.strategy"


def test_a_job_may_leave_the_strategy_open() -> None:
    assert strategy_options(Resources(processes=2)) == {}
    assert strategy_options(Resources(processes=2, strategy="fsdp")) == {"fsdp": True}
