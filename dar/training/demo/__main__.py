"""The part of the demo that needs torch: ``python -m dar.training.demo COMMAND``.

``base`` trains the base model of the reviews (`dar.training.demo.base`), and ``brackets`` writes
that of the brackets (`dar.training.demo.brackets`). ``sample`` continues prompts with saved models.
``judge`` compares saved models with the optimum of the brackets. All report on stdout as JSON
lines, which the command that started them reads.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dar.training.config.config import DARConfig
from dar.training.demo.base import report, save_base, train_base
from dar.training.demo.brackets import Brackets
from dar.training.demo.languages import PROMPTS
from dar.training.parallel import deepspeed_config


def judge(folders: Sequence[Path], *, alpha: float, beta: float, dar_k: int) -> None:
    """Report each model's distance from the optimum of the brackets; the first is the reference."""
    task = Brackets()
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    ref_PY = task.distribution(models[0])
    with tempfile.TemporaryDirectory() as unused:
        config = DARConfig(output_dir=unused, use_cpu=True, alpha=alpha, beta=beta, dar_k=dar_k)
    for model in models:
        report(**task.evaluate(model, ref_PY, config).as_dict())


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
    arguments = parse()
    if deepspeed_config.is_installed():
        deepspeed_config.load()  # accelerate would import it to save a model, and it would print
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
        judge(arguments.folder, alpha=arguments.alpha, beta=arguments.beta, dar_k=arguments.dar_k)
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


if __name__ == "__main__":
    # Some libraries, DeepSpeed among them, log to stdout, where only reports may appear.
    with contextlib.redirect_stdout(sys.stderr):
        main()
