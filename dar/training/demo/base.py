"""The demo's base model: a small Llama, trained from random weights on the demo's reviews.

It is saved with its tokenizer as a folder that any loader of transformers reads.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dar.training.demo.languages import OPENINGS, reviews

BATCH = 96
"""Reviews per optimizer step, some 1,600 tokens."""
PEAK_LEARNING_RATE = 3e-3
VOCABULARY = 512
SPECIALS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
"""In the order of their ids: 0, 1, 2."""
IGNORED = -100
"""Label that the loss of transformers' models ignores."""


def report(**facts: object) -> None:
    """Write one JSON line to the process's own standard output, for the process that started it."""
    print(json.dumps(facts), file=sys.__stdout__, flush=True)


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens that starts every text with a beginning-of-sequence token."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIALS.values()),
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIALS)


def make_model(seed: int) -> LlamaForCausalLM:
    """A Llama of 0.7 M parameters with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def batch_of(rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels, both [rows, longest]."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
    return ids, labels


def train_base(folder: Path, *, steps: int, seed: int) -> float:
    """Train the base model; save it and the prompts of the demo's job.

    Args:
        folder: Where ``model/`` and ``prompts.jsonl`` are written; it is created.
        steps: Optimizer steps; 220 give fluent reviews.
        seed: Fixes the texts and the initial weights, and so, on one thread, the result.

    Returns:
        Mean loss of the last tenth of the steps, in nats per token.
    """
    texts = list(reviews(steps * BATCH, seed))
    tokenizer = make_tokenizer(texts[:4000])
    model = make_model(seed)
    rows = [[*ids, model.config.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.01)
    folder.mkdir(parents=True, exist_ok=True)
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            warm_up = min(1.0, (step + 1) / 20)
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = PEAK_LEARNING_RATE * warm_up * cosine
        ids, labels = batch_of(rows[step * BATCH : (step + 1) * BATCH])
        loss = model(input_ids=ids, attention_mask=(labels != IGNORED).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 5 == 0 or step + 1 == steps:
            report(step=step + 1, steps=steps, loss=losses[-1])
    save_base(folder, model, tokenizer, OPENINGS)
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def save_base(
    folder: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
) -> None:
    """Write ``model/`` and ``prompts.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
