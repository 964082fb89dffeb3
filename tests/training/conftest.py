import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dar.protocol.checkpoints import Manifest
from dar.protocol.metrics import is_reproducible
from dar.protocol.samples import ReportedSample
from dar.training import DARConfig, DARTrainer
from dar.training.report.sink import StopKind
from fakes import reward_chaos as chaos

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="session")
def quiet_single_thread() -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


class RecordingSink:
    """Keeps everything it is told."""

    def __init__(self) -> None:
        self.reports: dict[int, dict[str, float]] = {}
        self.shown: dict[int, list[ReportedSample]] = {}
        self.events: list[tuple[str, str, Mapping[str, Any] | None]] = []
        self.requests: list[tuple[int, list[Any], list[Any]]] = []
        self.phases: list[tuple[str, int, str | None]] = []
        self.published: list[tuple[int, Path, Manifest, str]] = []
        self.seq = 0

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.seq += 1
        self.reports.setdefault(step, {}).update(values)

    def samples(self, step: int, samples: Sequence[ReportedSample]) -> None:
        self.seq += 1
        self.shown[step] = list(samples)

    def rewards(self, step: int, requests: Sequence[Any], failures: Sequence[Any]) -> None:
        self.seq += 1
        self.requests.append((step, list(requests), list(failures)))

    def event(self, level: str, message: str, data: Mapping[str, Any] | None = None) -> None:
        self.seq += 1
        self.events.append((level, message, data))

    def phase(self, phase: str, step: int, message: str | None = None) -> None:
        self.phases.append((phase, step, message))

    def flush(self) -> int:
        return self.seq

    def checkpoint(self, step: int, folder: Path, manifest: Manifest, manifest_sha256: str) -> None:
        self.published.append((step, folder, manifest, manifest_sha256))

    def deterministic_reports(self) -> dict[int, dict[str, float]]:
        """Without wall times, and without what depends on how requests were put together."""
        return {
            step: {name: value for name, value in values.items() if is_reproducible(name)}
            for step, values in self.reports.items()
        }


class ScriptedControl:
    """Requests something from the n-th question on."""

    def __init__(self, request: StopKind, after: Callable[[], bool]) -> None:
        self._request = request
        self._after = after

    def requested(self) -> StopKind | None:
        return self._request if self._after() else None


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
    return AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture
def make_model() -> Callable[..., LlamaForCausalLM]:
    def make(seed: int = 0, *, scale: float = 0.02, **overrides: Any) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        values: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": scale,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 3,
        }
        return LlamaForCausalLM(LlamaConfig(**values | overrides)).eval()

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
    new_sink: Callable[[], Any],
    make_model: Callable[..., Any],
) -> Callable[..., tuple[DARTrainer, Any]]:
    """Train with rewards that come late; the trainer, and what it said."""

    def train_late(
        resume: Path | None = None, sink: Any = None, **settings: Any
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
