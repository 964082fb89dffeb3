"""A 10-step run is resumed from each of its steps, and goes on as if nothing had happened: to the
last bit.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, TrainerCallback

from dar.training import DARTrainer
from fakes.recording_sink import RecordingSink

STEPS = 10
SETTINGS = {
    "max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1, "dar_k": 2, "max_new_tokens": 4, "learning_rate": 1e-2, "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
}  # fmt: skip
STORED = [
    {
        "prompt_ids": [2, i],
        "completion_ids": [[i, 3], [6, i, 3]][: 1 + i % 2],
        "rewards": [1.0, 0.0][: 1 + i % 2],
    }
    for i in range(10, 17)
]


@dataclass(frozen=True)
class Variant:
    """What is trained, and how."""

    is_offline: bool
    is_adapter: bool
    settings: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        data = {"train_dataset": STORED, "reward_funcs": None} if self.is_offline else {}
        adapter = LoraConfig(
            r=2, lora_alpha=8, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        return data | ({"peft_config": adapter} if self.is_adapter else {})


VARIANTS = {
    "online, full": Variant(is_offline=False, is_adapter=False, settings={}),
    "online, lora": Variant(
        is_offline=False, is_adapter=True, settings={"gradient_accumulation_steps": 2}
    ),
    "offline, full": Variant(is_offline=True, is_adapter=False, settings={"optim": "adafactor"}),
    "offline, lora": Variant(is_offline=True, is_adapter=True, settings={"logging_steps": 3}),
}


def state_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Everything in a checkpoint that is not a wall time: tensors by file and name, and JSON."""
    tensors = {
        f"{path.name}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    state = json.loads((folder / "resume" / "state.json").read_text())
    window = state["trainer"]["reporter"]["window"]
    for part in ("sums", "counts"):
        window[part] = {n: v for n, v in window[part].items() if not n.startswith("time/")}
    return tensors, state


class StoppingAfter(TrainerCallback):
    """Ends training after a step, as if the process had been stopped there."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_training_stop = state.global_step >= self._step


SLOW = pytest.mark.slow  # five runs each; two variants are in the fast lane


@pytest.mark.parametrize(
    "name", [name if "full" in name else pytest.param(name, marks=SLOW) for name in VARIANTS]
)
def test_a_run_resumed_at_any_step_goes_on_as_if_nothing_had_happened(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    new_sink: type[RecordingSink],
    tmp_path: Path,
    name: str,
) -> None:
    variant = VARIANTS[name]

    def run(resume: Path | None, sink: RecordingSink, until: int) -> Path:
        folder = tmp_path / f"from-{resume.name if resume else 'nothing'}"
        settings = {**SETTINGS, **variant.settings, "output_dir": str(folder)}
        model = make_model(hidden_size=16, intermediate_size=16, num_hidden_layers=1, scale=0.3)
        stop = StoppingAfter(until)
        train(
            resume, model=model, sink=sink, settings=settings, callbacks=[stop], **variant.arguments
        )
        return folder / "checkpoints" / f"step-{until}"

    whole = new_sink()
    run(None, whole, STEPS)
    folders = [folder for _, folder, *_ in whole.published]
    assert len(folders) == STEPS
    states = [state_of(folder) for folder in folders]
    assert any(not torch.equal(states[0][0][key], states[-1][0][key]) for key in states[0][0])
    reports = whole.deterministic_reports()
    # State for state: what is the same after the next step is the same to the end. The first resume
    # goes there itself.
    for step in range(1, STEPS):
        resumed, until = new_sink(), STEPS if step == 1 else step + 1
        torch.manual_seed(1000 + step)
        tensors, state = state_of(run(folders[step - 1], resumed, until))
        expected = states[until - 1]
        assert tensors.keys() == expected[0].keys()
        differing = [key for key in tensors if not torch.equal(tensors[key], expected[0][key])]
        assert (step, differing) == (step, [])
        assert state == expected[1]
        # a run that stops early reports what there is, which an undisturbed run does not
        steps = {s for s in range(step + 1, until + 1) if s in reports}
        assert {s: r for s, r in resumed.deterministic_reports().items() if s in reports} == {
            s: reports[s] for s in steps
        }
        assert {s: rows for s, rows in resumed.shown.items() if s in reports} == {
            s: whole.shown[s] for s in steps
        }
        assert [event for event in resumed.events if event not in whole.events] == []


def test_a_resume_makes_the_reference_from_the_base_model_and_never_from_the_checkpoint(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    sink: RecordingSink,
    new_sink: type[RecordingSink],
) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.05}
    train(sink=sink, settings=settings)
    resumed = new_sink()
    trainer = train(sink.published[0][1], sink=resumed, settings=settings)
    base = dict(make_model().named_parameters())
    reference = trainer._policy.reference
    assert reference is not None
    assert all(torch.equal(p, base[name]) for name, p in reference.named_parameters())
    assert any(not torch.equal(p, base[name]) for name, p in trainer.model.named_parameters())
    assert abs(resumed.reports[2]["dar/logps_policy"] - resumed.reports[2]["dar/logps_ref"]) > 0.1
