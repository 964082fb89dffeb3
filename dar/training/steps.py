"""What an optimizer step is made of: its prompts, its scored completions and their weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dar.errors import InvalidRequestError
from dar.protocol.samples import FinishReason
from dar.rewards.base import SampleReward
from dar.training.config import DARConfig
from dar.training.data import Prompt, PromptEncoder, PromptOrder, Rows, TokenPair
from dar.training.loss import importance_weights, normalized_advantages
from dar.training.sink import Sink

LogProbabilities = Callable[[Sequence[TokenPair]], Tensor]
"""Log-probabilities ``[B]`` of completions under some model, float32, in nats."""
LEAST_VALID = 2
"""Scored completions that a comparison needs: a group with fewer is left out."""


@dataclass(slots=True)
class ScoredStep:
    """All completions of one optimizer step, B = P * K, those of a prompt together."""

    number: int
    """Optimizer step, from 1."""
    epoch: float
    """Passes over the data set when the step is done."""
    prompts: list[Prompt]
    """``[P]``."""
    pairs: list[TokenPair]
    """``[B]``."""
    texts: list[str]
    """``[B]`` completions without special tokens."""
    finish_reasons: list[FinishReason]
    rewards: list[SampleReward]
    behavior_logps_B: Tensor
    """NaN where the data do not say what sampled."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of ``sampling`` and ``reward``."""
    ref_logps_B: Tensor | None = None
    """NaN where not valid; None without a reference (alpha = 0)."""
    valid_B: Tensor = field(init=False)
    """True where a completion counts: it has a reward, and so has another one to compare it with."""
    advantages_B: Tensor = field(init=False)
    weights_B: Tensor = field(init=False)
    """0 where not valid."""
    policy_logps_B: Tensor = field(init=False)
    """NaN until the training pass fills it in."""

    def __post_init__(self) -> None:
        """Nothing counts before a `Weigher` has seen it."""
        self.valid_B = torch.zeros(len(self.pairs), dtype=torch.bool)
        self.advantages_B = torch.zeros(len(self.pairs))
        self.weights_B = torch.zeros(len(self.pairs))
        self.policy_logps_B = torch.full((len(self.pairs),), math.nan)

    @property
    def valid_count(self) -> int:
        """Completions that count."""
        return int(self.valid_B.sum())

    @property
    def tokens(self) -> int:
        """Completion tokens that are trained on."""
        return sum(len(self.pairs[i].completion_ids) for i in self.valid_rows)

    @property
    def valid_rows(self) -> list[int]:
        """Numbers of the completions that count."""
        rows: list[int] = self.valid_B.nonzero().flatten().tolist()
        return rows

    def shares(self, count: int) -> list["StepShare"]:
        """Cut the step into ``count`` shares of prompts, for as many backward passes."""
        size = len(self.pairs) // count
        return [
            StepShare(self, [row for row in self.valid_rows if row // size == i])
            for i in range(count)
        ]


@dataclass(frozen=True, slots=True)
class StepShare:
    """Part of a step: a micro-batch as `transformers.Trainer` sees it."""

    step: ScoredStep
    rows: list[int]
    """Completions of the share that count."""


class StepSource(Protocol):
    """Gives the scored completions of each step; called when the step begins."""

    def __call__(self, number: int) -> ScoredStep:
        """Completions of step ``number``, from 1.

        Raises:
            StopRequestedError: A stop was requested meanwhile; nothing has changed.
        """
        ...


class PromptStream:
    """The prompts of each step: a function of the seed and the step's number.

    Args:
        rows: The data set.
        encoder: Makes token ids of a row.
        config: Batch size and seed.
        sink: Is told once when a prompt had to be cut.

    Raises:
        InvalidRequestError: A conversation cannot be encoded; the message names the row. All are tried here, as a chat
            template may refuse what stands in the last row.
    """

    def __init__(self, rows: Rows, encoder: PromptEncoder, config: DARConfig, sink: Sink) -> None:
        self._rows = rows
        self._encoder = encoder
        self._count = config.prompts_per_step
        self._order = PromptOrder(len(rows), config.seed)
        self._sink = sink
        self._has_warned = False
        for row in range(len(rows)):
            if not isinstance(rows[row].get("prompt"), str):
                self._encode(row)

    def of_step(self, number: int) -> list[Prompt]:
        """The P prompts of step ``number``, from 1."""
        start = (number - 1) * self._count
        numbers = [self._order.row(position) for position in range(start, start + self._count)]
        prompts = [self._encode(row) for row in numbers]
        for row, prompt in zip(numbers, prompts, strict=True):
            if prompt.cut_tokens and not self._has_warned:
                self._has_warned = True
                self._sink.event(
                    "warn",
                    f"the prompt of row {row + 1} is {prompt.cut_tokens} tokens too long: its beginning was cut off, "
                    "and so it goes with every prompt that is too long",
                    {"kind": "prompt_cut", "row": row + 1, "cut_tokens": prompt.cut_tokens},
                )
        return prompts

    def _encode(self, row: int) -> Prompt:
        try:
            return self._encoder(self._rows[row])
        except InvalidRequestError as error:
            raise InvalidRequestError(f"row {row + 1}: {error}", param="training_file") from error

    def epoch(self, number: int) -> float:
        """Passes over the data set after step ``number``."""
        return number * self._count / self._order.row_count


class Weigher:
    """Turns rewards into weights: statistics over the whole step and over scored completions only.

    Args:
        config: K, alpha, beta, clip and normalisation.
        reference: Log-probabilities under the frozen reference; None where alpha is 0.
        policy: Log-probabilities under the policy as it is: stands in where behavior log-probabilities are unknown.
    """

    def __init__(
        self, config: DARConfig, reference: LogProbabilities | None, policy: LogProbabilities
    ) -> None:
        self._config = config
        self._reference = reference
        self._policy = policy

    def __call__(self, step: ScoredStep, *, is_behavior_known: bool) -> ScoredStep:
        """Fill in valid, advantages, reference log-probabilities and weights of ``step``."""
        config = self._config
        rewards_B = torch.tensor(
            [math.nan if reward.reward is None else reward.reward for reward in step.rewards]
        )
        # With K = 1 a prompt has no siblings: the whole step is the one group, and its mean the baseline.
        width = len(step.pairs) if config.dar_k == 1 else config.dar_k
        rewards_GK = rewards_B.view(-1, width)
        valid_GK = ~rewards_GK.isnan()
        valid_GK = valid_GK & (valid_GK.sum(dim=1, keepdim=True) >= LEAST_VALID)
        advantages_GK = normalized_advantages(rewards_GK, mode=config.adv_norm, valid=valid_GK)
        step.valid_B, step.advantages_B = valid_GK.flatten(), advantages_GK.flatten()
        rows = step.valid_rows
        pairs = [step.pairs[row] for row in rows]
        if rows and not is_behavior_known:
            step.behavior_logps_B[rows] = self._policy(pairs)
        behavior_logps = step.behavior_logps_B[rows]
        ref_logps = behavior_logps
        if self._reference is not None:
            step.ref_logps_B = torch.full_like(rewards_B, math.nan)
            if rows:
                ref_logps = step.ref_logps_B[rows] = self._reference(pairs)
        step.weights_B[rows] = importance_weights(
            step.advantages_B[rows],
            ref_logps,
            behavior_logps,
            alpha=config.alpha,
            beta=config.beta,
            clip=config.dar_wclip,
        )
        return step
