"""`LearningWatch`: detects settings under which rewards have too little or too much effect.

A weight is exp(A / (alpha + beta)), times the pull of the reference, up to the clip. So alpha +
beta has to fit the size of the advantages A, which are differences of rewards:

- *small advantages*: over the first steps the standard deviation of A / (alpha + beta) is so small
  that all weights are nearly equal. The policy is then trained on its own samples, whatever their
  rewards.
- *clipped weights*: over the last steps so many weights are at the clip that they say only which
  completion was better, not by how much.
- *slow KL*, *large KL*: when a third of the steps are done, the KL to the reference is still a
  small part of ``kl_budget``, or has left it far behind.

Each is reported once in a run, with the standard deviation of the rewards, the alpha + beta that
would fit, and the learning rate. The thresholds are those of `dar.protocol.hints`.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch

from dar.protocol.hints import HINTS
from dar.training.config.config import DARConfig
from dar.training.loss import LEAST_DEVIATION
from dar.training.step.records import ScoredStep

NORMALISED = 0.5
"""Normalised advantages that deviate by less were divided by `LEAST_DEVIATION`, not by their
own deviation, which would make them deviate by 1."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Rewards, advantages and weights of the completions that count, in one step or several."""

    count: int
    reward_mean: float
    reward_std: float
    """Biased."""
    squares: float
    """Sum of the squared advantages, whose mean is 0."""
    differing: int
    """Completions whose advantage is not 0."""
    clipped: int
    """Completions whose weight is at the clip."""
    kl: float | None
    """Mean KL of a completion to the reference, in nats; None without a reference."""

    @classmethod
    def of(cls, step: ScoredStep) -> "Spread":
        """The spread of a step in which at least one completion counts."""
        rows = step.valid_rows
        rewards = torch.tensor([step.rewards[row].reward for row in rows], dtype=torch.float64)
        advantages = step.advantages_B[rows].double()
        kl = None
        if step.ref_logps_B is not None:
            kl = (step.behavior_logps_B[rows] - step.ref_logps_B[rows]).double().mean().item()
        return cls(
            len(rows),
            rewards.mean().item(),
            rewards.std(unbiased=False).item(),
            advantages.square().sum().item(),
            int(advantages.count_nonzero()),
            int(step.clipped_B[rows].sum()),
            kl,
        )

    @classmethod
    def pooled(cls, steps: Sequence["Spread"]) -> "Spread":
        """The spread of several steps together; at least one."""
        count = sum(one.count for one in steps)
        mean = math.fsum(one.count * one.reward_mean for one in steps) / count
        variance = math.fsum(
            one.count * (one.reward_std**2 + (one.reward_mean - mean) ** 2) for one in steps
        )
        return cls(
            count,
            mean,
            math.sqrt(variance / count),
            math.fsum(one.squares for one in steps),
            sum(one.differing for one in steps),
            sum(one.clipped for one in steps),
            None
            if any(one.kl is None for one in steps)
            else math.fsum(one.count * (one.kl or 0.0) for one in steps) / count,
        )

    @property
    def advantage_std(self) -> float:
        return math.sqrt(self.squares / self.count)

    @property
    def differing_std(self) -> float:
        """Standard deviation of the advantages that are not 0; 0 if there are none."""
        return math.sqrt(self.squares / max(1, self.differing))

    @property
    def fitting(self) -> float:
        """The alpha + beta that would fit the advantages; 0 if all are 0."""
        return self.differing_std / HINTS.advantages_fitting

    @property
    def clip_fraction(self) -> float:
        return self.clipped / self.count


@dataclass(frozen=True, slots=True)
class _Hint:
    """What was found, and what to do."""

    kind: str
    found: Spread
    what: str
    advice: str
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further data of the event."""


class LearningWatch:
    """Warns once of each kind.

    Args:
        config: The arguments of the run; alpha and beta are read when they are needed. With a
            ``kl_budget`` they fit the rewards by themselves, so the size of the advantages is not
            judged.
    """

    def __init__(self, config: DARConfig) -> None:
        self._config = config
        self._first: list[Spread] = []
        self._last: deque[Spread] = deque(maxlen=HINTS.clip_steps)
        self._has_warned_of_clip = False
        self._is_kl_judged = False

    def add(
        self, step: ScoredStep, last_step: int, *, learning_rate: float
    ) -> list[tuple[str, dict[str, Any]]]:
        """Count a step after its optimizer step.

        Args:
            step: The step; one without completions that count is not counted.
            last_step: The last one of the run, which is judged by fewer steps if it has no more.
            learning_rate: With which the optimizer has stepped.

        Returns:
            Message and data of each event that is due.
        """
        if not step.valid_count:
            return []
        spread = Spread.of(step)
        is_end = step.number >= last_step
        is_beginning = len(self._first) < HINTS.advantages_steps
        if is_beginning:
            self._first.append(spread)
        self._last.append(spread)
        told = []
        if is_beginning and (is_end or len(self._first) == HINTS.advantages_steps):
            told.append(self._small(Spread.pooled(self._first), len(self._first)))
        if not self._has_warned_of_clip and (is_end or len(self._last) == HINTS.clip_steps):
            told.append(self._clipped(Spread.pooled(self._last), len(self._last)))
        if not self._is_kl_judged and step.number >= HINTS.kl_run * last_step:
            told.append(self._astray(Spread.pooled(self._last), step.number, last_step))
        return [self._event(one, step.number, learning_rate) for one in told if one is not None]

    @property
    def _temperature(self) -> float:
        return self._config.alpha + self._config.beta

    # --- what is judged --------------------------------------------------------------------------

    def _small(self, found: Spread, steps: int) -> _Hint | None:
        if self._config.kl_budget is not None or not found.differing:
            return None
        if found.advantage_std >= HINTS.advantages_least * self._temperature:
            return None
        return _Hint(
            "small_advantages",
            found,
            f"in the first {_steps(steps)} the rewards had hardly any effect, because the weights "
            "of all completions were nearly equal",
            self._against_small(found),
        )

    def _clipped(self, found: Spread, steps: int) -> _Hint | None:
        if found.clip_fraction <= HINTS.clip_most:
            return None
        self._has_warned_of_clip = True
        return _Hint(
            "clipped_weights",
            found,
            f"in the last {_steps(steps)} {found.clip_fraction:.0%} of the weights were at the "
            f"clip, dar_wclip = {self._config.dar_wclip:g}, so they did not follow the size of the "
            "rewards",
            self._against_clip(found),
        )

    def _astray(self, found: Spread, number: int, last_step: int) -> _Hint | None:
        """A KL that is far from its budget."""
        budget, kl = self._config.kl_budget, found.kl
        self._is_kl_judged = True
        if budget is None or kl is None:
            return None
        is_slow = stays_behind(kl, budget)
        if not is_slow and kl <= HINTS.kl_most * budget:
            return None
        bound = f"less than {HINTS.kl_least:g}" if is_slow else f"more than {HINTS.kl_most:g} times"
        advice = (
            "raise the learning rate, or train for more steps"
            if is_slow
            else "the steps are too large for the pull towards the reference; lower the learning rate"
        )
        return _Hint(
            "slow_kl" if is_slow else "large_kl",
            found,
            f"after {number} of {last_step} steps the KL to the reference is {kl:.3g} nats, "
            f"{bound} {'of ' if is_slow else ''}kl_budget = {budget:g}",
            advice,
            {"kl": kl, "kl_budget": budget},
        )

    # --- messages --------------------------------------------------------------------------------

    def _event(self, hint: _Hint, number: int, learning_rate: float) -> tuple[str, dict[str, Any]]:
        """The message of a hint, and its data."""
        found = hint.found
        return (
            f"{hint.what}: {self._facts(found)}; {hint.advice}; the learning rate is "
            f"{learning_rate:.3g}"
        ), {
            "kind": hint.kind,
            "step": number,
            "reward_std": found.reward_std,
            "advantage_std": found.advantage_std,
            "clip_fraction": found.clip_fraction,
            "alpha_plus_beta": self._temperature,
            "fitting_alpha_plus_beta": found.fitting or None,
            "learning_rate": learning_rate,
            **hint.more,
        }

    def _facts(self, found: Spread) -> str:
        temperature = self._temperature
        return (
            f"std(reward) is {found.reward_std:.3g}, and that of the advantages, "
            f"{found.advantage_std:.3g}, is {found.advantage_std / temperature:.3g} times alpha + "
            f"beta = {temperature:.3g}"
        )

    def _against_small(self, found: Spread) -> str:
        fitting = found.fitting
        least = HINTS.advantages_least * self._temperature
        if found.differing_std >= least:
            return (
                f"only {found.differing / found.count:.2g} of the completions differ in reward "
                f"from the others of their prompt, and to these alpha + beta = {fitting:.2g} would "
                "fit: use a reward that differs more often, or more completions per prompt"
            )
        if self._config.adv_norm != "none" and found.differing_std < NORMALISED:
            return (
                f"adv_norm {self._config.adv_norm} divides by at least {LEAST_DEVIATION:g}, and "
                f"the rewards deviate by less: multiply them by {1 / found.differing_std:.2g} or "
                f"more, then alpha + beta = {1 / HINTS.advantages_fitting:.2g} would fit"
            )
        return f"{self._fit('lower', fitting)}{self._rescaling('multiply', fitting)}"

    def _against_clip(self, found: Spread) -> str:
        fitting = found.fitting
        if self._config.kl_budget is not None:
            return (
                f"alpha and beta follow from kl_budget = {self._config.kl_budget:g}, so the policy "
                "is farther from the reference than it: lower the learning rate"
            )
        if fitting > self._temperature:
            return f"{self._fit('raise', fitting)}{self._rescaling('divide', fitting)}"
        return (
            f"these advantages fit an alpha + beta of {fitting:.2g}, so the weights grow with the "
            "distance from the reference: lower the learning rate, or raise dar_wclip"
        )

    def _fit(self, verb: str, fitting: float) -> str:
        share = fitting / self._temperature
        return (
            f"{verb} alpha + beta to about {fitting:.2g}, which would fit (alpha "
            f"{share * self._config.alpha:.2g}, beta {share * self._config.beta:.2g})"
        )

    def _rescaling(self, verb: str, fitting: float) -> str:
        """The same by other rewards, which has an effect only if advantages are not normalised."""
        if self._config.adv_norm != "none":
            return ""
        factor = max(fitting / self._temperature, self._temperature / fitting)
        return f", or {verb} the rewards by {factor:.2g}"

    # --- resuming --------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What was counted, as JSON."""
        return {
            "first": [astuple(one) for one in self._first],
            "last": [astuple(one) for one in self._last],
            "has_warned_of_clip": self._has_warned_of_clip,
            "is_kl_judged": self._is_kl_judged,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._first = [Spread(*one) for one in state["first"]]
        self._last = deque((Spread(*one) for one in state["last"]), maxlen=HINTS.clip_steps)
        self._has_warned_of_clip = state["has_warned_of_clip"]
        self._is_kl_judged = state["is_kl_judged"]


def stays_behind(kl: float, budget: float) -> bool:
    """Whether a KL is too small a part of its budget, after the share of a run that is `kl_run`."""
    return kl < HINTS.kl_least * budget


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"
