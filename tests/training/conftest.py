import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import imports, memory
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dar.protocol.spec import JobSpec
from dar.training import DARConfig, DARTrainer, JobInputs
from fakes import reward_chaos as chaos
from fakes import tiny_models
from fakes.recording_sink import RecordingSink, ScriptedControl

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="session")
def quiet_single_thread() -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def _trainings_begin_at_once() -> Iterator[None]:
    """Let accelerate look up installed packages once, and collect no garbage.

    It does both for every training. The garbage would occupy a device, and no test has one.
    """
    with pytest.MonkeyPatch.context() as patch:
        is_available = functools.cache(imports._is_package_available)
        patch.setattr(imports, "_is_package_available", is_available)
        patch.setattr(memory, "gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture
def sink() -> RecordingSink:
    return RecordingSink()


@pytest.fixture
def new_sink() -> type[RecordingSink]:
    return RecordingSink


@pytest.fixture
def new_control() -> type[ScriptedControl]:
    return ScriptedControl


@pytest.fixture(scope="session")
def weight_cases() -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "weights.json").read_text())["cases"]


@pytest.fixture(scope="session")
def end_to_end() -> dict[str, Any]:
    return json.loads((GOLDEN / "end_to_end.json").read_text())


@pytest.fixture
def golden_model(end_to_end: dict[str, Any]) -> Callable[[str], LlamaForCausalLM]:
    def load(name: str) -> LlamaForCausalLM:
        config = dict(end_to_end["model_config"])
        config.pop("transformers_version")
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(load_file(GOLDEN / f"{name}.safetensors"))
        return model.eval()

    return load


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """64 words: <unk> <pad> <bos> <eos> w4 … w63."""
    return tiny_models.tokenizer()


@pytest.fixture
def make_model() -> Callable[..., LlamaForCausalLM]:
    return tiny_models.policy


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of a base model."""
    return tiny_models.save(tiny_models.policy(), tmp_path / "models" / "tiny")


@pytest.fixture
def job_inputs(
    base: Path, prompts: list[dict[str, Any]], tmp_path: Path
) -> Callable[..., JobInputs]:
    """A job of the base model with the given ``method.dar``."""
    training_file = tmp_path / "prompts.jsonl"

    def make(
        dar: dict[str, Any], *, rows: list[dict[str, Any]] = prompts, steps: int = 4, **fields: Any
    ) -> JobInputs:
        training_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"learning_rate": 3e-3, "batch_size": 3, "max_steps": steps}
        usual = {"hyperparameters": settings, "sampling": {"max_new_tokens": 8}}
        dar = usual | dar
        if "preset" not in dar:
            dar["hyperparameters"] = {"kl_budget": None, **dar["hyperparameters"]}
        spec = {
            "model": "tiny",
            "training_file": "file-1",
            "validation_file": "file-2" if "evaluation" in dar else None,
            "method": {"type": "dar", "dar": dar},
        }
        values: dict[str, Any] = {
            "job_id": "ftjob-1", "spec": JobSpec.model_validate(spec), "seed": 7, "total_steps": steps, "model": base,
            "adapters": (), "training_file": training_file, "work_dir": tmp_path / "work", "resume_from": None,
            "reward_secret": None, "threads": 1, "offline": True,
        }  # fmt: skip
        return JobInputs(**values | fields)

    return make


@pytest.fixture
def prompts() -> list[dict[str, Any]]:
    return [
        {"prompt": "w10 w20 w4", "answer": "a"},
        {"prompt": "w55", "answer": "b"},
        {"prompt": "w60 w32 w59 w9 w9", "answer": "c"},
        {"prompt": "w7 w8", "answer": "d"},
        {"prompt": "w33 w12 w18 w4", "answer": "e"},
    ]


def share_of_w40(completions: list[str], **columns: Any) -> list[float]:
    return [text.split().count("w40") / max(1, len(text.split())) for text in completions]


@pytest.fixture
def reward() -> Callable[..., list[float]]:
    """How much of a completion is the word w40."""
    return share_of_w40


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DARConfig]:
    def make(**overrides: Any) -> DARConfig:
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 3,
            "dar_k": 4,
            "max_new_tokens": 8,
            "max_steps": 3,
            "learning_rate": 3e-3,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "optim": "adamw_torch",
            "log_level": "error",
        }
        if {"alpha", "beta", "preset"}.isdisjoint(overrides):
            values["kl_budget"] = None
        return DARConfig(**values | overrides)

    return make


@pytest.fixture
def train(
    config: Callable[..., DARConfig],
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    reward: Callable[..., list[float]],
) -> Callable[..., DARTrainer]:
    """A trainer after its training; every argument can be replaced."""

    def run(resume: Path | None = None, **arguments: Any) -> DARTrainer:
        settings = arguments.pop("settings", {})
        values: dict[str, Any] = {
            "model": None,
            "args": config(**settings),
            "train_dataset": prompts,
            "reward_funcs": reward,
            "processing_class": tokenizer,
        } | arguments
        if values["model"] is None:
            values["model"] = make_model()
        trainer = DARTrainer(**values)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


@pytest.fixture
def run(
    train: Callable[..., DARTrainer],
    new_sink: type[RecordingSink],
    make_model: Callable[..., Any],
) -> Callable[..., tuple[DARTrainer, Any]]:
    """Train with rewards that come late; the trainer, and what it said."""

    def train_late(
        resume: Path | None = None, sink: RecordingSink = None, **settings: Any
    ) -> tuple[DARTrainer, Any]:
        sink = sink or new_sink()
        arguments = {
            name: settings.pop(name)
            for name in ("reward_funcs", "peft_config", "control", "callbacks")
            if name in settings
        }
        values = {
            "reward_funcs": chaos.late,
            "model": make_model(scale=0.3),
            "sink": sink,
        } | arguments
        return train(resume, settings=chaos.WIDE | settings, **values), sink

    return train_late


@pytest.fixture
def replay(train: Callable[..., DARTrainer]) -> Callable[..., dict[str, torch.Tensor]]:
    """Trains offline; returns the weights."""

    def run(rows: Any, **arguments: Any) -> dict[str, torch.Tensor]:
        settings = {"max_steps": 2, "per_device_train_batch_size": 2}
        settings |= arguments.pop("settings", {})
        trainer = train(train_dataset=rows, reward_funcs=None, settings=settings, **arguments)
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    return run
