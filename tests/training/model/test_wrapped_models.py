"""Models that are language models with further parts, as an image encoder, trained on text only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    FuyuConfig,
    FuyuForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from dar.errors import TrainingError
from dar.training import DARTrainer
from dar.training.model.loading import load_model
from fakes import tiny_models
from fakes.recording_sink import RecordingSink

SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
IMAGE = {"image_token_id": 60, "boi_token_id": 61, "eoi_token_id": 62}
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **SPECIAL,
}
GEMMA = TEXT | {"head_dim": 16, "sliding_window": 8}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3() -> PreTrainedModel:
    text = GEMMA | {"query_pre_attn_scalar": 16}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_index=60,
            **SPECIAL,
        )
    )


def gemma4() -> PreTrainedModel:
    own = {
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = VISION | {"head_dim": 8, "num_key_value_heads": 2}
    return Gemma4ForConditionalGeneration(
        Gemma4Config(text_config=GEMMA | own, vision_config=vision, **IMAGE, **SPECIAL)
    )


def got_ocr() -> PreTrainedModel:
    vision = {
        "hidden_size": 16,
        "output_channels": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        "mlp_dim": 16,
        "global_attn_indexes": [0],
    }
    text = TEXT | {"model_type": "qwen2"}
    return GotOcr2ForConditionalGeneration(
        GotOcr2Config(text_config=text, vision_config=vision, image_token_index=60)
    )


def fuyu() -> PreTrainedModel:
    text = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
    whole = FuyuConfig(text_config=text | {"model_type": "persimmon"}, patch_size=15, **text)
    return FuyuForCausalLM(whole)


def llama4() -> PreTrainedModel:
    text = TEXT | {
        "head_dim": 16,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "attention_chunk_size": 8,
    }
    vision = VISION | {
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    return Llama4ForConditionalGeneration(
        Llama4Config(text_config=text, vision_config=vision, image_token_index=60)
    )


def qwen3_5() -> PreTrainedModel:
    text = TEXT | {"head_dim": 16, "layer_types": ["full_attention"] * 2}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
    }
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))


def emu3() -> PreTrainedModel:
    vision = {
        "codebook_size": 8,
        "embed_dim": 4,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
    }
    return Emu3ForConditionalGeneration(
        Emu3Config(text_config=TEXT, vq_config=vision, vocabulary_map={"<image>": 60})
    )


def saved(make: Callable[[], PreTrainedModel], folder: Path) -> Path:
    torch.manual_seed(0)
    return tiny_models.save(make(), folder)


@pytest.mark.parametrize("make", [gemma3, gemma4, got_ocr, fuyu, llama4, qwen3_5])
def test_a_model_with_an_image_encoder_trains_and_its_config_stays_as_it_was(
    make: Callable[[], PreTrainedModel],
    train: Callable[..., DARTrainer],
    sink: RecordingSink,
    tmp_path: Path,
) -> None:
    base = saved(make, tmp_path / "base")
    # the reference is exact, and nothing is left out of what is sampled
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "behavior": "policy"}
    trainer = train(model=str(base), sink=sink, settings=settings, processing_class=None)
    assert sink.reports[1]["dar/kl_ref"] == pytest.approx(0, abs=1e-4)
    assert sink.reports[1]["dar/logps_policy"] == pytest.approx(
        sink.reports[1]["dar/logps_behavior"], abs=1e-4
    )
    load_model(base).save_pretrained(tmp_path / "untrained")
    before = json.loads((tmp_path / "untrained" / "config.json").read_text())
    after = json.loads((trainer.checkpoints / "step-1" / "config.json").read_text())
    assert after == before


def test_a_model_whose_files_lack_weights_is_refused_instead_of_starting_from_random_ones(
    tmp_path: Path,
) -> None:
    base = saved(emu3, tmp_path / "base")  # its language model's names differ from the wrapper's
    with pytest.raises(TrainingError, match=r"its weights lack .* which would be random"):
        load_model(base)
