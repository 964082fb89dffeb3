"""What a run learns that gives only model, prompts, reward and length; the rest is the default.

On the demo's reviews the gain of the reward, measured on fresh completions of the base model and of
the result. On the brackets, with the batch of the demo's job, the objective as a fraction of the
known optimum for the alpha that was chosen.

Arguments, all optional: the number of seeds; factors of the reward, with commas between (figures
are in units of the plain reward, and equal digests mean equal weights); tasks, of which ``long`` is
reviews with more steps.
"""

import copy
import hashlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from stack import report
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from dar.demo.run import base_folder, make_base
from dar.demo.screen import DemoScreen
from dar.settings import load_settings
from dar.training import DARTrainer, NullSink
from dar.training.demo.brackets import Brackets
from dar.training.demo.languages import NEW_TOKENS, OPENINGS, PROMPTS
from dar.training.demo.trial import quiet_config

SEEDS = 5
REVIEWS: dict[str, Any] = {"max_new_tokens": 24}
STEPS = {"reviews": 60, "long": 300}
BRACKETS: dict[str, Any] = {
    "max_steps": 300,
    "max_new_tokens": NEW_TOKENS,
    "per_device_train_batch_size": 12,
    "dar_k": 8,
}
MEASURED = 6
"""How often each prompt of the reviews occurs in the data of an evaluation: 576 completions."""


def positivity(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The demo's reward, in this process."""
    analyzer = SentimentIntensityAnalyzer()
    return [
        float(analyzer.polarity_scores(prompt + text)["compound"])
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def reviews(seed: int, scale: float, model: str, steps: int) -> dict[str, Any]:
    """Figures of one run over the demo's prompts."""
    rows = [{"prompt": opening} for opening in OPENINGS]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DARTrainer(
            model,
            quiet_config(folder, seed, {**REVIEWS, "max_steps": steps}),
            rows,
            scaled(positivity, scale),
            eval_dataset=rows * MEASURED,
            sink=NullSink(),
            is_offline=True,
        )
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_dar/rewards_mean"]
        trainer.train()
        after = trainer.evaluate()
    return {
        **_facts(trainer, scale),
        "before": before / scale,
        "gain": (after["eval_dar/rewards_mean"] - before) / scale,
        "kl_ref": after["eval_dar/kl_ref"],
    }


def brackets(seed: int, scale: float) -> dict[str, Any]:
    """Exact figures of one run."""
    task = Brackets()
    model = task.model(seed)
    reference = task.distribution(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DARTrainer(
            model,
            quiet_config(folder, seed, BRACKETS),
            [{"prompt": prompt} for prompt in PROMPTS],
            scaled(task.reward, scale),
            processing_class=task.tokenizer(),
            sink=NullSink(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        facts = _facts(trainer, scale)
        in_units = copy.copy(trainer.args)
        in_units.alpha, in_units.beta = trainer.args.alpha / scale, trainer.args.beta / scale
        final = task.evaluate(trainer.model.eval(), reference, in_units)
    start = (reference.exp() * task.rewards).sum(dim=1).mean().item()
    return {
        **facts,
        "share": final.share,
        "gain": final.reward - start,
        "kl_ref": final.kl_ref,
        "best_kl_ref": final.best_kl_ref,
    }


def scaled(reward: Callable[..., Sequence[float]], scale: float) -> Callable[..., list[float]]:
    """The same reward in another unit."""

    def times(prompts: Any, completions: Any, completion_ids: Any) -> list[float]:  # noqa: ANN401 - TRL's signature
        given = {"completion_ids": completion_ids} if reward is not positivity else {}
        return [scale * value for value in reward(prompts, completions, **given)]

    return times


def _facts(trainer: DARTrainer, scale: float) -> dict[str, Any]:
    weights = hashlib.sha256()
    for parameter in trainer.model.parameters():
        weights.update(parameter.detach().numpy().tobytes())
    return {
        "learning_rate": float(trainer.args.learning_rate or 0),
        "alpha": trainer.args.alpha / scale,
        "weights": weights.hexdigest()[:12],
    }


def columns(runs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The figures of all seeds, by name."""
    return {
        name: [
            run[name] if isinstance(run[name], str) else float(f"{run[name]:.4g}") for run in runs
        ]
        for name in runs[0]
    }


def main() -> None:
    """Measure and report."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    given = [*sys.argv[1:], *(str(SEEDS), "1", "reviews,brackets")[len(sys.argv) - 1 :]]
    cache = base_folder(load_settings().cache_home)
    make_base(DemoScreen(), cache)
    found: dict[str, Any] = {}
    for task in given[2].split(","):
        for scale in map(float, given[1].split(",")):
            runs = [
                brackets(seed, scale)
                if task == "brackets"
                else reviews(seed, scale, str(Path(cache) / "model"), STEPS[task])
                for seed in range(int(given[0]))
            ]
            found[f"{task} x {scale:g}"] = figures = columns(runs)
            for name in ("gain", "kl_ref", *(["share"] if task == "brackets" else [])):
                values = figures[name]
                text = f"mean {statistics.mean(values):.3f}, least {min(values):.3f}"
                print(f"{task:<9} x {scale:<9g} {name:<7} {text}", flush=True)
            print(f"{task:<9} x {scale:<9g} weights {' '.join(figures['weights'])}", flush=True)
    report("default_spec", seeds=int(given[0]), **found)


if __name__ == "__main__":
    main()
