"""Builtins about the length of a completion: length, truncation, repetition."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from dar.rewards.base import RewardResult, RewardSample, Scored
from dar.rewards.builtins.base import Builtin

Unit = Literal["tokens", "words", "characters"]
Length = Annotated[int, Field(ge=1, le=10_000_000)]
Penalty = Annotated[float, Field(gt=0, le=1e6)]


def length_of(sample: RewardSample, unit: Unit) -> int:
    """Length of a completion; words are separated by white space."""
    if unit == "tokens":
        return sample.completion_tokens
    return len(sample.completion) if unit == "characters" else len(sample.completion.split())


class LengthPenalty(Builtin):
    """``-(length - target) / scale`` above ``target``, at least ``-max_penalty``.

    With ``both_sides`` a shorter completion is penalised by its distance as well.
    """

    fn: ClassVar[str] = "length_penalty"

    target: Annotated[int, Field(ge=0, le=10_000_000)]
    """Longest completion without a penalty."""
    scale: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Excess that costs 1; default: ``target``, at least 1."""
    max_penalty: Penalty = 1.0
    """Largest penalty."""
    unit: Unit = "tokens"
    """Unit of the length."""
    both_sides: bool = False
    """Whether a completion shorter than ``target`` is penalised too."""

    def score(self, sample: RewardSample) -> RewardResult:
        excess = length_of(sample, self.unit) - self.target
        distance = abs(excess) if self.both_sides else max(0, excess)
        scale = max(1, self.target) if self.scale is None else self.scale
        return Scored(0.0 - min(self.max_penalty, distance / scale))


class OverlongPenalty(Builtin):
    """Soft overlong punishment of DAPO (arXiv 2503.14476, equation 13).

    0 up to ``max_tokens - buffer_tokens``, then linear down to ``-penalty`` from ``max_tokens`` on.
    """

    fn: ClassVar[str] = "overlong_penalty"

    max_tokens: Length
    """Length of the full penalty, in tokens; usually the job's ``max_new_tokens``."""
    buffer_tokens: Length
    """Length of the linear part before it, in tokens."""
    penalty: Penalty = 1.0
    """The full penalty."""

    @model_validator(mode="after")
    def _fits(self) -> "OverlongPenalty":
        if self.buffer_tokens > self.max_tokens:
            raise PydanticCustomError(
                "buffer_too_long",
                "buffer_tokens must not be above max_tokens ({most})",
                {"most": self.max_tokens},
            )
        return self

    def score(self, sample: RewardSample) -> RewardResult:
        excess = sample.completion_tokens - (self.max_tokens - self.buffer_tokens)
        share = min(1.0, max(0, excess) / self.buffer_tokens)
        return Scored(0.0 - self.penalty * share)


class RepetitionPenalty(Builtin):
    """``-max_penalty`` times the share of repeated n-grams; 0 for fewer than ``n`` units."""

    fn: ClassVar[str] = "repetition_penalty"

    n: Annotated[int, Field(ge=1, le=64)] = 3
    """Length of the n-grams."""
    max_penalty: Penalty = 1.0
    """Factor of the share of repeated n-grams."""
    unit: Literal["words", "characters"] = "words"
    """Unit of the n-grams; words are compared in lower case."""

    def score(self, sample: RewardSample) -> RewardResult:
        text = sample.completion
        units = text if self.unit == "characters" else text.lower().split()
        count = len(units) - self.n + 1
        if count < 1:
            return Scored(0.0)
        # Tuples, not joined texts: with those "a b" + "c" would equal "a" + "b c".
        distinct = len({tuple(units[start : start + self.n]) for start in range(count)})
        share = (count - distinct) / count
        return Scored(0.0 - self.max_penalty * share)
