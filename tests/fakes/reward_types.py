"""Types of the fixtures that make samples and sources and score, and a batch without a fixture."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from dar.rewards.base import RequestBatch, RewardContext, RewardResult, RewardSample
from dar.rewards.http_reward import HttpReward

MakeSamples = Callable[..., list[RewardSample]]
Score = Callable[..., Awaitable[list[RewardResult]]]
SourceOf = Callable[..., HttpReward]


def batch_of(samples: Sequence[RewardSample], columns: Sequence[str] | None = None) -> RequestBatch:
    now = datetime.now(UTC)
    context = RewardContext(step=3, job_id="ftjob-1")
    return RequestBatch("rwq_1", "r", context, tuple(samples), columns, now, now)


def sample(number: int = 0, **fields: Any) -> RewardSample:
    base: dict[str, Any] = {
        "prompt": "p",
        "messages": None,
        "completion": f"c{number}",
        "finish_reason": "stop",
        "completion_tokens": 2,
    }
    return RewardSample(id=f"s{number}", group_id="g0", index=number, **(base | fields))
