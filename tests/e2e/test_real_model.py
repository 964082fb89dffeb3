"""A real instruction model, with its own tokenizer and chat template, in a real installation.

Models of a few thousand weights have neither a byte-level vocabulary nor a template that adds a
system message, and their text ends by chance. What the trainer reports is computed again here, by
transformers alone.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dar.protocol.samples import Sample
from fakes.installation import Installation

QUESTIONS = [
    "What is the capital of France? Answer with one word.",
    "Is the sky blue? Answer yes or no.",
]
STEPS, K = 2, 4


@pytest.fixture
def model(installation: Installation, smollm2: Path) -> Iterator[str]:
    """The name of the model in the installation, where it is a link."""
    link = installation.home / "models" / "smollm2"
    link.symlink_to(smollm2)
    yield link.name
    link.unlink()


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def log_probability(model: Any, tokenizer: Any, question: str, sample: Sample) -> float | None:
    """Of a completion and its end after the question in the model's own template, in nats.

    None: the model wrote the text in other tokens than those that the tokenizer makes of it.
    """
    rendered = tokenizer.apply_chat_template(
        chat(question), add_generation_prompt=True, tokenize=False
    )
    end = tokenizer.eos_token if sample.finish_reason == "stop" else ""
    before, after = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (rendered, sample.completion + end)
    )
    if len(after) != sample.completion_tokens:
        return None
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    chosen = logits.log_softmax(-1)[range(len(after)), after]
    return float(chosen.sum())


@pytest.mark.slow  # a model of 135 million weights is trained; before the first time it is downloaded
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
def test_a_real_instruction_model_learns_through_its_own_chat_template(
    installation: Installation,
    model: str,
    smollm2: Path,
    serve: Callable[..., str],
    tmp_path: Path,
) -> None:
    seen: list[dict[str, Any]] = []

    def short(_: Mapping[str, str], body: bytes) -> tuple[int, Any]:
        """Prefers short answers."""
        asked = json.loads(body)
        seen.extend(asked["samples"])
        rewards = [-len(sample["completion"]) / 40 for sample in asked["samples"]]
        return 200, {"request_id": asked["request_id"], "rewards": rewards}

    client = installation.client
    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(json.dumps({"prompt": chat(one)}) + "\n" for one in QUESTIONS))
    spec = installation.spec(
        client.files.create(rows).id,
        hyperparameters={"batch_size": 2, "dar_k": K, "max_steps": STEPS, "learning_rate": 1e-3},
        sampling={"max_new_tokens": 24},
        rewards={"components": [{"name": "short", "url": serve(short)}]},
        checkpointing={"every_steps": STEPS},
        peft={"type": "lora", "r": 8},
    )
    job = installation.until_done(client.jobs.create(**spec | {"model": model}).id, 600)
    assert job.status == "succeeded", job.error

    assert {sample["messages"][-1]["content"] for sample in seen} == set(QUESTIONS)
    assert not any("<|im_" in sample["completion"] for sample in seen)
    series = client.jobs.metrics(job.id).series
    values = [value for one in series.values() for value in one.value]
    assert all(value is not None and math.isfinite(value) for value in values)

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    samples = list(client.jobs.samples(job.id))
    assert len(samples) == STEPS * 2 * K
    first = [sample for sample in samples if sample.step == 1]
    assert all(sample.logp_policy == sample.logp_ref for sample in first)
    assert "stop" in {sample.finish_reason for sample in samples}
    compared: list[tuple[str, Sample]] = []
    for sample in samples:
        (question,) = (one for one in QUESTIONS if one in sample.prompt)
        expected = log_probability(base, tokenizer, question, sample)
        if expected is not None:
            compared.append((question, sample))
            assert sample.logp_ref == pytest.approx(expected, rel=1e-3, abs=0.02)
    assert "stop" in {sample.finish_reason for _, sample in compared}
    last = [sample for sample in samples if sample.step == STEPS]
    assert any(sample.logp_policy != sample.logp_ref for sample in last)

    (checkpoint,) = client.checkpoints.list(job.id)
    folder = client.checkpoints.download(job.id, checkpoint.id, tmp_path / "weights")
    trained = PeftModel.from_pretrained(base, str(folder)).eval()
    moved = [log_probability(trained, tokenizer, *pair) for pair in compared[:2]]
    assert moved != pytest.approx([sample.logp_ref for _, sample in compared[:2]], abs=1e-3)
    own = AutoTokenizer.from_pretrained(folder)
    asked = own.apply_chat_template(
        chat(QUESTIONS[0]), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = trained.generate(**asked, max_new_tokens=24, do_sample=False)
    answer = own.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.strip()
