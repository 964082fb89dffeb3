"""What somebody who wants to train has in a folder: a policy, a judge, prompts and rewards."""

import json
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Tokenizer,
)

JUDGE = """
import asyncio, os, signal, sys
from pathlib import Path

def short(prompts, completions, **columns):
    return [-len(text) / 40 for text in completions]

def spread(prompts, completions, **columns):
    return [float(sum(map(ord, text)) % 7) for text in completions]

def equal(prompts, completions, **columns):
    return [1.0] * len(completions)

def failing(prompts, completions, **columns):
    return columns["answer"]

def small(prompts, completions, **columns):
    return [1e-4 * len(set(text)) for text in completions]

def silent(prompts, completions, **columns):
    return [None] * len(completions)

def broken(prompts, completions, **columns):
    return [float("nan") if i == 1 else 0.0 for i in range(len(completions))]

def leaving(prompts, completions, **columns):
    sys.exit(3)

def cancelled(prompts, completions, **columns):
    raise asyncio.CancelledError("mine")

def ended(prompts, completions, **columns):
    return [next(iter(()))]

def interrupting(prompts, completions, **columns):
    Path("scored").write_text(Path("scored").read_text() + "." if Path("scored").exists() else ".")
    if len(Path("scored").read_text()) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return short(prompts, completions)

def talking(prompts, completions, **columns):
    print("scored")
    return short(prompts, completions)

calls = []

def hanging_up(prompts, completions, **columns):
    calls.append(len(completions))
    for _ in range(2 if len(calls) > 1 else 0):
        os.kill(os.getpid(), signal.SIGHUP)
    return short(prompts, completions)

number = 7
"""
QWEN = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 256, "eos_token_id": 258,
}  # fmt: skip


def byte_tokenizer() -> Qwen2Tokenizer:
    """One token for each byte, and the special tokens of Qwen2."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {text: i for i, text in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=special[2], pad_token=special[0])


def fill(folder: Path) -> None:
    """Write all of it into ``folder``."""
    torch.manual_seed(0)
    for name, model in (
        ("policy", Qwen2ForCausalLM(Qwen2Config(**QWEN))),
        ("judge-model", Qwen2ForSequenceClassification(Qwen2Config(**QWEN, num_labels=1))),
    ):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    rows = [
        {"prompt": f"The {noun} was"} for noun in ("soup", "film", "walk", "song", "room", "tea")
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "judge.py").write_text(JUDGE)


def command(*more: str, **options: object) -> list[str]:
    """Arguments of a short run in that folder."""
    values = {
        "model_name_or_path": "policy", "dataset_name": "prompts.jsonl", "output_dir": "out", "max_steps": 2,
        "max_new_tokens": 4, "per_device_train_batch_size": 2, "reward_function": "judge:short", "use_cpu": True,
    } | options  # fmt: skip
    flags = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return [*flags, *more]
