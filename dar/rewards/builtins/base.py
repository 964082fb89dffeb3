"""A builtin is a model of its parameters that scores samples; `BuiltinReward` makes it a source."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from dar.protocol.base import Input
from dar.rewards.base import RewardContext, RewardResult, RewardSample, strip_thinking
from dar.rewards.threads import in_daemon_thread

Reward = Annotated[float, Field(ge=-1e6, le=1e6)]
ColumnName = Annotated[str, Field(min_length=1, max_length=64)]


class Builtin(Input):
    """A reward function and its parameters."""

    fn: ClassVar[str]
    """Name in a job spec."""

    def score(self, sample: RewardSample) -> RewardResult:
        """The reward of one sample. It depends on nothing else."""
        raise NotImplementedError

    @property
    def columns(self) -> list[str]:
        """Columns of the row that it reads."""
        return []


class BuiltinReward:
    """A builtin as a reward source.

    It runs in a thread, so that a large group does not block the event loop.

    Args:
        name: Component name.
        builtin: The builtin.
        strip_thinking: Whether completions are scored without their thinking.
    """

    def __init__(self, name: str, builtin: Builtin, *, strip_thinking: bool = False) -> None:
        self._name = name
        self._builtin = builtin
        self._strip_thinking = strip_thinking

    @property
    def name(self) -> str:
        return self._name

    async def score(
        self,
        samples: Sequence[RewardSample],
        context: RewardContext,  # noqa: ARG002 - part of the RewardSource interface
    ) -> list[RewardResult]:
        """Score ``samples``: one result each, in order."""
        return await in_daemon_thread(lambda: list(map(self._score, samples)))

    def _score(self, sample: RewardSample) -> RewardResult:
        return self._builtin.score(strip_thinking(sample) if self._strip_thinking else sample)

    async def aclose(self) -> None:
        """Do nothing: there is no connection."""
