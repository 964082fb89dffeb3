"""The service's checks of a model's files and the trainer agree about a real model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar.errors import DARError
from dar.protocol import spec_checks
from dar.protocol.model_configs import context_of, labels_of
from dar.training import JobInputs, NullControl, train_job
from dar.training.model.loading import context_length
from fakes import tiny_models
from fakes.recording_sink import RecordingSink
from service.jobs import model_checks

REWARDS = {"components": [{"name": "r", "kind": "builtin", "fn": "length_penalty", "params": {"target": 2}}]}  # fmt: skip
TALK = [{"role": "user", "content": "w5"}]


def lora(targets: str | list[str]) -> dict[str, Any]:
    return {"peft": {"type": "lora", "r": 2, "target_modules": targets}}


@pytest.mark.parametrize(
    ("dar", "prompt", "is_refused"),
    [
        ({"sampling": {"max_new_tokens": 127}}, "w5", False),
        ({"sampling": {"max_new_tokens": 128}}, "w5", True),
        ({"sampling": {"max_new_tokens": 4, "max_length": 4}}, "w5", True),
        ({"sampling": {"max_new_tokens": 4, "max_length": 5}}, "w5", False),
        ({"sampling": {"max_new_tokens": 200, "max_prompt_length": 8}}, "w5", False),
        ({}, TALK, True),
        (lora("all-linear"), "w5", False),
        (lora(["q_proj", "down_proj"]), "w5", False),
        (lora(["embed_tokens"]), "w5", False),
        (lora(["lm_head"]), "w5", False),
        (lora(["q_prj"]), "w5", True),
        (lora(["input_layernorm"]), "w5", True),
        (lora(["self_attn"]), "w5", True),
        (lora("q_proj"), "w5", True),
        (lora(r".*\.q_proj"), "w5", False),
        (lora(r"model\.layers\.1\.mlp\..*_proj"), "w5", False),
        (lora("(q_proj"), "w5", True),
    ],
    ids=str,
)
def test_what_is_refused_at_submission_is_what_the_trainer_refuses(
    job_inputs: Callable[..., JobInputs],
    base: Path,
    dar: dict[str, Any],
    prompt: Any,
    is_refused: bool,
) -> None:
    (base / "chat_template.jinja").unlink()
    settings = {"max_steps": 1, "batch_size": 1, "dar_k": 2}
    usual = {"rewards": REWARDS, "hyperparameters": settings, "sampling": {"max_new_tokens": 2}}
    inputs = job_inputs(usual | dar, rows=[{"prompt": prompt}], steps=1)
    chats = {"training_file": None if isinstance(prompt, str) else 1}
    problems = spec_checks.problems_of(inputs.spec) or model_checks.problems_of(
        inputs.spec, model_checks.ModelFiles("tiny", base), chats
    )
    refused_by_trainer = False
    try:
        train_job(inputs, RecordingSink(), NullControl())
    except DARError as error:
        refused_by_trainer = not error.retryable
    assert refused_by_trainer == is_refused
    assert bool(problems) == is_refused, problems


def test_a_config_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    policy = tiny_models.policy()
    folder = tiny_models.save(policy, tmp_path / "policy")
    assert context_of(model_checks.ModelFiles("m", folder).config) == context_length(policy) == 128
    judge = tiny_models.save(tiny_models.judge(), tmp_path / "judge")
    assert labels_of(model_checks.ModelFiles("m", judge).config) == 1
    pair = tiny_models.save(tiny_models.judge(num_labels=2), tmp_path / "pair")
    assert labels_of(model_checks.ModelFiles("m", pair).config) == 2
    assert context_of({"model_type": "gpt2", "n_positions": 9}) == 9
    assert context_of({"text_config": {"max_position_embeddings": 7}, "n_positions": 9}) == 7
    assert context_of({"text_config": {}, "max_position_embeddings": 9}) is None
    assert labels_of({}) is None
