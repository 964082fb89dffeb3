"""The result of the brackets demo: exact figures of both models, and a plot of the rewards."""

import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dar.client import Client
from dar.demo.screen import DemoScreen

MOST_REWARD_OFF = 0.05
"""The demo fails when E[r] is farther from that of the optimum."""
MOST_KL_OFF = 0.15
"""The demo fails when KL(policy || optimum) is larger, in nats."""
PLOT_COLUMNS, PLOT_ROWS = 60, 12


@dataclass(frozen=True, slots=True)
class BracketsResult:
    """Figures of base and trained model, named as in `dar.training.demo.brackets.ExactMetrics`."""

    before: Mapping[str, float]
    after: Mapping[str, float]

    @property
    def is_near(self) -> bool:
        """Whether the trained model is close enough to the optimum."""
        off = abs(self.after["reward"] - self.after["best_reward"])
        return off <= MOST_REWARD_OFF and self.after["kl_target"] <= MOST_KL_OFF

    def __str__(self) -> str:
        return (
            f"{self.after['reward']:.1%} of all completions are balanced "
            f"(the optimum: {self.after['best_reward']:.1%}; before: {self.before['reward']:.1%}), "
            f"and the policy is {self.after['kl_target']:.3f} nats from the optimum"
        )


def compare(folders: Sequence[Path], hyperparameters: Mapping[str, Any]) -> BracketsResult:
    """Compare base and trained model with the optimum, over all possible completions."""
    command = [sys.executable, "-m", "dar.training.demo", "judge"]
    for name in ("alpha", "beta", "dar_k"):
        command += [f"--{name}", str(hyperparameters[name])]
    printed = subprocess.check_output([*command, "--folder", *map(str, folders)])
    before, after = map(json.loads, printed.splitlines())
    return BracketsResult(before, after)


def rewards_of(client: Client, job_id: str) -> list[float]:
    """Mean reward of every step, the first step first."""
    values: list[float] = []
    cursor: str | None = None
    while True:
        answer = client.jobs.metrics(job_id, names=["dar/rewards_mean"], after=cursor)
        series = answer.series.get("dar/rewards_mean")
        found = [] if series is None else [value for value in series.value if value is not None]
        if not found:
            return values
        values += found
        cursor = answer.cursor


def plot(values: Sequence[float], optimum: float) -> list[str]:
    """Draw a curve from 0 to 1 in characters, with the optimum as a dashed line.

    Each column shows the mean over neighbouring steps.
    """
    columns = min(PLOT_COLUMNS, len(values))
    edges = [round(column * len(values) / columns) for column in range(columns + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in itertools.pairwise(edges)]
    grid = [[" "] * columns for _ in range(PLOT_ROWS + 1)]
    line = _row(optimum)
    grid[line] = ["╌"] * columns
    for column, mean in enumerate(means):
        grid[_row(mean)][column] = "●"
    labels = {_row(share / 4): f"{share / 4:.2f}" for share in range(5)}
    lines = [
        f"{labels.get(number, ''):>5} │{''.join(cells)}"
        + (f" optimum {optimum:.3f}" if number == line else "")
        for number, cells in enumerate(grid)
    ]
    return [*lines, f"{'':>5} └{'─' * columns}", f"{'':>7}step 1{len(values):>{columns - 6}}"]


def _row(value: float) -> int:
    return round((1 - min(1.0, max(0.0, value))) * PLOT_ROWS)


def show(screen: DemoScreen, values: Sequence[float], compared: BracketsResult) -> None:
    """Print the curve and the exact figures."""
    after = compared.after
    screen.console.print("\nMean reward of each step's completions\n")
    screen.console.print(
        "\n".join(plot(values, after["best_reward"])), soft_wrap=True, markup=False
    )
    table = Table(title="\nExact, over all completions", title_justify="left")
    for heading in ("", "before", "after", "optimum"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = (
        ("mean reward", "reward", after["best_reward"]),
        ("KL(policy ‖ reference), nats", "kl_ref", after["best_kl_ref"]),
        ("KL(policy ‖ optimum), nats", "kl_target", 0.0),
        ("J = reward - alpha KL(policy ‖ reference)", "objective", after["best_objective"]),
    )
    for meaning, name, best in rows:
        table.add_row(meaning, f"{compared.before[name]:.3f}", f"{after[name]:.3f}", f"{best:.3f}")
    screen.console.print(table)
