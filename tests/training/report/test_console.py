"""What a terminal shows of a run: tables of samples, and a bar."""

import io
from typing import Any

import pytest
from rich.console import Console

from dar.protocol.samples import ReportedSample
from dar.training.report.console import TrainingConsole, report_line, samples_table


def row(completion: str, **changes: Any) -> ReportedSample:
    values = {
        "group": 0, "index": 0, "prompt": "The soup was", "completion": completion, "finish_reason": "stop",
        "completion_tokens": 3, "reward": 0.5, "reward_status": "reward", "advantage": 0.1, "weight": 1.25,
        "logp_policy": -1.0, "logp_ref": -1.0, "logp_behavior": -1.0,
    }  # fmt: skip
    return ReportedSample.model_validate(values | changes)


@pytest.mark.parametrize("width", [80, 120])
def test_samples_are_readable_at_any_width(width: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=width)
    long = "great and the waiter was delightful " * 9
    rows = [
        row(long),
        row("[bold]not markup[/bold]\n\x1b[2Jsecond line", finish_reason="length"),
        row("unscored", reward=None, weight=None, reward_status="error", reward_message="timeout"),
    ]
    console.print(samples_table(rows))
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert max(map(len, lines)) > width - 15  # a long text takes the room there is
    shown = " ".join(screen.getvalue().split())
    assert "» The soup was" in shown
    assert "+0.500 1.25 great and" in shown
    assert "[bold]not markup[/bold] [2Jsecond line … cut" in shown
    assert "\x1b" not in shown
    assert "- - unscored [timeout]" in shown


def test_tables_of_samples_come_every_so_many_steps() -> None:
    screen = io.StringIO()
    console = TrainingConsole(3, Console(file=screen, width=80))
    console.begin(9)
    for step in range(1, 10):
        console.samples(step, [row("text")])
    shown = [line for line in screen.getvalue().splitlines() if line.startswith("samples of")]
    assert shown == [f"samples of step {step}" for step in (1, 3, 6, 9)]


def test_a_terminal_gets_a_bar_with_the_numbers_that_matter() -> None:
    screen = io.StringIO()
    console = TrainingConsole(
        0, Console(file=screen, width=80, force_terminal=True, color_system=None)
    )
    values = {
        "dar/rewards_mean": 0.25,
        "dar/kl_ref": 1.5,
        "dar/weights_clip_fraction": 0.02,
    }
    console.begin(10)
    console.metrics(4, values)
    console.end()
    assert "step 4/10" in screen.getvalue()
    assert "reward +0.250  KL 1.50  clip 2%" in screen.getvalue()
    assert report_line({}) == ""
