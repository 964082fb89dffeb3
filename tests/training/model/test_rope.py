"""RoPE that depends on how long a sequence is: nothing is sampled or measured across a change."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dar.errors import InvalidRequestError
from dar.protocol.model_configs import steady_length
from dar.rewards.base import RewardContext, RewardSample
from dar.training import DARConfig, DARTrainer, JobInputs
from dar.training.model import loading
from dar.training.model.reward_model import load_reward_model
from fakes import tiny_models
from fakes.recording_sink import RecordingSink
from service.jobs import model_checks

LIMIT = 24
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": LIMIT,
}
LLAMA = LONG | {"factor": 128 / LIMIT}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
ROWS = [{"prompt": "w10 w11 " * 20}, {"prompt": "w5"}, {"prompt": "w7 w8 w9"}]


def llama() -> PreTrainedModel:
    return tiny_models.policy(scale=0.4, rope_parameters=dict(LLAMA))


def phi3() -> PreTrainedModel:
    torch.manual_seed(0)
    own = tiny_models.config().to_dict() | {"model_type": "phi3", "rope_parameters": dict(LONG)}
    own |= {"original_max_position_embeddings": LIMIT, "initializer_range": 0.4}
    return Phi3ForCausalLM(Phi3Config(**own)).eval()


def dynamic() -> PreTrainedModel:
    return tiny_models.policy(
        scale=0.4, rope_parameters=dict(DYNAMIC), max_position_embeddings=LIMIT
    )


MODELS = pytest.mark.parametrize("make", [llama, phi3, dynamic])


def alone(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> float:
    """The log-probability of a completion by one plain forward pass without a cache."""
    with torch.no_grad():
        logps = (
            model(torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].log_softmax(-1)
        )
    places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return sum(logps[place, token].item() for place, token in zip(places, completion, strict=True))


@MODELS
def test_completions_have_the_log_probabilities_of_plain_passes_up_to_the_change(
    make: Callable[[], PreTrainedModel],
    config: Callable[..., DARConfig],
    tokenizer: PreTrainedTokenizerBase,
    reward: Callable[..., list[float]],
    sink: RecordingSink,
) -> None:
    args = config(behavior="policy", max_new_tokens=16)
    trainer = DARTrainer(make(), args, ROWS, reward, processing_class=tokenizer, sink=sink)
    step = trainer.preview(3)
    plain = [alone(make(), [*pair.prompt_ids], [*pair.completion_ids]) for pair in step.pairs]
    torch.testing.assert_close(step.policy_logps_B.tolist(), plain, atol=1e-3, rtol=0)
    torch.testing.assert_close(step.behavior_logps_B.tolist(), plain, atol=1e-3, rtol=0)
    assert max(pair.total for pair in step.pairs) == LIMIT
    kinds = {data["kind"] for _, _, data in sink.events}
    assert ("rope_change" in kinds) == (make is not dynamic)


@MODELS
@pytest.mark.parametrize("role", ["model", "ref_model"])
def test_completions_that_would_cross_the_change_are_refused(
    make: Callable[[], PreTrainedModel], role: str, train: Callable[..., DARTrainer]
) -> None:
    why = "do not fit into 24 tokens, " + (
        "which is" if make is dynamic else "and the model's RoPE"
    )
    with pytest.raises(InvalidRequestError, match=why):
        train(**{role: make()}, settings={"max_new_tokens": LIMIT})


@pytest.mark.parametrize("make", [llama, phi3])
@pytest.mark.parametrize("room", [0, 1])
def test_a_job_is_refused_where_its_trainer_would_refuse_it(
    make: Callable[[], PreTrainedModel],
    room: int,
    job_inputs: Callable[..., JobInputs],
    tmp_path: Path,
) -> None:
    model = make()
    files = model_checks.ModelFiles("long", tiny_models.save(model, tmp_path / "long"))
    assert steady_length(files.config) == loading.steady_length(model) == LIMIT
    rewards = {"components": [{"name": "r", "url": "https://127.0.0.1/"}]}
    spec = job_inputs({"sampling": {"max_new_tokens": LIMIT - room}, "rewards": rewards}).spec
    problems = model_checks.problems_of(spec, files, {})
    assert len(problems) == 1 - room
    assert all("24 tokens, and the model's RoPE (longrope)" in one.message for one in problems)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"rope_scaling": {"type": "su", "short_factor": [1.0]}, "original_max_position_embeddings": 9}, 9),
        ({"rope_scaling": {"type": "yarn", "short_factor": [1.0], "original_max_position_embeddings": 8}}, 8),
        ({"text_config": {"rope_parameters": {"full_attention": LONG, "sliding_attention": None}}}, LIMIT),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 8}}, None),
        ({"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 8}}, None),
        ({"rope_scaling": None}, None),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": "x"}}, None),
    ],
    ids=["su", "yarn of Phi-3", "by layers", "yarn", "llama3", "none", "damaged"],
)  # fmt: skip
def test_the_change_is_read_from_every_form_of_a_config(
    config: dict[str, Any], length: int | None
) -> None:
    assert steady_length(config) == length


def test_a_long_text_changes_no_reward_of_a_short_one(tmp_path: Path) -> None:
    halves = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = tiny_models.judge(rope_parameters=LLAMA | halves)
    judge = load_reward_model(tiny_models.save(model, tmp_path / "judge"))
    samples = [
        RewardSample(
            id=str(length),
            group_id="g",
            index=0,
            prompt="w10",
            messages=None,
            completion=" ".join(f"w{4 + place}" for place in range(length)),
            finish_reason="stop",
            completion_tokens=length,
        )
        for length in (3, 40, 2, 21, 22, 23)
    ]

    def rewards(some: list[RewardSample]) -> list[Any]:
        return asyncio.run(judge.score(some, RewardContext(step=1)))

    together = [result.reward for result in rewards(samples)]
    assert together == pytest.approx([rewards([one])[0].reward for one in samples], abs=1e-5)
