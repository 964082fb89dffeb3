"""Types of the fixtures that make samples and sources, and score."""

from collections.abc import Awaitable, Callable

from dar.rewards.base import RewardResult, RewardSample
from dar.rewards.http_reward import HttpReward

MakeSamples = Callable[..., list[RewardSample]]
Score = Callable[..., Awaitable[list[RewardResult]]]
SourceOf = Callable[..., HttpReward]
