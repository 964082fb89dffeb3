"""Rewards that jump are reported once; noise, sparse successes and a policy that learns are no
jump.
"""

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dar.protocol.hints import HINTS
from dar.training.report.drift import DriftWatch

Rewards = Callable[[int, random.Random], float]
LIE = 60
RECENT, WARM_UP = HINTS.drift_recent_steps, HINTS.drift_warm_up_steps


def jumps(rewards: Rewards, *, seed: int = 0, steps: int = 120, count: int = 16) -> list[int]:
    """Steps at which a jump was reported."""
    watch, drawn = DriftWatch(), random.Random(seed)
    return [
        step
        for step in range(steps)
        if watch.add("judge", [rewards(step, drawn) for _ in range(count)])
    ]


def chance(step: float) -> float:
    return 1 / (1 + math.exp(-step))


ORDINARY: dict[str, Rewards] = {
    "noise": lambda _, drawn: drawn.gauss(0, 1),
    "a slow rise": lambda step, drawn: drawn.gauss(step * 0.01, 1),
    "a steep rise": lambda step, drawn: drawn.gauss(step, 0.1),
    "a rise that levels off": lambda step, drawn: drawn.gauss(1 - math.exp(-step / 30), 0.05),
    "a task that is learnt within some steps": lambda step, drawn: float(drawn.random() < chance((step - 60) / 5)),
    "rare successes": lambda _, drawn: float(drawn.random() < 0.01),
    "heavy tails": lambda _, drawn: max(-1e6, min(1e6, math.tan(math.pi * (drawn.random() - 0.5)))),
    "always the same": lambda _, __: 0.1,
    "the same but for rounding": lambda step, _: 1e5 + 1e-7 * (step % 2),
}  # fmt: skip
LIES: dict[str, Rewards] = {
    "another offset": lambda step, drawn: drawn.gauss(5.0 * (step >= LIE), 1),
    "another scale": lambda step, drawn: drawn.gauss(0.5, 0.1) * (10 if step >= LIE else 1),
    "the sign is turned": lambda step, drawn: (drawn.random() < 0.8) * (-1.0 if step >= LIE else 1.0),
    "always zero": lambda step, drawn: 0.0 if step >= LIE else drawn.gauss(0.5, 0.2),
    "another constant": lambda step, _: 1.0 if step >= LIE else 0.3,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_rewards_are_no_jump(name: str, seed: int) -> None:
    assert jumps(ORDINARY[name], seed=seed) == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_told_once_and_soon(name: str, seed: int) -> None:
    [told] = jumps(LIES[name], seed=seed)
    assert LIE <= told < LIE + RECENT


def test_a_lie_that_ends_and_comes_back_is_two_episodes() -> None:
    def rewards(step: int, drawn: random.Random) -> float:
        return drawn.gauss(9.0 * (step in range(40, 44) or step >= 120), 1)

    first, *others = jumps(rewards, steps=140)
    assert first in range(40, 44)
    assert [step in range(120, 124) for step in others] == [True]


def test_nothing_is_told_before_enough_is_known() -> None:
    first = WARM_UP + RECENT - 1  # from 0: the first step that is judged
    assert jumps(lambda step, _: float(step >= first - 1)) == [first]
    assert jumps(lambda step, _: float(step >= 3)) == []


@given(slope=st.floats(-1e3, 1e3), start=st.floats(-1e3, 1e3))
def test_a_straight_line_is_never_a_jump(slope: float, start: float) -> None:
    assert jumps(lambda step, _: start + slope * step, count=1) == []


@given(cut=st.integers(0, 119))
def test_a_resumed_watch_tells_the_same(cut: int) -> None:
    def run(cut: int | None) -> list[Any]:
        watch, drawn, told = DriftWatch(), random.Random(1), []
        for step in range(120):
            if step == cut:
                state = json.loads(json.dumps(watch.state()))
                watch = DriftWatch()
                watch.restore(state)
            told.append(watch.add("a", [LIES["another offset"](step, drawn) for _ in range(4)]))
        return told

    assert run(cut) == run(None)


def test_components_are_watched_apart_and_the_event_has_the_numbers() -> None:
    watch, drawn, told = DriftWatch(), random.Random(2), []
    for step in range(30):
        assert watch.add("calm", [drawn.gauss(0, 1) for _ in range(8)]) is None
        told.append(
            watch.add("judge", [drawn.gauss(7.0 if step >= 26 else 2.0, 0.5) for _ in range(8)])
        )
    [drift] = filter(None, told)
    data = drift.data(27)
    assert (data["kind"], data["component"], data["step"]) == ("reward_drift", "judge", 27)
    assert data["mean_before"] == pytest.approx(2.0, abs=0.2)
    assert data["mean_now"] - data["mean_before"] > 6 * data["sigma"] > 0
    assert "judge" in drift.message
