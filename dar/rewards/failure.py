"""`FailureBudget`: how much a job's rewards may fail before it stops."""

from collections.abc import Mapping, Sequence
from typing import Any

from dar.errors import TrainingError
from dar.protocol.reward_spec import FailurePolicy
from dar.rewards.base import SampleReward


class FailureBudget:
    """Counts what could not be scored.

    Args:
        policy: Of the job.
    """

    def __init__(self, policy: FailurePolicy) -> None:
        self._policy = policy
        self._empty_steps = 0

    def add_group(self, results: Sequence[SampleReward]) -> None:
        """Take in the rewards of a prompt's completions."""

    def end_step(self, usable_groups: int) -> None:
        """Take in a step, after all of its groups.

        Raises:
            TrainingError: Too many steps in a row had no usable group.
        """
        self._empty_steps = 0 if usable_groups else self._empty_steps + 1
        if self._empty_steps >= self._policy.max_empty_steps:
            raise TrainingError(
                f"the last {self._empty_steps} steps had no usable rewards: nearly every completion was skipped or failed; "
                "check what the reward service answers",
                code="no_rewards",
            )

    def state(self) -> dict[str, Any]:
        """What has been taken in, as JSON."""
        return {"empty_steps": self._empty_steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._empty_steps = int(state["empty_steps"])
