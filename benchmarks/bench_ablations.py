"""Effect of each setting alone: exact on the brackets task, sampled on the demo's reviews.

All runs of a task see as many completions as the default does. The brackets are judged by the
default's objective (J at alpha = 0.1, c = 1), whose maximum is known; the reviews by the last
steps' completions.
"""

import concurrent.futures
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
from dar.training.config.config import preset_values
from dar.training.demo.brackets import Brackets
from dar.training.demo.languages import OPENINGS
from dar.training.demo.trial import train

PROCESSES = 2
BRACKETS_STEPS, BRACKETS_COMPLETIONS, BRACKETS_SEEDS = 200, 96, (0, 1, 2)
REVIEWS_STEPS, REVIEWS_COMPLETIONS, REVIEWS_SEEDS = 25, 64, (0, 1)
LAST_STEPS = 5
"""Of the reviews that are looked at: 320 completions."""
DEFAULT: dict[str, Any] = {
    "alpha": 0.1,
    "beta": 0.3,
    "dar_k": 4,
    "dar_wclip": 20.0,
    "adv_norm": "none",
    "baseline": "leave_one_out",
    "behavior": "sampled",
}
ALGORITHM = {
    *DEFAULT,
    "log_ratio",
    "tie_tolerance",
    "drop_ties",
    "allow_missing",
    "weight_norm",
    "min_ess",
    "temperature",
}
"""What is taken of a preset; batch, optimizer and lengths are the task's own in every run."""


def preset(name: str) -> dict[str, Any]:
    """The algorithm of a preset."""
    values = preset_values(name)
    return {key: value for key, value in values.items() if key in ALGORITHM}


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "alpha/(alpha+beta) = 0": {"alpha": 0.0, "beta": 0.4},
    "alpha/(alpha+beta) = 0.1": {"alpha": 0.04, "beta": 0.36},
    "alpha/(alpha+beta) = 0.5": {"alpha": 0.2, "beta": 0.2},
    "alpha/(alpha+beta) = 1": {"alpha": 0.4, "beta": 1e-6},
    "alpha+beta = 0.05": {"alpha": 0.0125, "beta": 0.0375},
    "alpha+beta = 0.2": {"alpha": 0.05, "beta": 0.15},
    "alpha+beta = 0.8": {"alpha": 0.2, "beta": 0.6},
    "clip 2": {"dar_wclip": 2.0},
    "clip 5": {"dar_wclip": 5.0},
    "clip 50": {"dar_wclip": 50.0},
    "K = 1": {"dar_k": 1},
    "K = 2": {"dar_k": 2},
    "K = 8": {"dar_k": 8},
    "adv_norm batch": {"adv_norm": "batch"},
    "adv_norm per_prompt": {"adv_norm": "per_prompt"},
    "baseline mean": {"baseline": "mean"},
    "log_ratio mean": {"log_ratio": "mean"},
    "tie_tolerance 0.1": {"tie_tolerance": 0.1},
    "drop_ties": {"drop_ties": True},
    "weight_norm batch": {"weight_norm": "batch"},
    "weight_norm per_prompt": {"weight_norm": "per_prompt"},
    "min_ess 0.5": {"min_ess": 0.5},
    "T = 0.9": {"temperature": 0.9},
    "T = 0.9, behavior policy": {"temperature": 0.9, "behavior": "policy"},
    "preset paper": preset("paper"),
    "preset reference": preset("reference"),
    "1 in 5 rewards missing": {},
    "1 in 5 missing, counted as 0": {},
}
LOST: dict[str, float | None] = {
    "1 in 5 rewards missing": None,
    "1 in 5 missing, counted as 0": 0.0,
}
"""What arrives in place of every fifth reward; the second is the mistake that departure 2
avoids."""


def settings_of(case: str, completions: int) -> dict[str, Any]:
    """Arguments of `dar.DARConfig`, with as many completions per step as asked for."""
    settings = {**DEFAULT, **CASES.get(case, {})}
    return {**settings, "per_device_train_batch_size": completions // settings["dar_k"]}


def losing(case: str) -> Callable[[list[float]], list[float | None]]:
    """What becomes of the rewards of a step."""
    if case not in LOST:
        return list
    return lambda values: [LOST[case] if row % 5 == 4 else v for row, v in enumerate(values)]


def brackets(case: str, seed: int) -> dict[str, float]:
    """Exact figures of one run."""
    settings = settings_of(case, BRACKETS_COMPLETIONS)
    run = train(
        Brackets(),
        seed=seed,
        judged_as=DEFAULT,
        losing=losing(case),
        **{**settings, "max_steps": BRACKETS_STEPS},
    )
    return {
        "reward": run.final.reward,
        "kl_ref": run.final.kl_ref,
        "share": run.final.share,
        "ess": run.metrics["dar/effective_sample_size"],
        "clipped": run.metrics["dar/weights_clip_fraction"],
    }


class Recorder(NullSink):
    """Keeps the metrics of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:  # noqa: ARG002 - the interface of a sink
        """Keep them."""
        self.steps.append(dict(values))

    def mean(self, name: str, *, last: int | None = None) -> float:
        """Mean of a metric over the run, or over its last steps."""
        steps = self.steps if last is None else self.steps[-last:]
        return statistics.mean(values[name] for values in steps)


def positivity(case: str, texts: list[str]) -> Callable[..., list[float | None]]:
    """The demo's reward, in this process; it notes the texts."""
    analyzer = SentimentIntensityAnalyzer()

    def reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float | None]:
        texts.extend(prompt + text for prompt, text in zip(prompts, completions, strict=True))
        scores = [
            float(analyzer.polarity_scores(text)["compound"]) for text in texts[-len(prompts) :]
        ]
        return losing(case)(scores)

    return reward


def reviews(case: str, seed: int, model: str) -> dict[str, float]:
    """Figures of one run over the demo's prompts."""
    sink, texts = Recorder(), list[str]()
    reward = positivity(case, texts)
    with tempfile.TemporaryDirectory() as folder:
        config = DARConfig(
            **settings_of(case, REVIEWS_COMPLETIONS),
            output_dir=folder,
            seed=seed,
            learning_rate=5e-4,
            warmup_steps=5,
            max_steps=REVIEWS_STEPS,
            max_grad_norm=10,
            adam_beta2=0.95,
            max_new_tokens=24,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            log_level="error",
        )
        rows = [{"prompt": opening} for opening in OPENINGS]
        trainer = DARTrainer(model, config, rows, reward, sink=sink, is_offline=True)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    last = texts[-LAST_STEPS * REVIEWS_COMPLETIONS :]
    figures = {
        "reward": sink.mean("dar/rewards_mean", last=LAST_STEPS),
        "ess": sink.mean("dar/effective_sample_size"),
        "clipped": sink.mean("dar/weights_clip_fraction"),
        "clipped_first": sink.steps[0]["dar/weights_clip_fraction"],
        "distinct": len(set(last)) / len(last),
        "unfinished": sink.mean("completions/truncated_fraction", last=LAST_STEPS),
        "length": sink.mean("completions/mean_length", last=LAST_STEPS),
    }
    if config.alpha > 0:
        figures["kl_ref"] = sink.mean("dar/kl_ref", last=LAST_STEPS)
    return figures


def prepare() -> None:
    """One thread per process, and no bars."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def summary(runs: Sequence[Mapping[str, float]], spread_of: str) -> dict[str, Any]:
    """Means over seeds, and of one figure the least and the largest, to three digits."""
    means = {key: round(statistics.mean(run[key] for run in runs), 3) for key in runs[0]}
    values = [round(run[spread_of], 3) for run in runs]
    return {**means, f"{spread_of}_range": [min(values), max(values)]}


def show(case: str, exact: Mapping[str, Any], sampled: Mapping[str, Any]) -> None:
    """A row of the table."""
    left = ("reward", "kl_ref", "share", "ess", "clipped")
    right = ("reward", "kl_ref", "ess", "clipped", "distinct", "unfinished", "length")
    cells = [f"{exact[name]:7.3f}" for name in left]
    cells += [f"{sampled[name]:7.3f}" if name in sampled else f"{'-':>7}" for name in right]
    print(f"{case:<26}", *cells, flush=True)


def main() -> None:
    """Measure and report."""
    cache = base_folder(load_settings().cache_home)
    make_base(DemoScreen(), cache)
    model = str(Path(cache) / "model")
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else PROCESSES
    print(f"{'':<26} {'brackets, exact':^39} {'reviews, last 5 steps':^55}")
    names = "E[r] KL(ref) J/J* ESS clipped reward KL(ref) ESS clipped distinct no-end length"
    print(f"{'case':<26}", *(f"{name:>7}" for name in names.split()), flush=True)
    figures: dict[str, dict[str, Any]] = {}
    with concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=prepare
    ) as pool:
        exact = {
            case: [pool.submit(brackets, case, seed) for seed in BRACKETS_SEEDS] for case in CASES
        }
        sampled = {
            case: [pool.submit(reviews, case, seed, model) for seed in REVIEWS_SEEDS]
            for case in CASES
        }
        for case, futures in sampled.items():
            figures[case] = {
                "brackets": summary([future.result() for future in exact[case]], "share"),
                "reviews": summary([future.result() for future in futures], "reward"),
            }
            show(case, figures[case]["brackets"], figures[case]["reviews"])
    report("ablations", cases=figures)


if __name__ == "__main__":
    main()
