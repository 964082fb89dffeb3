"""Where training ends under a ``kl_budget``, against the budget and the forecast.

On brackets reward and KL are exact; on the demo's reviews they are means over 512 fresh
completions. Arguments, all optional: tasks, budgets and seeds, each with commas between, and
further arguments of `dar.DARConfig` as a JSON object.
"""

import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from stack import report
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from dar.demo.run import base_folder, make_base
from dar.demo.screen import DemoScreen
from dar.protocol.budget_checks import CHOSEN
from dar.settings import load_settings
from dar.training import DARConfig, DARTrainer, NullSink
from dar.training.demo.brackets import Brackets, divergence
from dar.training.demo.languages import OPENINGS, PROMPTS
from dar.training.demo.trial import SETTINGS, quiet_config

FRESH_PROMPTS, FRESH_SEED = 128, 5000
"""Prompts whose completions are measured at the end, 4 of each, and what sets their seed apart."""
REVIEWS: Mapping[str, Any] = {
    "dar_k": 4,
    "per_device_train_batch_size": 16,
    "max_new_tokens": 24,
    "learning_rate": 5e-4,
    "warmup_steps": 5,
    "max_steps": 300,
    "max_grad_norm": 10,
    "adam_beta2": 0.95,
}


class Forecasts(NullSink):
    """Keeps the newest forecast."""

    def __init__(self) -> None:
        self.newest: Mapping[str, Any] = {}

    def event(self, level: str, message: str, data: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002 - the interface of a sink
        """Keep it."""
        if data is not None and data.get("kind") == "calibration":
            self.newest = data


def _train(
    model: Any,  # noqa: ANN401 - a model or its folder
    config: DARConfig,
    prompts: Sequence[str],
    reward: Any,  # noqa: ANN401 - a reward function
    **more: Any,  # noqa: ANN401 - arguments of DARTrainer
) -> tuple[DARTrainer, Mapping[str, Any]]:
    sink = Forecasts()
    rows = [{"prompt": prompt} for prompt in prompts]
    trainer = DARTrainer(model, config, rows, reward, sink=sink, is_offline=True, **more)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer, sink.newest


def brackets(seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train, and measure exactly."""
    task = Brackets()
    model = task.model(seed)
    before = task.distribution(model)
    with tempfile.TemporaryDirectory() as folder:
        usual = {name: value for name, value in SETTINGS.items() if name not in CHOSEN}
        config = quiet_config(folder, seed, {**usual, **settings})
        trainer, forecast = _train(
            model, config, PROMPTS, task.reward, processing_class=task.tokenizer()
        )
    after = task.distribution(model.eval())
    found = task.evaluate(model, before, trainer.args)
    return {
        "start": (before.exp() * task.rewards).sum(dim=1).mean().item(),
        "reward": found.reward,
        "kl": divergence(after, before),
        "share": found.share,
        **_facts(forecast),
    }


def reviews(seed: int, settings: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Train, and measure 512 fresh completions."""
    analyzer = SentimentIntensityAnalyzer()

    def reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        texts = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        return [float(analyzer.polarity_scores(text)["compound"]) for text in texts]

    with tempfile.TemporaryDirectory() as folder:
        config = quiet_config(folder, seed, {**REVIEWS, **settings})
        trainer, forecast = _train(model, config, OPENINGS, reward)
        trainer.args = copy.copy(trainer.args)
        trainer.args.seed += FRESH_SEED
        step = trainer.preview(FRESH_PROMPTS)
    assert step.ref_logps_B is not None
    return {
        "start": forecast["start_reward"],
        "reward": statistics.mean(one.reward or 0.0 for one in step.rewards),
        "kl": (step.behavior_logps_B - step.ref_logps_B).mean().item(),
        **_facts(forecast),
    }


def _facts(forecast: Mapping[str, Any]) -> dict[str, Any]:
    names = ("ending", "alpha", "completions")
    return {
        **{name: forecast[name] for name in names},
        "forecast_reward": forecast["reward"],
        "forecast_kl": forecast["kl"],
    }


def main() -> None:
    """Measure and report."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    given = [
        *sys.argv[1:],
        *("brackets,reviews", "0.5,1,1.5", "0,1,2,3,4", "{}")[len(sys.argv) - 1 :],
    ]
    tasks, budgets, seeds = (text.split(",") for text in given[:3])
    cache = base_folder(load_settings().cache_home)
    make_base(DemoScreen(), cache)
    figures = {}
    for task in tasks:
        for budget in map(float, budgets):
            settings = {"kl_budget": budget, **json.loads(given[3])}
            runs = []
            for seed in map(int, seeds):
                run = (
                    brackets(seed, settings)
                    if task == "brackets"
                    else reviews(seed, settings, str(Path(cache) / "model"))
                )
                run["of_gain"] = (run["reward"] - run["start"]) / (
                    run["forecast_reward"] - run["start"]
                )
                runs.append(run)
                print(task, budget, seed, json.dumps(run), flush=True)
            names = ("start", "kl", "reward", "forecast_kl", "forecast_reward", "of_gain")
            means = {name: round(statistics.mean(run[name] for run in runs), 3) for name in names}
            print(task, budget, means, flush=True)
            ends = [{name: round(run[name], 3) for name in ("kl", "reward")} for run in runs]
            figures[f"{task} {budget:g}"] = {**means, "runs": ends}
    report("budget", settings=json.loads(given[3]), cases=figures)


if __name__ == "__main__":
    main()
