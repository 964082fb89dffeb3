"""The most memory of a trainer, by arithmetic, against what a training run really takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dar.protocol.spec import DARSpec
from fakes.tiny_models import config
from service.jobs import ingredients
from service.jobs.memory_peak import peak_memory
from service.jobs.model_checks import ModelFiles

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
TRAIN = """
import sys
import torch
from datasets import Dataset
from dar import DARConfig, DARTrainer
from fakes.tiny_models import policy, save

def status(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) * 1024

torch.set_num_threads(1)
folder, sizes = sys.argv[1], eval(sys.argv[2])
model = save(policy(**sizes), folder)
args = DARConfig(
    output_dir=f"{folder}/out", per_device_train_batch_size=12, dar_k=4, max_steps=2,
    max_new_tokens=64, alpha=0.1, beta=0.3, learning_rate=1e-4, save_strategy="no",
    report_to="none", use_cpu=True, bf16=False,
)
trainer = DARTrainer(
    model=str(model), args=args,
    train_dataset=Dataset.from_list([{"prompt": f"w{n} w{n + 1}"} for n in range(10, 22)]),
    reward_funcs=lambda prompts, completions, **_: [float(len(text)) for text in completions],
)
model_bytes = 4 * sum(p.numel() for p in trainer.model.parameters())
before = status("VmRSS") - 2 * model_bytes  # the policy and its reference are there already
trainer.train()
print("grown:", status("VmHWM") - before)
"""


@pytest.mark.slow  # trains a model of 7 million weights for two steps in a process of its own
def test_the_peak_of_a_real_run_is_near_the_arithmetic(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAIN, str(tmp_path), repr(SIZES)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    real = int(done.stdout.rpartition("grown:")[2])
    spec = DARSpec.model_validate(
        {
            "hyperparameters": {"batch_size": 12, "dar_k": 4, "alpha": 0.1, "beta": 0.3},
            "sampling": {"max_new_tokens": 64},
            "rewards": {"components": [{"name": "a", "url": "http://127.0.0.1:9/score"}]},
        }
    )
    found = peak_memory(spec, ModelFiles("tiny", tmp_path), 4)
    assert found is not None
    assert real / 2 < found.on_cpu < real * 2, (real, found.on_cpu)


def test_longer_completions_wider_batches_and_adapters_change_the_peak(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config(**SIZES).to_dict()}))
    model = ModelFiles("tiny", tmp_path)

    def peak(peft: str | None = None, precision: str = "auto", **options: int) -> int:
        sampling = {"max_new_tokens": options.pop("tokens", 64)}
        values = {"hyperparameters": options, "sampling": sampling, "precision": precision}
        lora = {"peft": {"type": peft}} if peft else {}
        found = peak_memory(DARSpec.model_validate(values | lora), model, 16)
        assert found is not None
        assert found.on_gpu <= found.on_cpu
        return found.on_cpu

    assert peak() < peak(tokens=128)
    assert peak(batch_size=2) < peak(batch_size=8)
    assert peak(batch_size=16) == peak(batch_size=1600)  # passes are bounded
    assert peak(peft="lora") < peak()
    assert peak(precision="bf16") < peak()


@pytest.mark.parametrize(
    "odd", [{"hidden_size": None}, {"hidden_size": 10**400}, {"head_dim": "4"}, {"vocab_size": 0}]
)
def test_a_config_that_makes_no_sense_has_no_peak(tmp_path: Path, odd: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **odd}))
    model = ModelFiles("tiny", tmp_path)
    assert peak_memory(DARSpec(), model, 4) is None
    assert ingredients.of_model(model)
