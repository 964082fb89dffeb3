"""What a job's failure policy makes of the rewards of one prompt's completions."""

from collections.abc import Sequence
from dataclasses import replace

from dar.errors import TrainingError
from dar.protocol.reward_spec import FailurePolicy, FallbackValue
from dar.rewards.base import SampleReward


def under_policy(policy: FailurePolicy, group: Sequence[SampleReward]) -> list[SampleReward]:
    """The rewards of a group, all missing where the policy leaves the whole group out.

    With a ``fallback_value`` it stands in for the reward of each completion that could not be scored: the status stays ``error``,
    and `SampleReward.is_fallback` is set. What a source skipped stays without a reward.

    A group of one completion is compared with those of other prompts, so ``min_valid`` does not apply to it.

    Args:
        policy: Of the job.
        group: Totals of the K completions of a prompt.

    Raises:
        TrainingError: A completion could not be scored, and the policy says ``fail_job``.
    """
    failed = next((reward for reward in group if reward.status == "error"), None)
    if failed is not None and policy.on_error == "fail_job":
        raise TrainingError(
            f"a completion could not be scored, and failure.on_error is fail_job: {failed.message}",
            code="missing_reward",
            param="method.dar.rewards.failure.on_error",
        )
    if failed is not None and policy.on_error == "drop_group":
        return _left_out(
            group, f"another completion of this prompt could not be scored: {failed.message}"
        )
    if isinstance(policy.on_error, FallbackValue):
        group = [
            replace(reward, reward=policy.on_error.fallback_value, is_fallback=True)
            if reward.status == "error"
            else reward
            for reward in group
        ]
    scored = sum(reward.reward is not None for reward in group)
    if scored < min(policy.min_valid, len(group)):
        return _left_out(
            group,
            f"only {scored} of {len(group)} completions of this prompt have a reward, and min_valid is {policy.min_valid}",
        )
    return list(group)


def _left_out(group: Sequence[SampleReward], message: str) -> list[SampleReward]:
    return [_without_reward(reward, message) for reward in group]


def _without_reward(reward: SampleReward, message: str) -> SampleReward:
    if reward.reward is None:
        return reward
    if reward.is_fallback:  # what it stood in for stays to be told
        return replace(reward, reward=None, is_fallback=False)
    return replace(reward, reward=None, status="skip", message=message, zeroed=())
