"""Reward models: what they read of a sample, and what they answer."""

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from dar.errors import (
    CheckpointError,
    InvalidRequestError,
    RewardMisconfiguredError,
    TrainingError,
)
from dar.protocol.samples import FinishReason
from dar.rewards.base import Failed, RewardContext, RewardResult, RewardSample, Scored
from dar.training import DARConfig, DARTrainer
from dar.training.model.reward_model import RewardModel, load_reward_model
from fakes import tiny_models
from fakes.recording_sink import RecordingSink

TEMPLATE = "{% for m in messages %}{{ '<bos>' if loop.first }} {{ m['role'] }} {{ m['content'] }} <eos>{% endfor %}"


def classifier(seed: int = 0, **overrides: Any) -> LlamaForSequenceClassification:
    return tiny_models.judge(seed, **{"max_position_embeddings": 32} | overrides)


def sample(
    completion: str,
    prompt: str | Sequence[dict[str, str]] = "w10 w11",
    *,
    finish_reason: FinishReason = "stop",
) -> RewardSample:
    is_text = isinstance(prompt, str)
    return RewardSample(
        id=completion + str(prompt),
        group_id="g",
        index=0,
        prompt=prompt if is_text else None,
        messages=None if is_text else prompt,
        completion=completion,
        finish_reason=finish_reason,
        completion_tokens=1,
    )


def score(model: RewardModel, samples: Sequence[RewardSample]) -> list[RewardResult]:
    return asyncio.run(model.score(samples, RewardContext(step=1)))


def rewards(model: RewardModel, samples: Sequence[RewardSample]) -> list[float]:
    results = score(model, samples)
    assert all(isinstance(result, Scored) for result in results), results
    return [result.reward for result in results if isinstance(result, Scored)]


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pad", [None, 1, 3], ids=["no padding token", "own", "that of EOS"])
def test_neighbours_in_the_batch_change_no_reward(
    tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, pad: int | None
) -> None:
    source = RewardModel(classifier(pad_token_id=pad).to(dtype), tokenizer)
    texts = ["w4", "w5 w6 w7 w8 w9 w10 w11", "w12 w13 <pad>", "w4 w5 w6"]
    samples = [sample(text) for text in texts]
    alone = [rewards(source, [one])[0] for one in samples]
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 5e-2
    assert rewards(source, samples) == pytest.approx(alone, abs=tolerance)
    assert rewards(source, samples[::-1]) == pytest.approx(alone[::-1], abs=tolerance)
    assert len({round(reward, 2) for reward in alone}) == len(alone)


def test_the_reward_is_what_the_classifier_says_of_the_last_token(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = classifier()
    source = RewardModel(model, tokenizer)
    text = torch.tensor([[*ids(tokenizer, "<bos> w10 w11 w4 w5"), 3]])
    expected = model.score(model.model(text).last_hidden_state[:, -1]).item()
    samples = [sample(" w4 w5", "<bos> w10 w11"), sample("w6")]
    assert rewards(source, samples)[0] == pytest.approx(expected, abs=1e-5)


def test_an_encoder_scores_too(tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=1,
        initializer_range=0.5,
        pad_token_id=1,
    )
    source = RewardModel(BertForSequenceClassification(config), tokenizer)
    samples = [sample("w4"), sample("w5 w6 w7 w8 w9"), sample("w4")]
    first, second, again = rewards(source, samples)
    assert first == pytest.approx(again, abs=1e-6)
    assert first == pytest.approx(rewards(source, samples[:1])[0], abs=1e-5)
    assert abs(first - second) > 1e-3


@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [
        (RobertaConfig, RobertaForSequenceClassification),
        (XLMRobertaConfig, XLMRobertaForSequenceClassification),
        (MPNetConfig, MPNetForSequenceClassification),
    ],
)
def test_an_encoder_that_counts_positions_from_behind_its_padding_reads_as_far_as_they_go(
    tokenizer: PreTrainedTokenizerBase, config_class: Any, model_class: Any
) -> None:
    config = config_class(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=34, num_labels=1, pad_token_id=1,
    )  # fmt: skip
    source = RewardModel(model_class(config), tokenizer)
    long = sample(" w20" * 50)
    assert len(source.encode(long)) == 32
    assert len(rewards(source, [long, sample("w4")])) == 2


def test_a_text_that_is_too_long_loses_its_beginning_and_keeps_the_end_of_the_completion(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    source = RewardModel(classifier(), tokenizer, max_length=6)
    kept = source.encode(sample(" w20 w21 w22", "<bos> w10 w11 w12 w13"))
    assert kept == [2, *ids(tokenizer, "w13 w20 w21 w22"), 3]
    long = source.encode(sample(" w20 w21 w22 w23 w24 w25 w26", "<bos> w10"))
    assert long == [2, *ids(tokenizer, "w23 w24 w25 w26"), 3]


def test_only_a_completion_that_came_to_its_end_is_closed(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    source = RewardModel(classifier(), tokenizer)
    assert source.encode(sample(" w20"))[-1] == 3
    assert source.encode(sample(" w20", finish_reason="length"))[-1] == ids(tokenizer, "w20")[0]
    closed, cut = rewards(source, [sample(" w20"), sample(" w20", finish_reason="length")])
    assert abs(closed - cut) > 1e-3


def test_a_conversation_is_laid_out_by_the_reward_models_own_template(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    own.chat_template = TEMPLATE.replace(
        "m['role']", "{'user': 'w60', 'assistant': 'w61', 'system': 'w62'}[m['role']]"
    )
    turns = [
        {"role": "system", "content": "w4"},
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7"},
    ]
    whole = RewardModel(classifier(), own).encode(sample("w8", turns))
    expected = "<bos> w62 w4 <eos> w60 w5 <eos> w61 w6 <eos> w60 w7 <eos> w61 w8 <eos>"
    assert whole == ids(own, expected)
    # What is too long loses its earliest turns first, but never what stands before them.
    shorter = RewardModel(classifier(), own, max_length=12).encode(sample("w8", turns))
    assert shorter == ids(own, "<bos> w62 w4 <eos> w60 w7 <eos> w61 w8 <eos>")
    continued = RewardModel(classifier(), own).encode(sample(" w8", turns[1:3]))
    assert continued == ids(own, "<bos> w60 w5 <eos> w61 w6 w8 <eos>")


def test_conversations_without_a_template_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    bare = AutoTokenizer.from_pretrained(tmp_path)
    bare.chat_template = None
    conversation = sample("w4", [{"role": "user", "content": "w5"}])
    with pytest.raises(RewardMisconfiguredError, match="has no chat template"):
        score(RewardModel(classifier(), bare), [conversation])


def test_a_reward_that_is_no_number_is_a_failure(tokenizer: PreTrainedTokenizerBase) -> None:
    model = classifier()
    source = RewardModel(model, tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[20] = math.nan
    broken, whole = score(source, [sample(" w20"), sample(" w21")])
    assert isinstance(broken, Failed)
    assert broken.code == "nonfinite"
    assert isinstance(whole, Scored)


def test_a_text_without_tokens_is_a_failure_and_harms_no_other(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    source = RewardModel(classifier(), tokenizer)
    empty, other = score(source, [sample("", "", finish_reason="length"), sample("w5")])
    assert isinstance(empty, Failed)
    assert empty.code == "no_tokens"
    assert isinstance(other, Scored)
    assert other.reward == pytest.approx(rewards(source, [sample("w5")])[0], abs=1e-6)


def test_only_one_label_is_a_reward(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidRequestError, match="gives 2 numbers per text"):
        RewardModel(classifier(num_labels=2), tokenizer)


@pytest.fixture
def saved(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Path]:
    def save(name: str = "reward", model: Any = None, **overrides: Any) -> Path:
        folder = tmp_path / name
        (model or classifier(**overrides)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def test_a_model_without_a_head_is_no_reward_model(saved: Callable[..., Path]) -> None:
    config = classifier().config
    config.num_labels = 1
    folder = saved(model=LlamaForCausalLM(config))
    with pytest.raises(TrainingError, match=r"is no reward model: its weights lack score\.weight"):
        load_reward_model(folder)


def test_a_reward_model_runs_no_code_and_reads_no_pickle(saved: Callable[..., Path]) -> None:
    folder = saved()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(TrainingError, match="asks to run its own code"):
        load_reward_model(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(TrainingError, match="cannot be loaded as a sequence classifier"):
        load_reward_model(folder)


def test_a_policy_is_trained_on_a_reward_model_beside_a_function(
    train: Callable[..., DARTrainer], saved: Callable[..., Path], sink: RecordingSink
) -> None:
    train(
        sink=sink,
        reward_model=str(saved(max_position_embeddings=128)),
        reward_weights=[0.5, 2.0],
        settings={"max_steps": 1},
    )
    for row in sink.shown[1]:
        assert list(row.components) == ["share_of_w40", "reward_model"]
        total = 0.5 * row.components["share_of_w40"] + 2 * row.components["reward_model"]
        assert row.reward == pytest.approx(total)
    assert "rewards/reward_model/mean" in sink.reports[1]
    assert sink.reports[1]["dar/rewards_std"] > 0


def test_several_reward_models_have_tokenizers_of_their_own(
    train: Callable[..., DARTrainer],
    tokenizer: PreTrainedTokenizerBase,
    saved: Callable[..., Path],
    sink: RecordingSink,
) -> None:
    models = [str(saved()), classifier(1)]
    train(
        sink=sink,
        reward_funcs=None,
        reward_model=models,
        reward_processing_class=[None, tokenizer],
        settings={"max_steps": 1},
    )
    assert list(sink.shown[1][0].components) == ["reward_model", "reward_model_2"]
    with pytest.raises(InvalidRequestError, match=r"1 tokenizers .* for 2 reward models"):
        train(reward_model=models, reward_processing_class=tokenizer)
    with pytest.raises(InvalidRequestError, match="both name a reward model"):
        train(reward_model=models, settings={"reward_model_path": "elsewhere"})


def test_a_checkpoint_goes_on_with_the_same_reward_model_only(
    train: Callable[..., DARTrainer], saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved()
    settings = {"reward_model_path": str(folder), "save_strategy": "steps", "save_steps": 1}
    trainer = train(reward_funcs=None, settings={**settings, "max_steps": 2})
    first = trainer.checkpoints / "step-1"
    moved = folder.rename(tmp_path / "moved")
    settings["reward_model_path"] = str(moved)
    train(resume=first, reward_funcs=None, settings={**settings, "max_steps": 2})
    weights = load_file(moved / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match="the model of the reward reward_model has other weights"
    ):
        train(resume=first, reward_funcs=None, settings={**settings, "max_steps": 2})


def test_the_reward_model_is_frozen_and_scores_in_evaluation_mode(
    train: Callable[..., DARTrainer],
    tokenizer: PreTrainedTokenizerBase,
    config: Callable[..., DARConfig],
) -> None:
    model = classifier(attention_dropout=0.9).train()
    before = [p.detach().clone() for p in model.parameters()]
    train(
        reward_funcs=None,
        reward_model=model,
        reward_processing_class=tokenizer,
        settings={"max_steps": 2},
    )
    assert not model.training
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_reward_model_keeps_the_number_format_it_was_saved_in(
    train: Callable[..., DARTrainer], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = classifier().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    trainer = train(
        reward_funcs=None,
        reward_model=str(tmp_path / "half"),
        reward_processing_class=tokenizer,
        settings={"max_steps": 1},
    )
    assert trainer.memory()["reward models"] == 2 * sum(p.numel() for p in model.parameters())
