"""Distance from a known optimum after training, for every variant and every planted mistake."""

import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from stack import report
from transformers.utils import logging as transformers_logging

from dar.training.demo.brackets import Brackets
from dar.training.demo.trial import VARIANTS, Run, train

SEEDS = range(5)
MISTAKE_SEEDS = range(2)
CURVE_STEPS = 10


@dataclass(frozen=True)
class Case:
    """A variant, with or without a mistake."""

    variant: str
    mistake: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As it is printed."""
        return " ".join(
            word for word in (self.variant, self.settings.get("baseline"), self.mistake) if word
        )


MANY = {"per_device_train_batch_size": 96}
"""Prompts of a step for the cold variant: with 12 the rare completions are hardly drawn, and it
stays 0.13 nats off."""
CASES = (
    Case("plain"),
    Case("plain", settings={"baseline": "mean"}),
    Case("end"),
    Case("cold", settings=MANY),
    Case("plain", "reference_dropped"),
    Case("plain", "sign_flipped"),
    Case("cold", "wrong_temperature", MANY),
    Case("end", "end_masked"),
)


def run(case: Case, seed: int) -> Run:
    """Train one model."""
    can_stop, settings = VARIANTS[case.variant]
    return train(
        Brackets(can_stop=can_stop),
        seed=seed,
        mistake=case.mistake,
        every=CURVE_STEPS,
        **{**settings, **case.settings},
    )


def summary(runs: list[Run]) -> dict[str, Any]:
    """Figures of all seeds of a case; the curve is that of the first."""
    finals = [run.final for run in runs]
    return {
        "share": [round(final.share, 3) for final in finals],
        "kl_target": [round(final.kl_target, 3) for final in finals],
        "reward": [round(final.reward, 3) for final in finals],
        "best_reward": [round(final.best_reward, 3) for final in finals],
        "kl_ref": [round(final.kl_ref, 3) for final in finals],
        "best_kl_ref": [round(final.best_kl_ref, 3) for final in finals],
        "curve": {
            step: [round(point.reward, 3), round(point.kl_ref, 3), round(point.kl_target, 3)]
            for step, point in runs[0].curve.items()
        },
    }


def main() -> None:
    """Measure and report."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    print(
        f"{'case':<28} {'J / J*':>8} {'worst':>7} {'KL(pi*)':>8} {'worst':>7} {'E[r]':>6} {'best':>6}"
    )
    cases = {}
    for case in CASES:
        seeds = MISTAKE_SEEDS if case.mistake else SEEDS
        figures = summary([run(case, seed) for seed in seeds])
        share, distance = figures["share"], figures["kl_target"]
        print(
            f"{case.name:<28} {statistics.mean(share):8.3f} {min(share):7.3f} "
            f"{statistics.mean(distance):8.3f} {max(distance):7.3f} "
            f"{statistics.mean(figures['reward']):6.3f} {statistics.mean(figures['best_reward']):6.3f}",
            flush=True,
        )
        cases[case.name] = figures
    report("brackets", seeds=len(SEEDS), cases=cases)


if __name__ == "__main__":
    main()
