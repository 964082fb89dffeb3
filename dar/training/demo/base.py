"""The torch part of the demo: ``python -m dar.training.demo base`` and ``… sample``, ``… brackets`` and ``… judge``.

``base`` trains a small Llama on the little language of `dar.training.demo.reviews`, from random weights, and writes it with
its tokenizer as a folder that any loader of transformers reads. ``sample`` continues prompts with saved models.
``brackets`` writes the base model of `dar.training.demo.brackets`, and ``judge`` compares saved models with its optimum. All
report on stdout as JSON lines, so that the command that started them can draw progress and use the result.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from dar.training.config.config import DARConfig
from dar.training.demo.brackets import Brackets
from dar.training.demo.judge import PROMPTS
from dar.training.demo.reviews import OPENINGS, reviews
from dar.training.parallel import deepspeed_config

BATCH = 96
"""Reviews per optimizer step, some 1,600 tokens."""
PEAK_LEARNING_RATE = 3e-3
VOCABULARY = 512
SPECIALS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
"""In the order of their ids: 0, 1, 2."""
IGNORED = -100
"""Label that the loss of transformers' models leaves out."""


def report(**facts: object) -> None:
    """Tell the starting process something: one JSON line on the process's own standard output."""
    print(json.dumps(facts), file=sys.__stdout__, flush=True)


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens that puts the beginning-of-sequence token in front of every text."""
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
        folder: Gets ``model/`` and ``prompts.jsonl``; it is created.
        steps: Optimizer steps; 220 give fluent reviews.
        seed: Fixes the texts, the initial weights and so, on one thread, the result.

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


def judge(folders: Sequence[Path], *, alpha: float, beta: float, dar_k: int) -> None:
    """Report how near each model is to the optimum of the brackets task; the first one is the reference."""
    task = Brackets()
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    ref_PY = task.law(models[0])
    with tempfile.TemporaryDirectory() as unused:
        config = DARConfig(output_dir=unused, use_cpu=True, alpha=alpha, beta=beta, dar_k=dar_k)
    for model in models:
        report(**task.standing(model, ref_PY, config).as_dict())


@torch.inference_mode()
def sample(
    folder: Path, prompts: Sequence[str], *, count: int, max_new_tokens: int, seed: int
) -> list[list[str]]:
    """``count`` completions of each prompt by the model in ``folder``, at temperature 1.

    Returns:
        One list per prompt; texts without special tokens.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    ids = model.generate(  # type: ignore[misc] # transformers declares `self` as a protocol that its own models miss
        **inputs,
        do_sample=True,
        top_k=0,
        max_new_tokens=max_new_tokens,
        num_return_sequences=count,
        pad_token_id=tokenizer.pad_token_id,
    )
    width = inputs["input_ids"].shape[1]
    texts = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    return [texts[i * count : (i + 1) * count] for i in range(len(prompts))]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dar.training.demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    base = commands.add_parser("base", help="train the base model of the reviews")
    base.add_argument("--steps", type=int, required=True)
    brackets = commands.add_parser("brackets", help="make the base model of the brackets")
    for one in (base, brackets):
        one.add_argument("--folder", type=Path, required=True, help="gets model/ and prompts.jsonl")
        one.add_argument("--seed", type=int, default=0)
    draw = commands.add_parser("sample", help="continue prompts; a JSON list of them on stdin")
    draw.add_argument("--folder", type=Path, required=True, nargs="+", help="one or more models")
    draw.add_argument("--count", type=int, default=6)
    draw.add_argument("--max-new-tokens", type=int, default=24)
    draw.add_argument("--seed", type=int, default=0)
    compare = commands.add_parser("judge", help="compare models of brackets with the optimum")
    compare.add_argument("--folder", type=Path, required=True, nargs="+", help="the base first")
    compare.add_argument("--alpha", type=float, required=True)
    compare.add_argument("--beta", type=float, required=True)
    compare.add_argument("--dar_k", type=int, required=True)
    return parser.parse_args()


def main() -> None:
    """Do the one thing asked for, and report it."""
    arguments = parse()
    if deepspeed_config.is_installed():
        deepspeed_config.load()  # accelerate would import it to save a model, and it would speak
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if arguments.command == "base":
        loss = train_base(arguments.folder, steps=arguments.steps, seed=arguments.seed)
        report(done=True, loss=loss)
    elif arguments.command == "brackets":
        task = Brackets()
        save_base(arguments.folder, task.model(arguments.seed), task.tokenizer(), PROMPTS)
        report(done=True)
    elif arguments.command == "judge":
        judge(
            arguments.folder,
            alpha=arguments.alpha,
            beta=arguments.beta,
            dar_k=arguments.dar_k,
        )
    else:
        prompts = json.load(sys.stdin)
        for folder in arguments.folder:
            completions = sample(
                folder,
                prompts,
                count=arguments.count,
                max_new_tokens=arguments.max_new_tokens,
                seed=arguments.seed,
            )
            report(folder=str(folder), completions=completions)
