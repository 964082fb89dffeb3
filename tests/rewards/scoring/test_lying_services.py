"""Rewards whose meaning changes are found by the answers of a real service."""

import random
from collections.abc import Callable
from typing import Any

from dar.protocol.hints import HINTS
from dar.rewards.base import RewardContext
from dar.rewards.http_reward import HttpOptions, HttpReward
from dar.rewards.scoring.combine import WeightedSource
from dar.rewards.scoring.scorer import RewardScorer
from dar.rewards.scoring.step_report import component_rewards
from dar.training.report.drift import DriftWatch
from fakes.reward_types import MakeSamples


def test_a_service_that_begins_to_lie_is_found_by_its_answers(
    hostile: Callable[..., Any], fast: HttpOptions, make_samples: MakeSamples
) -> None:
    drawn = random.Random(3)

    def judge(request: Any) -> None:
        content = request.content
        offset = 4.0 if content["step"] >= 30 else 0.01 * content["step"]
        request.rewards([offset + drawn.gauss(0, 0.3) for _ in content["samples"]])

    source = HttpReward("judge", hostile(judge).url, options=fast)
    watch, reported = DriftWatch(), []
    with RewardScorer([WeightedSource(source)]) as scorer:
        for step in range(1, 40):
            found = component_rewards(scorer.score(make_samples(8), RewardContext(step)))
            if watch.add("judge", found["judge"]):
                reported.append(step)
    assert len(reported) == 1
    assert reported[0] in range(30, 30 + HINTS.drift_recent_steps)
