"""What a run learns that gives only model, prompts, reward and length; the rest is the default.

On the demo's reviews the gain of the reward, measured on fresh completions of the base model and of
the result. On the brackets, with the batch of the demo's job, the objective as a fraction of its
known optimum.
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
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
from dar.training import DARConfig, DARTrainer, NullSink
from dar.training.demo.brackets import Brackets
from dar.training.demo.languages import NEW_TOKENS, OPENINGS, PROMPTS

SEEDS = 5
REVIEWS: dict[str, Any] = {"max_steps": 60, "max_new_tokens": 24}
BRACKETS: dict[str, Any] = {
    "max_steps": 300,
    "max_new_tokens": NEW_TOKENS,
    "per_device_train_batch_size": 12,
    "dar_k": 8,
}
MEASURED = 6
"""How often each prompt of the reviews occurs in the data of an evaluation: 576 completions."""


def config_of(folder: str, seed: int, settings: dict[str, Any]) -> DARConfig:
    """Arguments without a word about how to learn."""
    return DARConfig(
        output_dir=folder,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        log_level="error",
        **settings,
    )


def positivity(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The demo's reward, in this process."""
    analyzer = SentimentIntensityAnalyzer()
    return [
        float(analyzer.polarity_scores(prompt + text)["compound"])
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def reviews(seed: int, model: str) -> dict[str, float]:
    """Figures of one run over the demo's prompts."""
    rows = [{"prompt": opening} for opening in OPENINGS]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DARTrainer(
            model,
            config_of(folder, seed, REVIEWS),
            rows,
            positivity,
            eval_dataset=rows * MEASURED,
            sink=NullSink(),
            is_offline=True,
        )
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_dar/rewards_mean"]
        trainer.train()
        after = trainer.evaluate()
    return {
        "learning_rate": float(trainer.args.learning_rate or 0),
        "before": before,
        "gain": after["eval_dar/rewards_mean"] - before,
        "kl_ref": after["eval_dar/kl_ref"],
    }


def brackets(seed: int) -> dict[str, float]:
    """Exact figures of one run."""
    task = Brackets()
    model = task.model(seed)
    reference = task.distribution(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DARTrainer(
            model,
            config_of(folder, seed, BRACKETS),
            [{"prompt": prompt} for prompt in PROMPTS],
            task.reward,
            processing_class=task.tokenizer(),
            sink=NullSink(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        final = task.evaluate(trainer.model.eval(), reference, trainer.args)
    return {
        "learning_rate": float(trainer.args.learning_rate or 0),
        "share": final.share,
        "reward": final.reward,
        "kl_ref": final.kl_ref,
        "best_kl_ref": final.best_kl_ref,
    }


def columns(runs: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """The figures of all seeds, by name."""
    digits = {"learning_rate": 9}
    return {name: [round(run[name], digits.get(name, 3)) for run in runs] for name in runs[0]}


def main() -> None:
    """Measure and report; an argument is the number of seeds."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else SEEDS)
    cache = base_folder(load_settings().cache_home)
    make_base(DemoScreen(), cache)
    found = {
        "reviews": columns([reviews(seed, str(Path(cache) / "model")) for seed in seeds]),
        "brackets": columns([brackets(seed) for seed in seeds]),
    }
    for task, name in (("reviews", "gain"), ("brackets", "share")):
        values = found[task][name]
        print(f"{task:<9} {name}: mean {statistics.mean(values):.3f}, least {min(values):.3f}")
    report("default_spec", seeds=len(seeds), **found)


if __name__ == "__main__":
    main()
