"""Draw the pictures of ``dar.md`` from ``benchmarks/results``: ``python docs/build_pictures.py``.

Each is one SVG without scripts or embedded fonts, readable on a light and on a dark page.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dar.training.demo.brackets import Brackets, divergence

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 300, 56, 130, 34, 46
GREY, BLUE, RED, GREEN, ORANGE = "#888888", "#3b7dd8", "#d8483b", "#2f9e57", "#d98a1f"
Point = tuple[float, float]


class Plot:
    """One pair of axes."""

    def __init__(
        self, title: str, x: tuple[str, float, float], y: tuple[str, float, float]
    ) -> None:
        self._x, self._y = x, y
        self._labels = 0
        self._parts = [
            self._text(LEFT, 20, title, size=14),
            self._text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x[0], anchor="middle"),
            self._text(LEFT, TOP - 4, y[0], size=11),
        ]

    def _text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 12,
        anchor: str = "start",
        fill: str = GREY,
    ) -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{text}</text>'

    def _at(self, point: Point) -> Point:
        (_, x0, x1), (_, y0, y1) = self._x, self._y
        return (
            LEFT + (point[0] - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (point[1] - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )

    def ticks(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        """Draw numbers along both axes, and horizontal lines."""
        for x in xs:
            left, bottom = self._at((x, self._y[1]))
            self._parts.append(self._text(left, bottom + 16, f"{x:g}", size=11, anchor="middle"))
        for y in ys:
            left, height = self._at((self._x[1], y))
            right = WIDTH - RIGHT
            self._parts.append(self._text(left - 6, height + 4, f"{y:g}", size=11, anchor="end"))
            self._parts.append(
                f'<line x1="{left}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}" stroke="{GREY}" stroke-opacity="0.25"/>'
            )

    def line(
        self, points: Sequence[Point], colour: str, label: str = "", *, is_dashed: bool = False
    ) -> None:
        """Draw a curve with its name to the right of the plot."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self._at, points))
        dash = ' stroke-dasharray="6 4"' if is_dashed else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        self.name(label, colour)

    def dots(self, points: Sequence[Point], colour: str) -> None:
        """Draw small points."""
        for x, y in map(self._at, points):
            self._parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}" fill-opacity="0.6"/>'
            )

    def dot(self, point: Point, colour: str, label: str) -> None:
        """Draw a point with its name to the right of it."""
        x, y = self._at(point)
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        self._parts.append(self._text(x + 7, y + 4, label, size=11, fill=colour))

    def name(self, label: str, colour: str) -> None:
        """Write the name of a curve to the right of the plot."""
        if label:
            height = TOP + 12 + 17 * self._labels
            self._labels += 1
            self._parts.append(self._text(WIDTH - RIGHT + 8, height, label, size=11, fill=colour))

    def save(self, name: str) -> None:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
        body = "\n".join([head, *self._parts, "</svg>\n"])
        (DOCS / "pictures" / f"{name}.svg").write_text(body, encoding="utf-8")


def result(name: str) -> dict[str, Any]:
    """Read the JSON line of a benchmark."""
    figures: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return figures


def weights() -> None:
    """Weight against advantage: equation (4) with clip 20."""
    plot = Plot("Weight of a completion", ("advantage A", -1, 1), ("weight, clip = 20", 0, 22))
    plot.ticks((-1, -0.5, 0, 0.5, 1), (0, 5, 10, 15, 20))
    for total, colour in ((0.05, RED), (0.2, ORANGE), (0.4, BLUE), (0.8, GREEN)):
        places = [step / 200 for step in range(-200, 201)]
        points = [(a, min(20.0, math.exp(a / total))) for a in places]
        plot.line(points, colour, f"alpha + beta = {total:g}")
    plot.save("weights")


def brackets() -> None:
    """Reward and distance from the reference, with and without the reference term."""
    cases = result("brackets")["cases"]
    right, wrong = cases["plain"], cases["plain reference_dropped"]
    panels = (
        ("brackets-reward", "Mean reward", "E[r]", 0, 1.0, (0, 0.25, 0.5, 0.75, 1), "best_reward"),
        (
            "brackets-kl",
            "Distance from the reference",
            "KL, nats",
            1,
            4.0,
            (0, 1, 2, 3, 4),
            "best_kl_ref",
        ),
    )
    for name, title, unit, place, top, ticks, best in panels:
        plot = Plot(title, ("step", 0, 300), (unit, 0, top))
        plot.ticks((0, 100, 200, 300), ticks)
        plot.line([(0, right[best][0]), (300, right[best][0])], GREY, "optimum", is_dashed=True)
        for case, colour, label in ((wrong, RED, "reference dropped"), (right, BLUE, "DAR")):
            points = [(float(step), values[place]) for step, values in case["curve"].items()]
            plot.line(points, colour, label)
        plot.save(name)


def tradeoff() -> None:
    """Reward against distance: the optima of all alphas, and what the ablations reached."""
    task = Brackets()
    reference = task.distribution(task.model(0))
    optima = []
    for alpha in [0.04 * 1.15**power for power in range(30)]:
        law = (reference + task.rewards / alpha).log_softmax(dim=1)
        reward = (law.exp() * task.rewards).sum(dim=1).mean()
        optima.append((divergence(law, reference), float(torch.as_tensor(reward))))
    plot = Plot("Reward against distance", ("KL to the reference, nats", 0, 4), ("E[r]", 0, 1))
    plot.ticks((0, 1, 2, 3, 4), (0, 0.25, 0.5, 0.75, 1))
    plot.line(optima, GREY, "optima of all alpha", is_dashed=True)
    cases = result("ablations")["cases"]
    for share, colour in (("1", GREEN), ("0.5", BLUE), ("0.1", ORANGE), ("0", RED)):
        figures = cases[f"alpha/(alpha+beta) = {share}"]["brackets"]
        plot.dot((figures["kl_ref"], figures["reward"]), colour, f"alpha' = {share}")
    plot.save("tradeoff")


def frontier() -> None:
    """Forecasts from the base model's samples, and where the trained runs ended."""
    cases = result("budget")["cases"]
    plot = Plot("What a nat buys", ("KL to the reference, nats", 0, 2), ("mean reward", 0, 1))
    plot.ticks((0, 0.5, 1, 1.5, 2), (0, 0.25, 0.5, 0.75, 1))
    for task, colour in (("brackets", ORANGE), ("reviews", BLUE)):
        budgets = [case for name, case in cases.items() if name.startswith(task)]
        start = sum(case["start"] for case in budgets) / len(budgets)
        ends = [(case["forecast_kl"], case["forecast_reward"]) for case in budgets]
        plot.line([(0.0, start), *ends], colour, f"{task}: forecast", is_dashed=True)
        plot.dots([(run["kl"], run["reward"]) for case in budgets for run in case["runs"]], colour)
        plot.name(f"{task}: runs ended", colour)
    plot.save("frontier")


if __name__ == "__main__":
    frontier()
    weights()
    brackets()
    tradeoff()
