"""What a builtin is: a model of its parameters that scores samples."""

from typing import Annotated, ClassVar

from pydantic import Field

from dar.protocol.base import Input
from dar.rewards.base import RewardResult, RewardSample

Reward = Annotated[float, Field(ge=-1e6, le=1e6)]
ColumnName = Annotated[str, Field(min_length=1, max_length=64)]


class Builtin(Input):
    """A reward function and its parameters."""

    fn: ClassVar[str]
    """Its name in a job spec."""

    def score(self, sample: RewardSample) -> RewardResult:
        """The reward of one sample; depends on nothing else."""
        raise NotImplementedError

    @property
    def columns(self) -> list[str]:
        """Columns of the prompt's row that it reads."""
        return []
