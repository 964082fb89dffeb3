"""Models of a few thousand weights, and their tokenizer of 64 words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

TOKENIZER = Path(__file__).parents[1] / "training" / "golden" / "tokenizer"


def tokenizer() -> PreTrainedTokenizerBase:
    """<unk> <pad> <bos> <eos> w4 … w63."""
    return AutoTokenizer.from_pretrained(TOKENIZER)


def config(**overrides: Any) -> LlamaConfig:
    values: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 128, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    return LlamaConfig(**values | overrides)


def policy(seed: int = 0, *, scale: float = 0.02, **overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(initializer_range=scale, **overrides)).eval()


def judge(seed: int = 0, **overrides: Any) -> LlamaForSequenceClassification:
    """A reward model."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "initializer_range": 0.5,
        "num_labels": 1,
        "pad_token_id": None,
    }
    return LlamaForSequenceClassification(config(**values | overrides))


def save(model: PreTrainedModel, folder: Path) -> Path:
    """The model and the tokenizer, in a folder of their own."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


class Writing(LlamaForCausalLM):
    """Writes the tokens of ``script`` after position ``start``, whatever it reads."""

    script: tuple[int, ...] = ()
    start = 0

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: int = 0, **more: Any
    ) -> CausalLMOutputWithPast:
        output = super().forward(
            input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, **more
        )
        logits, positions = output.logits, position_ids
        places = positions[:, positions.shape[1] - logits.shape[1] :] - self.start
        for place, token in enumerate(self.script):
            lift = 100.0 * (places == place)
            one_hot = nn.functional.one_hot(torch.tensor(token), logits.shape[2])
            logits = logits + lift.unsqueeze(-1) * one_hot
        output.logits = logits
        return output


def writing(script: Sequence[int], start: int, **overrides: Any) -> Writing:
    torch.manual_seed(0)
    model = Writing(config(**overrides)).eval()
    model.script, model.start = tuple(script), start
    return model
