"""`ScoredStep`: the completions of an optimizer step. `Weigher`: computes their weights."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from dar.errors import TrainingError
from dar.protocol.samples import FinishReason
from dar.protocol.worker import Phase
from dar.rewards.base import SampleReward
from dar.training.config.config import DARConfig
from dar.training.data.rows import Prompt, TokenPair
from dar.training.loss import importance_weights, normalized_advantages, self_normalized, tied

Mode = Literal["train", "eval", "calibrate"]
"""``calibrate``: an evaluation in all but the phase that is reported."""
PHASES: Mapping[Mode, Phase] = {
    "train": "sampling",
    "eval": "evaluating",
    "calibrate": "calibrating",
}
"""What a run does while completions are sampled."""
LogProbabilities = Callable[[Sequence[TokenPair]], Tensor]
"""Returns log-probabilities ``[B]`` of completions under some model, in nats."""
LEAST_VALID = 2
"""Scored completions that a comparison needs; a group with fewer is left out."""


@dataclass(slots=True)
class ScoredStep:
    """All completions of an optimizer step: B of P prompts, those of a prompt together."""

    number: int
    """Optimizer step, from 1."""
    epoch: float
    """Passes over the data set at the end of the step."""
    prompts: list[Prompt]
    """``[P]``."""
    pairs: list[TokenPair]
    """``[B]``."""
    texts: list[str]
    """``[B]`` completions without special tokens."""
    finish_reasons: list[FinishReason]
    rewards: list[SampleReward]
    behavior_logps_B: Tensor
    """NaN where the data lack them."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of ``sampling``, ``reward`` (waiting) and ``reference`` (passes of `Weigher`)."""
    idle_generation_seconds: float = 0.0
    """Part of ``sampling`` in which this process waited for the others."""
    ref_logps_B: Tensor | None = None
    """NaN where not valid; None without a reference (alpha = 0)."""
    counts: list[int] = field(default_factory=list)
    """``[P]`` completions of each prompt; default: equally many."""
    staleness: int | None = 0
    """Optimizer steps between the sampling policy and the trained one; None: not known."""
    valid_B: Tensor = field(init=False)
    """True where a completion counts: it has a reward, and another one to be compared with."""
    advantages_B: Tensor = field(init=False)
    """0 where not valid."""
    weights_B: Tensor = field(init=False)
    """0 where not valid."""
    clipped_B: Tensor = field(init=False)
    """True where the weight was clipped."""
    policy_logps_B: Tensor = field(init=False)
    """NaN before the training pass."""
    entropies_B: Tensor = field(init=False)
    """Entropy of the policy's next token, summed over the completion, in nats.

    NaN before the training pass."""
    group_count: int = field(init=False, default=0)
    """Groups with at least two scored completions."""
    tied_count: int = field(init=False, default=0)
    """Groups among them whose rewards are all equal."""
    dropped_count: int = field(init=False, default=0)
    """Prompts too few of whose completions had a reward at first."""
    refilled_count: int = field(init=False, default=0)
    """Prompts among them that were sampled again."""

    def __post_init__(self) -> None:
        """No completion counts before a `Weigher` has compared it."""
        count = len(self.pairs)
        if not self.counts:
            self.counts = [count // len(self.prompts)] * len(self.prompts)
        assert len(self.counts) == len(self.prompts)
        assert sum(self.counts) == count
        self.valid_B = torch.zeros(count, dtype=torch.bool)
        self.advantages_B = torch.zeros(count)
        self.weights_B = torch.zeros(count)
        self.clipped_B = torch.zeros(count, dtype=torch.bool)
        self.policy_logps_B = torch.full((count,), math.nan)
        self.entropies_B = torch.full((count,), math.nan)

    @property
    def lengths(self) -> Tensor:
        """``[B]`` tokens of each completion, with its end-of-sequence token."""
        return torch.tensor([len(pair.completion_ids) for pair in self.pairs])

    @property
    def starts(self) -> list[int]:
        """``[P + 1]`` row of each prompt's first completion, and B."""
        return list(itertools.accumulate(self.counts, initial=0))

    def rows_of(self, prompts: Sequence[int]) -> list[int]:
        """Rows of the completions of these prompts."""
        starts = self.starts
        return [row for p in prompts for row in range(starts[p], starts[p + 1])]

    @property
    def places(self) -> list[tuple[int, int]]:
        """``[B]``: number of the prompt, and number of the completion within the prompt."""
        return [(p, k) for p, count in enumerate(self.counts) for k in range(count)]

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
        """Rows of the completions that count."""
        rows: list[int] = self.valid_B.nonzero().flatten().tolist()
        return rows


class StepSource(Protocol):
    """Returns the scored completions of a step; called when the step begins."""

    def __call__(self, number: int) -> ScoredStep:
        """Completions of step ``number``, from 1.

        Raises:
            StopRequestedError: A stop was requested meanwhile; nothing has changed.
        """


class Weigher:
    """Turns rewards into weights; its statistics span the whole step and only scored completions.

    A completion is compared with the others of its prompt. All prompts of a step with a single
    completion form one group, whose mean is their baseline (with K = 1, that is the whole step). A
    completion without another to be compared with (the only scored one of its prompt, or the only
    single one of its step) is left out: its advantage could only be 0, so it would be trained on
    whatever its reward.

    Args:
        config: alpha, beta, clip, normalisation and departures.
        reference: Log-probabilities under the frozen reference; None if alpha is 0.
        policy: Log-probabilities under the current policy, used where those of the sampling policy
            are unknown.
        dtype: Number format of all values of a step.
    """

    def __init__(
        self,
        config: DARConfig,
        reference: LogProbabilities | None,
        policy: LogProbabilities,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._config = config
        self._reference = reference
        self._policy = policy
        self._dtype = dtype

    def __call__(self, step: ScoredStep, *, is_behavior_known: bool) -> ScoredStep:
        """Compute everything of ``step`` that follows from its rewards, which are all known.

        Raises:
            TrainingError: A reward is missing, and the config does not allow that.
        """
        self.begin(step)
        everything = range(len(step.prompts))
        self._compare(step, everything)
        started = time.monotonic()
        rows = step.valid_rows
        if rows and not is_behavior_known:
            policy_logps = self._policy([step.pairs[row] for row in rows])
            step.behavior_logps_B[rows] = policy_logps.to(self._dtype)
        self.measure_reference(step, rows)
        step.seconds["reference"] = time.monotonic() - started
        self._weigh(step, everything)
        return step

    def begin(self, step: ScoredStep) -> None:
        """Allocate the tensors that `measure_reference` and `weigh` fill in."""
        step.behavior_logps_B = step.behavior_logps_B.to(self._dtype)
        if self._reference is not None:
            step.ref_logps_B = torch.full_like(step.behavior_logps_B, math.nan)
        step.advantages_B = torch.zeros(len(step.pairs), dtype=self._dtype)
        step.weights_B = torch.zeros(len(step.pairs), dtype=self._dtype)
        step.policy_logps_B = step.policy_logps_B.to(self._dtype)
        step.entropies_B = step.entropies_B.to(self._dtype)

    def measure_reference(self, step: ScoredStep, rows: Sequence[int]) -> None:
        """Fill in the reference's log-probabilities of these completions; needs no rewards."""
        if rows and self._reference is not None and step.ref_logps_B is not None:
            logps = self._reference([step.pairs[row] for row in rows])
            step.ref_logps_B[list(rows)] = logps.to(self._dtype)

    def weigh(self, step: ScoredStep, prompts: Sequence[int]) -> None:
        """Compare and weigh the completions of these prompts.

        Their rewards and reference log-probabilities are known. Unless the config `is_streamable`,
        all prompts must be passed together.

        Raises:
            TrainingError: A reward is missing, and the config does not allow that.
        """
        self._compare(step, prompts)
        if step.ref_logps_B is not None:
            left_out = [row for row in step.rows_of(prompts) if not step.valid_B[row]]
            step.ref_logps_B[left_out] = math.nan
        self._weigh(step, prompts)

    def _rewards(self, step: ScoredStep, prompts: Sequence[int]) -> Tensor:
        """``[B]``; NaN where missing or of another prompt."""
        rows = step.rows_of(prompts)
        missing = [row for row in rows if step.rewards[row].reward is None]
        if missing and not self._config.allow_missing:
            why = next(
                (step.rewards[row].message for row in missing if step.rewards[row].message), None
            )
            raise TrainingError(
                f"{len(missing)} of the {len(rows)} completions of step {step.number} have no "
                "reward"
                + (f" ({why})" if why else "")
                + "; set allow_missing to leave such completions out",
                code="missing_reward",
                param="allow_missing",
            )
        rewards_B = torch.full((len(step.pairs),), math.nan, dtype=self._dtype)
        for row in rows:
            reward = step.rewards[row].reward
            rewards_B[row] = math.nan if reward is None else reward
        return rewards_B

    def _compare(self, step: ScoredStep, prompts: Sequence[int]) -> None:
        """Advantages, and which completions count."""
        config = self._config
        groups_GK = group_rows(step.counts, prompts)
        rewards_GK = self._rewards(step, prompts)[groups_GK]
        scored_GK = (groups_GK >= 0) & ~rewards_GK.isnan()
        is_group_G1 = scored_GK.sum(dim=1, keepdim=True) >= LEAST_VALID
        tied_G1 = tied(rewards_GK, tolerance=config.tie_tolerance, valid=scored_GK).unsqueeze(1)
        step.group_count += int(is_group_G1.sum())
        step.tied_count += int((is_group_G1 & tied_G1).sum())
        valid_GK = scored_GK & is_group_G1
        if config.drop_ties:
            valid_GK = valid_GK & ~tied_G1
        advantages_GK = normalized_advantages(
            rewards_GK,
            mode=config.adv_norm,
            baseline=config.baseline,
            valid=valid_GK,
            tie_tolerance=config.tie_tolerance,
        )
        step.valid_B[groups_GK[valid_GK]] = True
        step.advantages_B[groups_GK[valid_GK]] = advantages_GK[valid_GK]

    def _weigh(self, step: ScoredStep, prompts: Sequence[int]) -> None:
        config = self._config
        groups_GK = group_rows(step.counts, prompts)
        valid_GK = step.valid_B[groups_GK] & (groups_GK >= 0)
        behavior_GK = step.behavior_logps_B[groups_GK]
        ref_GK = behavior_GK if step.ref_logps_B is None else step.ref_logps_B[groups_GK]
        weights_GK = importance_weights(
            step.advantages_B[groups_GK],
            ref_GK,
            behavior_GK,
            alpha=config.alpha,
            beta=config.beta,
            clip=config.dar_wclip,
            lengths=step.lengths[groups_GK] if config.log_ratio == "mean" else None,
            min_ess=config.min_ess,
            valid=valid_GK,
        )
        step.clipped_B[groups_GK[valid_GK]] = (weights_GK >= config.dar_wclip)[valid_GK]
        weights_GK = self_normalized(weights_GK, mode=config.weight_norm, valid=valid_GK)
        step.weights_B[groups_GK[valid_GK]] = weights_GK[valid_GK]


def is_streamable(config: DARConfig) -> bool:
    """Whether a prompt can be weighed before the others have rewards."""
    is_per_prompt = config.adv_norm != "batch" and config.weight_norm != "batch"
    return is_per_prompt and config.min_ess == 0 and config.dar_k >= LEAST_VALID


def group_rows(counts: Sequence[int], prompts: Sequence[int] | None = None) -> Tensor:
    """Which completions are compared with each other.

    Args:
        counts: ``[P]`` completions of each prompt, those of a prompt together; B in all.
        prompts: The prompts to group; None: all.

    Returns:
        ``[G, K]`` rows from 0 to B - 1, and -1 where a group has fewer than K: a group for each
        prompt with several completions, and one for all prompts with a single one.
    """
    starts = list(itertools.accumulate(counts, initial=0))
    chosen = range(len(counts)) if prompts is None else prompts
    rows = [list(range(starts[p], starts[p + 1])) for p in chosen]
    groups = [group for group in rows if len(group) > 1]
    singles = [row for group in rows if len(group) == 1 for row in group]
    if singles:
        groups.append(singles)
    width = max(map(len, groups), default=0)
    return torch.tensor([group + [-1] * (width - len(group)) for group in groups])
