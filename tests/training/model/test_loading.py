"""Files of a model that do not say what they seem to: refused by name, or set right."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dar.errors import TrainingError
from dar.training import DARConfig, DARTrainer
from dar.training.model.loading import load_model
from dar.training.model.reward_model import load_reward_model
from fakes import tiny_models
from fakes.recording_sink import RecordingSink


def changed(folder: Path, added: Sequence[str] = (), **config: Any) -> Path:
    """The folder of a model with further weights in its file, and other values in its config."""
    file = folder / "model.safetensors"
    save_file(
        load_file(file) | {name: torch.ones(32) for name in added}, file, metadata={"format": "pt"}
    )
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def gpt_j() -> PreTrainedModel:
    return GPTJForCausalLM(
        GPTJConfig(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64, rotary_dim=4)
    )


@pytest.mark.parametrize(
    ("make", "added", "config", "why"),
    [
        (tiny_models.policy, [], {"num_hidden_layers": 1}, r"model\.layers\.1\..* and 6 more"),
        (tiny_models.policy, ["v_head.summary.weight"], {}, "v_head.summary.weight, which"),
        (
            tiny_models.policy,
            ["model.layers.0.self_attn.q_proj.bias"],
            {},
            "q_proj",
        ),
        (tiny_models.judge, [], {"tie_word_embeddings": True}, "score.weight, which would be dro"),
    ],
    ids=["fewer layers", "value head", "bias", "tied classifier"],
)
def test_weights_that_the_model_has_no_place_for_are_refused_by_name(
    make: Callable[[], PreTrainedModel],
    added: list[str],
    config: dict[str, Any],
    why: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(TrainingError, match=why):
        load_model(changed(tiny_models.save(make(), tmp_path / "odd"), added, **config))


def test_a_reward_model_may_do_without_other_heads_and_nothing_else(
    tmp_path: Path,
) -> None:
    folder = tiny_models.save(tiny_models.judge(), tmp_path / "judge")
    load_reward_model(changed(folder, ["lm_head.weight", "cls.predictions.bias"]))
    with pytest.raises(TrainingError, match=r"no reward model of the size .* model\.layers\.1\."):
        load_reward_model(changed(folder, num_hidden_layers=1))


def test_what_older_files_hold_and_models_compute_today_is_left_out(tmp_path: Path) -> None:
    old = [
        "transformer.h.0.attn.bias",
        "transformer.h.0.attn.masked_bias",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "transformer.position_ids",
    ]
    load_model(changed(tiny_models.save(gpt_j(), tmp_path / "old"), old))


def test_a_config_that_ties_two_layers_of_the_files_is_set_right(tmp_path: Path) -> None:
    folder = tiny_models.save(tiny_models.policy(), tmp_path / "two")
    model = load_model(changed(folder, tie_word_embeddings=True))
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("is_file", [True, False], ids=["file", "in memory"])
def test_options_of_outputs_neither_change_training_nor_keep_it_from_being_saved(
    is_file: bool,
    make_model: Callable[..., LlamaForCausalLM],
    train: Callable[..., DARTrainer],
    sink: RecordingSink,
    tmp_path: Path,
) -> None:
    odd: dict[str, Any] = {"output_hidden_states": True, "return_dict": False, "torchscript": True}
    if is_file:
        folder = tiny_models.save(make_model(), tmp_path / "odd")
        model: Any = str(changed(folder, **odd, output_attentions=True))
    else:
        model = make_model()
        for name, value in odd.items():
            setattr(model.config, name, value)
        model.config._output_attentions = True
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "behavior": "policy"}
    trainer = train(model=model, sink=sink, settings=settings)
    assert sink.reports[1]["dar/logps_policy"] == pytest.approx(
        sink.reports[1]["dar/logps_behavior"], abs=1e-4
    )
    saved = AutoModelForCausalLM.from_pretrained(trainer.checkpoints / "step-1")
    assert len(saved(torch.tensor([[4, 5]]), use_cache=False).to_tuple()) == 1


def test_a_reward_model_gives_its_numbers_whatever_it_would_return(tmp_path: Path) -> None:
    folder = tiny_models.save(tiny_models.judge(), tmp_path / "judge")
    judge = load_reward_model(changed(folder, return_dict=False, output_hidden_states=True))
    plain = tiny_models.judge()(torch.tensor([[4, 5, 6]])).logits[:, 0]
    torch.testing.assert_close(judge._forward([[4, 5, 6]]), plain)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: setattr(model.config, "note", object()), "the config of the model"),
        (lambda model: setattr(model.generation_config, "stop_strings", {1}), "generation config"),
        (lambda model: setattr(model.generation_config, "max_new_tokens", -1), "generation config"),
        (lambda model: setattr(model.generation_config, "eos_token_id", [2, None]), r"\[2, None\]"),
        (lambda model: setattr(model.generation_config, "eos_token_id", "2"), "eos_token_id '2'"),
        (lambda model: setattr(model.generation_config, "eos_token_id", 2.0), "eos_token_id 2.0"),
    ],
    ids=["object", "set", "negative", "null", "text", "float"],
)
def test_configs_that_could_not_be_saved_or_sampled_with_are_refused_before_training(
    change: Callable[[Any], None],
    why: str,
    make_model: Callable[..., LlamaForCausalLM],
    config: Callable[..., DARConfig],
    prompts: list[dict[str, Any]],
    reward: Callable[..., list[float]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = make_model()
    change(model)
    with pytest.raises(TrainingError, match=why):
        DARTrainer(model, config(), prompts, reward, processing_class=tokenizer)


@pytest.mark.parametrize("content", [b'{"eos_token_id": [3, 7], "pad', b"\xff\xfe{}", b""])
def test_a_damaged_generation_config_is_refused_as_its_end_tokens_would_be_lost(
    base: Path, content: bytes
) -> None:
    file = base / "generation_config.json"
    file.write_bytes(content)
    with pytest.raises(TrainingError, match=r"the generation_config.json of the model '.*' is dam"):
        load_model(base)
    file.unlink()
    load_model(base)
